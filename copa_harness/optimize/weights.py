"""The weights step: which trainings are done, on which rows, and the LoRA adapters that come out.

A LoRA trained long on bare prompts loses the use of demonstrations, and one trained with demonstrations collapses
without them. What serves a program better is seen only by trying, and a training costs no call; so a step trains more
than once (`weights_jobs`):

* **bare, always**: the prompts as written, without demonstrations. It is the same training whatever the strategy, so
  every strategy that tunes weights has what `w` alone has, and the adapter is made once.
* **behind the best prompts so far**, where they are others: with their instructions, and behind as many demonstrations.
* **behind demonstrations yet to be found**, where a prompt step follows, for a small model only: a large one pays for
  each pass over such rows, which are ten times as long, with minutes.

Rows with demonstrations show others in every epoch, and a fifth of them (`bare_share`) comes bare as well: enough that
the search can still try short prompts on such weights. The setting `demonstrations` of the training overrules this:
`keep` leaves the bare training out where there is another, `drop` trains without demonstrations only. What was chosen
is written into the adapter's manifest (`served_with`).

**Rows** come from the user (`finetune_data`), from gold answers where the examples hold those of every predictor, and
else from what programs answered on training examples before (`rollouts`), at no further call. Where too few of these
passed, the best program so far is run on the rows without one, as far as half of the calls left pays for.

**Refit.** Validation rows decide what is returned, and that done they are labelled rows like any other. So the last
training of a large model is that of the returned weights, once more, on training and validation rows together
(`refit`); it costs no call. Validation scores are those of the weights before it, on rows that these had not seen.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from copa_harness.errors import ConfigurationError, NoTrainingRowsError, TrainingError
from copa_harness.evaluate.runner import default_adapter
from copa_harness.formatting import counted
from copa_harness.lm.call_context import current_scope
from copa_harness.optimize.propose.schema import is_fully_labelled, strata_of, stratified_order
from copa_harness.optimize.search.candidate import Candidate, is_tunable, model_name, takes_lora
from copa_harness.optimize.search.space import NO_DEMOS
from copa_harness.optimize.step_budget import CallBudget
from copa_harness.results import Phase

if TYPE_CHECKING:
    import dspy

    from copa_harness.optimize.options import SearchOptions
    from copa_harness.optimize.rollouts import Rollout
    from copa_harness.optimize.search_context import SearchContext
    from copa_harness.tune.options import LoraSettings
    from copa_harness.tune.rows import PredictorCall, RowDemos, TrainingRow
    from copa_harness.tune.trainer import LoraAdapter

logger = logging.getLogger("copa_harness")

LEFT_OUT = "and were left out"
"""How the clause of a phase's note ends that tells of rows too long to be trained on."""

ENOUGH_ROLLOUTS = 12
"""Training examples with a passing run from which on (or from half of the examples on) no further call is made."""


@dataclass(frozen=True, slots=True)
class WeightsJob:
    """One training to be done.

    Attributes:
        context: Training examples, or rows to train on instead; how to train, and the seed.
        prompts: Whose prompts the rows are rendered with, and whose models are tuned.
        n_demos: Demonstrations per row; 0 for bare rows.
    """

    context: SearchContext
    prompts: Candidate
    n_demos: int = 0

    @property
    def settings(self) -> SearchOptions:
        """How to train."""
        return self.context.settings

    @property
    def seed(self) -> int:
        """Of the demonstrations drawn, and of the training when `settings.lora` is not given."""
        return self.context.settings.seed

    def lora(self, lm: Any, *, n_rows: int) -> LoraSettings:
        """How to train a model on so many examples."""
        own: Mapping[str, Any] = {}
        with_demos = self.n_demos > 0
        if takes_lora(lm):
            from copa_harness.tune.dspy_provider import suited_to

            own = suited_to(lm, n_rows=n_rows, with_demos=with_demos)
        return self.settings.lora_settings(with_demos=with_demos, seed=self.seed, suited=own)


@dataclass(frozen=True, slots=True)
class Trained:
    """Tuned weights.

    Attributes:
        prompts: As in the job, on the tuned weights.
        n_demos: Demonstrations per row.
        rows: Places of the training examples they come from, or that were looked at for them.
        note: A sentence about the training.
        job: What was asked for.
    """

    prompts: Candidate
    n_demos: int
    rows: frozenset[int]
    note: str
    job: WeightsJob

    @property
    def lms(self) -> tuple[Any, ...]:
        """The tuned models, one per predictor."""
        return self.prompts.lms


def weights_jobs(
    context: SearchContext, plain: Candidate, best: Candidate, *, demos_ahead: bool
) -> tuple[WeightsJob, ...]:
    """The trainings of a step, the bare one first; see the top of this module.

    Args:
        context: How to train.
        plain: The program as written, on the models that are tuned.
        best: The best program so far; its prompts are what counts.
        demos_ahead: Whether demonstrations are still searched.
    """
    bare = plain.with_demos({part.predictor: NO_DEMOS.demos for part in plain.parts})
    if context.finetune_data is not None:
        return (WeightsJob(context, plain),)
    kept = context.settings.lora_settings(with_demos=True, seed=0).demonstrations
    ahead = context.settings.max_demos if demos_ahead and all(map(_is_small, plain.lms)) else 0
    n_demos = max(0, min(best.n_demos or ahead, len(context.trainset) - 1)) if kept != "drop" else 0
    found = best.with_lms(plain.lms)
    first, second = WeightsJob(context, bare), WeightsJob(context, found, n_demos)
    if n_demos == 0 and found.with_demos({part.predictor: () for part in found.parts}).key == bare.key:
        return (first,)
    return (second,) if kept == "keep" and n_demos else (first, second)


def _is_small(lm: Any) -> bool:
    if not takes_lora(lm):
        return False
    from copa_harness.tune.dspy_provider import is_large_model

    return not is_large_model(lm)


@dataclass(frozen=True, slots=True)
class _Source:
    """What rows are made of.

    Attributes:
        rows: Places of the training examples, those included of whom nothing was good enough.
        n_examples: Examples that rows come from.
        text: Where they come from, and what that cost.
        calls: By predictor; None for gold answers.
    """

    rows: frozenset[int]
    n_examples: int
    text: str
    calls: Mapping[str, Sequence[PredictorCall]] | None = None


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows by predictor, what they are made of, the demonstrations they carry, and what `served_with` says of them."""

    by_predictor: Mapping[str, Sequence[TrainingRow]]
    source: _Source
    n_demos: int
    served_with: str


def train_weights(job: WeightsJob, *, best: Candidate) -> Trained:
    """Fine-tune every model of the job on rows rendered with its prompts.

    Args:
        job: What is trained, and behind which prompts.
        best: The best program so far: it is run on training examples where rows are still to be made.

    Raises:
        NoTrainingRowsError: There are no rows to train on.
        ConfigurationError: A model cannot be fine-tuned.
    """
    for lm in job.prompts.lms:
        _check_tunable(lm)
    made = _rows(job, best)
    if not any(made.by_predictor.values()):
        raise NoTrainingRowsError(
            "got no rows to fine-tune on: no training example was answered well enough; give labels for every output, "
            "finetune_data=..., or a strategy that begins with 'p'"
        )
    tuned: dict[str, Any] = {}
    scope = current_scope()
    steps_before, n_rows = scope.usage().train_steps, 0
    found: list[str] = []
    with scope.phase(Phase.WEIGHTS):
        for lm in job.prompts.lms:
            name = model_name(lm)
            if name in tuned:
                continue
            served = [part.predictor for part in job.prompts.parts if model_name(part.lm) == name]
            own = [row for predictor in served for row in made.by_predictor[predictor]]
            tuned[name], clauses = _fine_tuned(lm, own, job, made) if own else (lm, [])
            n_rows += len(own)
            found += clauses
    n_steps = scope.usage().train_steps - steps_before
    note = "; ".join(
        [f"{n_rows} rows from {made.source.text}, served with {made.served_with}", f"{n_steps} training steps", *found]
    )
    logger.info("weights: %s", note)
    lms = tuple(tuned[model_name(lm)] for lm in job.prompts.lms)
    return Trained(job.prompts.with_lms(lms), made.n_demos, made.source.rows, note, job)


def wants_refit(settings: SearchOptions, lms: Sequence[Any]) -> bool:
    """Whether returned weights are trained once more: as set, else for large models that are tuned here."""
    return all(takes_lora(lm) and not _is_small(lm) for lm in lms) if settings.refit is None else settings.refit


def refit(served: Candidate, trainings: Sequence[Trained], more: Sequence[dspy.Example]) -> Trained | None:
    """A program with its weights trained once more, on further rows too.

    Args:
        served: The program.
        trainings: Those of the run.
        more: Labelled examples beside the training set, which `served` has answered before: where weights learn from
            passing runs, it is run on them again, which replays.

    Returns:
        None where no such training made the program's weights, its rows came from the user, or only the old rows or
        only the new ones hold every output.

    Raises:
        NoTrainingRowsError, TrainingError, BudgetExhausted: As `train_weights`.
    """
    made = next((one for one in trainings if not served.structure and one.prompts.model == served.model), None)
    if made is None or made.job.context.finetune_data is not None:
        return None
    context = made.job.context
    whole = replace(context, trainset=[*context.trainset, *more])
    if has_gold(served, whole) != has_gold(served, context):
        return None
    if not has_gold(served, whole):
        rows = range(len(context.trainset), len(whole.trainset))
        whole.run_on_training(served.program(), rows, phase=Phase.BOOTSTRAP, candidate=served)
    again = train_weights(replace(made.job, context=whole), best=served)
    return replace(again, prompts=served.with_lms(again.lms))


def _rows(job: WeightsJob, best: Candidate) -> _Rows:
    from copa_harness.tune.rows import RowDemos, TrainingRow

    names = [part.predictor for part in job.prompts.parts]
    everything = frozenset(range(len(job.context.trainset)))
    if job.context.finetune_data is not None:
        given = [TrainingRow.from_chat(row) for row in job.context.finetune_data]
        by_predictor: dict[str, Sequence[TrainingRow]] = dict.fromkeys(names, ())
        by_predictor[names[0]] = given  # one adapter serves all predictors of a model, so it does not matter whose
        return _Rows(by_predictor, _Source(everything, len(given), "the user"), 0, "as in the rows")
    if has_gold(job.prompts, job.context):
        source = _Source(everything, len(everything), "gold labels (no calls)")
    else:
        source = _passing_runs(job, best)
    bare = _rendered(job, source, demos=RowDemos("none", seed=job.seed))
    n_demos = max(0, min(job.n_demos, source.n_examples - 1))
    if n_demos < 1:
        return _Rows(bare, source, 0, "none")
    n_epochs = job.lora(job.prompts.lms[0], n_rows=source.n_examples).epochs
    demos = RowDemos("resample", seed=job.seed, n_demos=n_demos, n_variants=n_epochs)
    rows = _rendered(job, source, demos=demos)
    keep = job.settings.lora_settings(with_demos=True, seed=0).demonstrations == "keep"
    share = 0.0 if keep else job.settings.bare_share
    generator = np.random.default_rng([job.seed, 505])
    mixed: dict[str, Sequence[TrainingRow]] = {}
    for name in names:
        added = [
            replace(bare[name][int(i)], variant=variant)
            for variant in range(n_epochs)
            for i in sorted(generator.permutation(len(bare[name]))[: round(share * len(bare[name]))])
        ]
        mixed[name] = [*rows[name], *added]
    return _Rows(mixed, source, n_demos, demos.served_with + (f" + none:{share:g}" if share else ""))


def has_gold(prompts: Candidate, context: SearchContext) -> bool:
    """Whether the training examples hold every output of every predictor."""
    signatures = [predictor.signature for _, predictor in prompts.template.named_predictors()]
    return all(is_fully_labelled(signature, context.trainset) for signature in signatures)


def _rendered(job: WeightsJob, source: _Source, *, demos: RowDemos) -> dict[str, tuple[TrainingRow, ...]]:
    from copa_harness.tune.rows import render_calls, render_rows

    program, adapter = job.prompts.program(), default_adapter()
    if source.calls is None:
        return render_rows(program, job.context.trainset, demos=demos, adapter=adapter)
    return {
        name: render_calls(predictor, source.calls[name], demos=demos, adapter=adapter) if source.calls[name] else ()
        for name, predictor in program.named_predictors()
    }


def _passing_runs(job: WeightsJob, best: Candidate) -> _Source:
    """Whole runs that passed, one for each training example that has one; more are made where those are too few."""
    context, scope = job.context, current_scope()
    charged, known = scope.charged_calls, _passing(context)
    if len(known) < min(ENOUGH_ROLLOUTS, (len(context.trainset) + 1) // 2):
        known = _with_more_runs(context, best, known)
    paid = scope.charged_calls - charged
    names = [part.predictor for part in job.prompts.parts]
    calls = {name: [call for one in known for call in one.calls(name)] for name in names}
    n_examples = min((len(own) for own in calls.values() if own), default=0)
    programs = {"" if one.candidate is None else one.candidate.key for one in known}
    text = (
        f"passing runs of {counted(len(programs), 'program')} on {counted(len(known), 'training row')} "
        f"({counted(paid, 'call') if paid else 'no further calls'})"
    )
    return _Source(context.rollouts.rows, n_examples, text, calls)


def _passing(context: SearchContext) -> tuple[Rollout, ...]:
    return context.rollouts.passing(context.settings.pass_score, worth=context.validation.mean)


def _with_more_runs(context: SearchContext, best: Candidate, known: Sequence[Rollout]) -> tuple[Rollout, ...]:
    """With runs of the best program on examples that no run passed on, unless it gets nothing right on validation."""
    if context.validation.mean(best) <= 0:
        return tuple(known)
    scope, passed = current_scope(), {one.row for one in known}
    n = context.n_affordable(best, CallBudget(scope, np.inf).remaining / 2)
    if n < 1:
        if known:
            return tuple(known)
        raise NoTrainingRowsError(
            "the budget does not pay for running training examples, which the weights step needs here; "
            "raise the budget, or give finetune_data=..."
        )
    order = stratified_order(strata_of(context.trainset), np.random.default_rng([context.settings.seed, 404]))
    missing = [row for row in order if row not in passed][:n]
    if missing:
        context.run_on_training(best.program(), missing, phase=Phase.BOOTSTRAP, candidate=best)
    return _passing(context)


def _check_tunable(lm: Any) -> None:
    if not is_tunable(lm):
        raise ConfigurationError(
            f"got the model {model_name(lm)!r}, which cannot be fine-tuned; the weights step needs 'embedded', "
            "'hf:<path or id>', a vLLM server's model with --copa-base-weights=hf:<path or id of the same weights>, or "
            "a DSPy model whose provider fine-tunes"
        )


def _fine_tuned(lm: Any, rows: Sequence[TrainingRow], job: WeightsJob, made: _Rows) -> tuple[Any, list[str]]:
    """The tuned model, by LoRA for a local engine, by DSPy's provider for any other; and clauses of a note about it."""
    if takes_lora(lm):
        adapter = _lora(lm, rows, job, made)
        return lm.copy(model=adapter.model), _clauses(adapter, n_rows=len(rows))
    from dspy.clients.utils_finetune import TrainDataFormat

    data = [{"messages": [dict(message) for message in row.messages]} for row in rows]
    result = lm.finetune(train_data=data, train_data_format=TrainDataFormat.CHAT, train_kwargs={}).result()
    if isinstance(result, BaseException):  # DSPy hands an error over as the job's result
        raise TrainingError(f"fine-tuning {model_name(lm)!r} failed: {result}") from result
    return result, []


def _lora(lm: Any, rows: Sequence[TrainingRow], job: WeightsJob, made: _Rows) -> LoraAdapter:
    from copa_harness.tune.dspy_provider import train_lora

    lora = replace(job, n_demos=made.n_demos).lora(lm, n_rows=made.source.n_examples)
    kept, held_out = list(rows), []
    n_held_out = round((lora.held_out_share or job.settings.held_out_share) * len(rows))
    if n_held_out:
        chosen = set(np.random.default_rng([job.seed, 606]).permutation(len(rows))[:n_held_out].tolist())
        kept = [row for i, row in enumerate(rows) if i not in chosen]
        held_out = [row for i, row in enumerate(rows) if i in chosen]
    return train_lora(
        lm, kept, directory=lm.engine.lora_dir, settings=lora, held_out=held_out, served_with=made.served_with
    )


def _clauses(adapter: LoraAdapter, *, n_rows: int) -> list[str]:
    clauses = []
    if adapter.general_losses:
        before, after = adapter.general_losses
        moved = "" if adapter.divergence is None else f", {adapter.divergence:.2f} from the base model's (KL)"
        clauses.append(f"forgotten: {after - before:+.2f} nats a token on general answers ({before:.2f} before){moved}")
    if adapter.n_over_long:
        limit = f"the {adapter.max_tokens:,} tokens a row may have" if adapter.max_tokens else "a row may be"
        clauses.append(f"{adapter.n_over_long} of {n_rows} rows were longer than {limit} {LEFT_OUT}")
    return clauses
