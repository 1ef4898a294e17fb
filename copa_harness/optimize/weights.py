"""The weights step: rows rendered with the prompts that will be served, and a LoRA adapter trained on them.

A LoRA trained long on bare prompts loses the use of demonstrations, and one trained with demonstrations collapses
without them; so the rows follow what is to come. With demonstrations in the incumbent, or a prompt step still ahead,
every row is rendered behind demonstrations drawn anew for every epoch, and a fifth of the rows (`bare_share`) bare as
well: enough that the search can still try short prompts on the tuned weights, too few to teach it to ignore
demonstrations. Otherwise all rows are bare. What was chosen is written into the adapter's manifest (`served_with`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import dspy
import numpy as np

from copa_harness.errors import ConfigurationError, NoTrainingRowsError, TrainingError
from copa_harness.evaluate.metrics import call_metric
from copa_harness.evaluate.runner import default_adapter
from copa_harness.lm.call_context import current_scope
from copa_harness.optimize.propose.schema import is_fully_labelled
from copa_harness.optimize.search.candidate import Candidate, is_tunable, model_name, takes_lora
from copa_harness.results import Phase

if TYPE_CHECKING:
    from copa_harness.optimize.options import SearchOptions
    from copa_harness.optimize.search_context import SearchContext
    from copa_harness.tune.options import LoraSettings
    from copa_harness.tune.rows import RowDemos, TrainingRow
    from copa_harness.tune.trainer import LoraAdapter

logger = logging.getLogger("copa_harness")

LEFT_OUT = "and were left out"
"""How the clause of a phase's note ends that tells of rows too long to be trained on."""


@dataclass(frozen=True, slots=True)
class WeightsJob:
    """One training to be done.

    Attributes:
        context: Training examples, or rows to train on instead; how to train, and the seed.
        incumbent: Whose prompts are served and whose models are tuned.
        demos_ahead: Whether a step that searches demonstrations follows.
        can_afford_traces: Whether the budget pays for a pass over the training examples.
    """

    context: SearchContext
    incumbent: Candidate
    demos_ahead: bool
    can_afford_traces: bool

    @property
    def settings(self) -> SearchOptions:
        """How to train."""
        return self.context.settings

    @property
    def seed(self) -> int:
        """Of the demonstrations drawn, and of the training when `settings.lora` is not given."""
        return self.context.settings.seed

    @property
    def n_demos(self) -> int:
        """Demonstrations per row; 0 for bare rows."""
        if self.settings.lora_settings(with_demos=False, seed=0).demonstrations == "drop":
            return 0
        wanted = self.incumbent.n_demos or (self.settings.max_demos if self.demos_ahead else 0)
        return max(0, min(wanted, len(self.context.trainset) - 1))

    @property
    def n_epochs(self) -> int:
        """Passes over the rows."""
        return self.lora(self.incumbent.lms[0], with_demos=self.n_demos > 0).epochs

    def lora(self, lm: Any, *, with_demos: bool) -> LoraSettings:
        """How to train a model on rows with or without demonstrations."""
        own: Mapping[str, Any] = {}
        if takes_lora(lm):
            from copa_harness.tune.dspy_provider import suited_to

            n_rows = len(self.context.finetune_data or self.context.trainset)
            own = suited_to(lm, n_rows=n_rows, with_demos=with_demos)
        return self.settings.lora_settings(with_demos=with_demos, seed=self.seed, suited=own)


@dataclass(frozen=True, slots=True)
class Trained:
    """Tuned weights: one model per predictor, how many demonstrations the rows carried, and a sentence about it."""

    lms: tuple[Any, ...]
    n_demos: int
    note: str


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows by predictor, the demonstrations they carry, and what `served_with` says of them."""

    by_predictor: Mapping[str, Sequence[TrainingRow]]
    n_demos: int
    source: str
    served_with: str


def train_weights(job: WeightsJob) -> Trained:
    """Fine-tune every model of the incumbent on rows rendered with its prompts.

    Rows come from the user (`finetune_data`) if given, from gold labels when the examples hold every field of every
    predictor, and else from traces of training examples the program got right.

    Raises:
        NoTrainingRowsError: There are no rows to train on.
        ConfigurationError: A model cannot be fine-tuned.
    """
    for lm in job.incumbent.lms:
        _check_tunable(lm)
    rows = _rows(job)
    if not any(rows.by_predictor.values()):
        raise NoTrainingRowsError(
            "got no rows to fine-tune on: no training example was answered well enough; give labels for every output, "
            "finetune_data=..., or a strategy that begins with 'p'"
        )
    tuned: dict[str, Any] = {}
    scope = current_scope()
    steps_before, n_rows = scope.usage().train_steps, 0
    found: list[str] = []
    with scope.phase(Phase.WEIGHTS):
        for lm in job.incumbent.lms:
            name = model_name(lm)
            if name in tuned:
                continue
            served = [part.predictor for part in job.incumbent.parts if model_name(part.lm) == name]
            own = [row for predictor in served for row in rows.by_predictor[predictor]]
            tuned[name], clauses = _fine_tuned(lm, own, job, rows) if own else (lm, [])
            n_rows += len(own)
            found += clauses
    n_steps = scope.usage().train_steps - steps_before
    note = "; ".join(
        [f"{n_rows} rows from {rows.source}, served with {rows.served_with}", f"{n_steps} training steps", *found]
    )
    logger.info("weights: %s", note)
    return Trained(tuple(tuned[model_name(lm)] for lm in job.incumbent.lms), rows.n_demos, note)


def _rows(job: WeightsJob) -> _Rows:
    from copa_harness.tune.rows import RowDemos, TrainingRow

    names = [part.predictor for part in job.incumbent.parts]
    if job.context.finetune_data is not None:
        given = [TrainingRow.from_chat(row) for row in job.context.finetune_data]
        by_predictor: dict[str, Sequence[TrainingRow]] = dict.fromkeys(names, ())
        by_predictor[names[0]] = given  # one adapter serves all predictors of a model, so it does not matter whose
        return _Rows(by_predictor, 0, "the user", "as in the rows")
    program = job.incumbent.program()
    signatures = [predictor.signature for _, predictor in program.named_predictors()]
    labelled = all(is_fully_labelled(signature, job.context.trainset) for signature in signatures)
    source = "gold labels" if labelled else "passing traces"
    bare, n_examples = _rendered(job, program, labelled, demos=RowDemos("none", seed=job.seed))
    n_demos = max(0, min(job.n_demos, n_examples - 1))
    if n_demos < 1:
        return _Rows(bare, 0, source, "none")
    demos = RowDemos("resample", seed=job.seed, n_demos=n_demos, n_variants=job.n_epochs)
    rows, _ = _rendered(job, program, labelled, demos=demos)
    keep = job.settings.lora_settings(with_demos=True, seed=0).demonstrations == "keep"
    share = 0.0 if keep else job.settings.bare_share
    generator = np.random.default_rng([job.seed, 505])
    mixed: dict[str, Sequence[TrainingRow]] = {}
    for name in names:
        added = [
            replace(bare[name][int(i)], variant=variant)
            for variant in range(job.n_epochs)
            for i in sorted(generator.permutation(len(bare[name]))[: round(share * len(bare[name]))])
        ]
        mixed[name] = [*rows[name], *added]
    return _Rows(mixed, n_demos, source, demos.served_with + (f" + none:{share:g}" if share else ""))


def _rendered(
    job: WeightsJob, program: dspy.Module, labelled: bool, *, demos: RowDemos
) -> tuple[dict[str, tuple[TrainingRow, ...]], int]:
    """Rows by predictor, and how many examples they come from. Tracing twice costs the calls of once (cached)."""
    from copa_harness.tune.rows import render_rows
    from copa_harness.tune.traces import rows_from_traces

    adapter = default_adapter()
    if labelled:
        rows = render_rows(program, job.context.trainset, demos=demos, adapter=adapter)
        return rows, len(job.context.trainset)
    if not job.can_afford_traces:
        raise NoTrainingRowsError(
            "the budget does not pay for a pass over the training examples, which the weights step needs here; "
            "raise the budget, or give finetune_data=..."
        )
    with current_scope().phase(Phase.BOOTSTRAP), dspy.context(adapter=adapter, disable_history=True):
        traced = rows_from_traces(
            program,
            job.context.trainset,
            metric=lambda example, prediction, trace: call_metric(
                job.context.metric, example, prediction=prediction, trace=trace
            ),
            demos=demos,
            pass_score=job.settings.pass_score,
            adapter=adapter,
            threads=job.context.settings.threads,
        )
    return traced.rows, traced.n_passed


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

    lora = job.lora(lm, with_demos=made.n_demos > 0)
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
        clauses.append(f"forgotten: {after - before:+.2f} nats a token on general answers ({before:.2f} before)")
    if adapter.n_over_long:
        limit = f"the {adapter.max_tokens:,} tokens a row may have" if adapter.max_tokens else "a row may be"
        clauses.append(f"{adapter.n_over_long} of {n_rows} rows were longer than {limit} {LEFT_OUT}")
    return clauses
