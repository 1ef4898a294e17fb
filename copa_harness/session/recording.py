"""The end of a run: the optimized program measured on the test split, judged, attributed and recorded.

`finish_run` is the one place where the test split meets an optimized program. What else is measured (`copa_evaluate`)
is recorded here too, and so is what the session's ceilings cut short.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from copa_harness.errors import BudgetExhausted, ConfigurationError, CopaError
from copa_harness.formatting import counted
from copa_harness.judge.explanations import truncated_text
from copa_harness.results import GateResult, PhaseRecord, Verdict
from copa_harness.session.canaries import Canaries, ask_canaries
from copa_harness.session.comparisons import ON_SCORES, GateContext, RunHistory, baseline_name
from copa_harness.session.entries import Entry
from copa_harness.session.evaluation import (
    Measured,
    attributed,
    groups_of,
    is_drawn,
    leakage_of,
    measure,
    phases_of,
    searches_both,
    slices_of,
    split_of,
)
from copa_harness.session.optimizations import Optimized, fingerprints_of, keep_scored
from copa_harness.session.options import Settings, check_gates
from copa_harness.session.runs import CopaRun, ScoredEvaluation
from copa_harness.session.violations import FormMeter

if TYPE_CHECKING:
    import dspy

    from copa_harness.judge.attribution import Attribution
    from copa_harness.judge.human_scores import HumanScores
    from copa_harness.judge.sequential.stopping import SequentialAnswer, SequentialJudge
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.report.examples import RunDetails
    from copa_harness.report.records import RunRecord
    from copa_harness.store.baselines import Baseline
    from copa_harness.tasks.task import Task


def finish_run(
    task: Task,
    optimized: Optimized,
    *,
    base: MeteredLM,
    prompt_lm: MeteredLM | None,
    settings: Settings,
    history: RunHistory,
    test: str,
) -> tuple[Entry, CopaRun]:
    """Measure an optimized program on the test split, hold it to its gates and record it.

    `prompt_lm` writes paraphrases, where a gate asks for them; this run is added to the `history` if it is complete.

    Returns:
        What the session's end needs to know, and what the test gets.

    Raises:
        BudgetExhausted: The ceilings of the whole session cut the evaluation short.
        ArtifactError: A baseline file is damaged, or the evaluation cannot become one.
    """
    from copa_harness.evaluate.examples import example_ids

    program, strategy, gates = optimized.program, optimized.result.strategy, settings.gates
    context = _context(task, optimized, base=base, settings=settings, history=history)
    watch = context.watch(example_ids(task.testset), gates) if settings.sequential else None
    warns = history.parses(task, base)  # else it was said before the search
    measured = measure(
        task, program, optimized.lm, split="test", strategy=strategy, settings=settings, watch=watch, warns=warns
    )
    evaluation = measured.evaluation
    forms = FormMeter(task, program, optimized.lm, evaluation.results, settings, prompt_lm)
    context = replace(context, forms=forms)
    judged = _judge(context, measured, gates, watch=watch)
    comparison, gained, canaries = None, _Gained(), Canaries()
    if settings.canaries:
        answered = (program, optimized.lm, evaluation), (task.program, base, history.as_written(task, base))
        canaries = ask_canaries(task, answered, settings=settings, began_s=history.began_s)
    if evaluation.n == context.n_expected:
        fingerprints, groups = context.fingerprints, context.groups
        comparison = history.remember(task, base, evaluation, fingerprints=fingerprints, groups=groups)
        keep_scored(optimized, evaluation, settings)
        if searches_both(strategy):
            as_written = history.as_written(task, base)
            assert as_written is not None  # evaluated before the search
            gained = _attribution(
                task, optimized, base=base, as_written=as_written, final=evaluation, settings=settings
            )
    accepted = _accepted(context)
    human = None if task.human is None or watch is not None else _by_people(context, measured, accepted)
    record = record_of(
        measured,
        test=test,
        base=base,
        settings=settings,
        optimized=optimized,
        more_phases=(*forms.phases, *canaries.phases, *gained.phases),
        gates=judged.answers,
        sequential=judged.sequential,
        attribution=gained.attribution,
        drift=canaries.drift,
        human=human,
        groups=dict(context.groups or {}),
        slices=dict(context.slices),
        source=task.source,
    )
    where = f"{task.name}, {strategy}"
    notes = (
        *notes_of(measured),
        *gained.notes,
        *((f"{where}: {canaries.note}",) if canaries.note else ()),
        *((f"{where}: {human.sentence()}",) if human else ()),
        *_single_draw(measured, program, optimized.lm, settings=settings, where=where),
        *(f"{where}: {said}" for said in optimized.result.headlines),
        *_over_long(record.phases, where=where),
        *((f"{task.name}: {context.leakage.text()}",) if context.leakage.near else ()),
        *_other_data(context),
    )
    run = CopaRun(
        record=record,
        evaluation=evaluation,
        baseline=history.as_written(task, base) or evaluation,
        program=program,
        lm=optimized.lm,
        from_disk=optimized.from_disk,
        undecided_fails=bool(gates.get("undecided_fails")),
        judge_again=_second_judgement(context, measured, judged, gates=gates),
    )
    entry = Entry(
        test=test,
        record=record,
        baseline=judged.accepted,
        failures=measured.failures,
        notes=notes,
        comparison=comparison,
        details=details_of(
            measured,
            task=task,
            program=program,
            before=None if strategy == "none" else history.as_written(task, base),
            accepted=None if accepted is None else accepted.scores,
            fingerprints=context.fingerprints,
            trials=[{**trial, "n_validation": optimized.result.n_validation} for trial in optimized.result.trials],
        ),
        not_accepted=_why_not_accepted(evaluation) if settings.bless else "",
    )
    return entry, run


def _context(
    task: Task, optimized: Optimized, *, base: MeteredLM, settings: Settings, history: RunHistory
) -> GateContext:
    return GateContext(
        task=task.name,
        strategy=optimized.result.strategy,
        model=base.model,
        fingerprints=fingerprints_of(task, optimized.program, optimized.lm),
        calls=optimized.result.charged_calls,
        usage=optimized.result.usage,
        n_expected=len(task.testset),
        groups=groups_of(task),
        slices=slices_of(task),
        leakage=leakage_of(task, optimized.program),
        earlier=history.earlier(task, base),
        settings=settings,
    )


def _other_data(context: GateContext) -> tuple[str, ...]:
    """That the test rows are not those of the accepted result, where no gate compares with it and says so."""
    from copa_harness.store.baselines import load_baseline

    settings = context.settings
    if settings.bless or settings.gates.get("max_regression") is not None:
        return ()
    name = baseline_name(context.strategy, context.model)
    found = load_baseline(settings.baseline_dir, task=context.task, name=name)
    if found is None or found.fingerprints.get("data") == context.fingerprints["data"]:
        return ()
    before, now = found.fingerprints.get("data", "")[:12], context.fingerprints["data"][:12]
    return (
        f"{context.task}, {context.strategy}: the test rows changed since the accepted result ({found.origin}): "
        f"{counted(len(found.scores), 'row')}, {before}, then; {counted(context.n_expected, 'row')}, {now}, now",
    )


@dataclass(frozen=True, slots=True)
class _Judged:
    """The gates' answers, what stopping early came to, and the baseline the run is to become, if it is to be one."""

    answers: tuple[GateResult, ...]
    sequential: SequentialAnswer | None = None
    accepted: Baseline | None = None


def _judge(
    context: GateContext, measured: Measured, gates: Mapping[str, Any], *, watch: SequentialJudge | None
) -> _Judged:
    evaluation = measured.evaluation
    if watch is not None:
        sequential, answers = context.finished(watch, evaluation, gates)
        return _Judged(answers, sequential=sequential)
    accepted = _baseline_of(context, measured) if context.settings.bless and not evaluation.nothing_parses else None
    answers = context.judged(
        evaluation, gates, repeats=measured.repeats, is_settled=measured.is_settled, accepted=accepted
    )
    return _Judged(answers, accepted=accepted)


def _why_not_accepted(evaluation: ScoredEvaluation) -> str:
    """Why an evaluation must not become a baseline; "" if it may."""
    if not evaluation.nothing_parses:
        return ""
    return (
        f"{evaluation.title}: not accepted as baseline, since none of {counted(evaluation.n_unparsed, 'answer')} could "
        "be parsed: whatever comes later would pass beside it"
    )


def _baseline_of(context: GateContext, measured: Measured) -> Baseline:
    """The baseline a run would become.

    Raises:
        ArtifactError: Some examples have no score.
    """
    from copa_harness.report.provenance import git_commit, versions
    from copa_harness.store.baselines import Baseline, digests

    accepted = Baseline.from_evaluation(
        measured.evaluation,
        task=context.task,
        name=baseline_name(context.strategy, context.model),
        fingerprints=context.fingerprints,
        versions=versions(),
        commit=git_commit(context.settings.root),
        created=datetime.date.today().isoformat(),
        repeats=measured.repeats,
    )
    human = dict(sorted(measured.human.items()))
    return replace(accepted, families=_families(context), groups=digests(context.groups), human=human)


def _families(context: GateContext) -> dict[str, int]:
    """How many gates of the suite ask the same question; a part of it that is blessed takes over what is known."""
    from copa_harness.store.baselines import list_baselines

    families = dict(context.settings.families)
    if not context.settings.is_whole_suite:
        for entry in list_baselines(context.settings.baseline_dir, task=context.task):
            known = {} if entry.baseline is None else entry.baseline.families
            families |= {name: max(known[name], families.get(name, 1)) for name in known}
    return families


def _second_judgement(context: GateContext, measured: Measured, judged: _Judged, *, gates: Mapping[str, Any]) -> Any:
    """What answers the gates that `check()` is given, and tells what it spent on that."""

    def judge_again(asked: Mapping[str, Any]) -> tuple[tuple[GateResult, ...], tuple[PhaseRecord, ...]]:
        check_gates(asked, where="copa_run.check()")
        if judged.sequential is None:
            told = () if context.forms is None else context.forms.phases
            answers = context.judged(
                measured.evaluation,
                {**gates, **asked},
                repeats=measured.repeats,
                is_settled=measured.is_settled,
                accepted=judged.accepted,
            )
            return answers, () if context.forms is None or told else context.forms.phases
        if decided := [name for name in asked if name in (*ON_SCORES, "max_error_rate")]:
            raise ConfigurationError(
                f"copa_run.check(): got {', '.join(decided)} for an evaluation that stopped early, when the marker's "
                f"gates were decided (--copa-sequential); expected gates on scores in the marker."
            )
        return judged.answers + context.spending(measured.evaluation, asked), ()

    return judge_again


@dataclass(frozen=True, slots=True)
class _Gained:
    """The 2 x 2 of weights and prompts, what measuring it cost, and a note where it could not be measured."""

    attribution: Attribution | None = None
    phases: tuple[PhaseRecord, ...] = ()
    notes: tuple[str, ...] = ()


def _attribution(
    task: Task,
    optimized: Optimized,
    *,
    base: MeteredLM,
    as_written: ScoredEvaluation,
    final: ScoredEvaluation,
    settings: Settings,
) -> _Gained:
    """What weights and prompts gained; the run itself is complete without it."""
    from copa_harness.lm.call_context import scopes_opened

    with scopes_opened() as scopes:
        try:
            answer, phases = attributed(task, optimized, base=base, plain=as_written, final=final, settings=settings)
        except (CopaError, BudgetExhausted, ValueError) as error:
            where = f"{task.name}, {optimized.result.strategy}"
            note = f"{where}: what weights and prompts gained was not measured: {error}"
            return _Gained(phases=phases_of(scopes), notes=(note,))
    return _Gained(answer, phases)


def record_of(
    measured: Measured,
    *,
    test: str,
    base: MeteredLM,
    settings: Settings,
    optimized: Optimized | None = None,
    more_phases: tuple[PhaseRecord, ...] = (),
    **more: Any,
) -> RunRecord:
    """The record of an evaluation with the optimization that led to it; its cost is then told.

    `more_phases` were spent beyond optimization and evaluation; `more` are further attributes of the record.
    """
    from copa_harness.report.records import RunRecord

    evaluation = measured.evaluation
    phases = (*measured.phases, *more_phases)
    if optimized is not None:
        phases = (*optimized.tell_phases(), *phases)
        more |= {
            "artifact": str(optimized.artifact.absolute()),
            "budget": settings.budget,
            # What replays the program stands in the artifact, what every trial did in the cache.
            "optimization": replace(optimized.result, state=None, trials=()),
        }
    return RunRecord.from_evaluation(
        evaluation,
        test=test,
        task=evaluation.task,
        strategy=evaluation.strategy,
        lm=base.model,
        split=evaluation.split,
        # What tables call a model, where its name alone does not say how it answers.
        label=f"{base.model}, constrained" if base.constrain else "",
        phases=phases,
        seed=settings.seed,
        repeats=measured.repeats,
        **more,
    )


def details_of(
    measured: Measured,
    *,
    task: Task,
    program: dspy.Module,
    before: ScoredEvaluation | None,
    accepted: Mapping[str, float | None] | None = None,
    fingerprints: Mapping[str, str],
    trials: Sequence[Mapping[str, Any]] = (),
) -> RunDetails:
    """What the page shows of an evaluation.

    `before` is the program as written on the same split, None for that program itself; `accepted` are scores of the
    accepted result by example id, if the run is compared with it; `trials` are what the search tried.
    """
    from copa_harness.evaluate.prompts import prompt_texts
    from copa_harness.report.examples import MAX_PROMPT, TRIAL_KEYS, RunDetails, examples_shown, text_of

    texts = [
        {name: text_of(text, most=MAX_PROMPT) for name, text in prompt_texts(one).items()}
        for one in (task.program, program)
    ]
    return RunDetails(
        examples=examples_shown(measured.evaluation, before, accepted=accepted),
        n_examples=measured.evaluation.n,
        prompts_before=texts[0],
        prompts_after=texts[1],
        trials=tuple({name: trial.get(name) for name in TRIAL_KEYS} for trial in trials),
        fingerprints=dict(fingerprints),
    )


def _accepted(context: GateContext) -> Baseline | None:
    from copa_harness.store.baselines import load_baseline

    settings = context.settings
    if settings.bless or settings.gates.get("max_regression") is None:
        return None
    name = baseline_name(context.strategy, context.model)
    return load_baseline(settings.baseline_dir, task=context.task, name=name)


def _by_people(context: GateContext, measured: Measured, accepted: Baseline | None) -> HumanScores:
    from copa_harness.judge.human_scores import human_scores
    from copa_harness.judge.paired_gates import changed_parts
    from copa_harness.judge.paired_tests import scores_by_id

    before = None
    if accepted is not None and not changed_parts(accepted, context.fingerprints):
        before = accepted.scores, accepted.human
    return human_scores(scores_by_id(measured.evaluation), measured.human, before=before, groups=context.groups)


def cut_short_entry(
    reason: str,
    *,
    test: str,
    task: Task,
    strategy: str,
    base: MeteredLM,
    split: str,
    settings: Settings,
    phases: Sequence[PhaseRecord] = (),
) -> Entry:
    """What an evaluation that the session's ceilings ended leaves behind: no score, and nothing passed or failed.

    `reason` says what was refused, `phases` what was paid for all the same.
    """
    from copa_harness.report.records import RunRecord

    gate = GateResult(
        "completed",
        Verdict.UNDECIDED,
        f"budget exhausted: {reason}. There is no score to judge. Next: raise --copa-total-budget and run again; what "
        f"was answered is cached and free.",
        {"n": 0, "n_expected": len(split_of(task, split))},
    )
    record = RunRecord.from_evaluation(
        None,
        test=test,
        task=task.name,
        strategy=strategy,
        lm=base.model,
        split=split,
        gates=(gate,),
        phases=tuple(phases),
        budget=settings.budget,
        seed=settings.seed,
        cut_short=True,
    )
    return Entry(test=test, record=record)


def notes_of(measured: Measured) -> tuple[str, ...]:
    """What the summary has to say about an evaluation beyond its score."""
    evaluation = measured.evaluation
    notes = []
    if evaluation.usage.truncated_calls:
        notes.append(f"{evaluation.title}: {truncated_text(evaluation.usage)}")
    if measured.n_metric_calls:
        notes.append(
            f"{evaluation.title}: the metric made {counted(measured.n_metric_calls, 'call')} of a model of its "
            f"own on the {evaluation.split} split; they are paid for and counted, in a phase apart."
        )
    return tuple(notes)


def _single_draw(
    measured: Measured, program: dspy.Module, lm: MeteredLM, *, settings: Settings, where: str
) -> tuple[str, ...]:
    """What whoever blesses one draw of answers that vary should know."""
    if not settings.bless or measured.repeats or not is_drawn(program, lm):
        return ()
    return (
        f"{where}: a baseline of a single draw, at a temperature above 0; a lucky one makes one unchanged run in five "
        "fail instead of one in thirty. Next: --copa-bless --copa-repeat=3, which keeps every draw",
    )


def _over_long(phases: Sequence[PhaseRecord], *, where: str) -> tuple[str, ...]:
    """Training rows that were too long: who sees only scores would not know that part of the data was not used."""
    from copa_harness.optimize.weights import LEFT_OUT

    clauses = [clause for phase in phases for clause in phase.note.split("; ") if clause.endswith(LEFT_OUT)]
    return tuple(
        f"{where}: {clause} of the training; remedy: fewer or shorter demonstrations, or a larger max_length in lora="
        for clause in clauses
    )
