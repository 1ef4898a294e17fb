"""The end of a run: the optimized program measured on the test split, judged, attributed and recorded.

The one place where the test split meets an optimized program. Knows nothing of how the program was found, and nothing
of pytest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from copa_harness.errors import BudgetExhausted, ConfigurationError, CopaError
from copa_harness.judge.gates import overall
from copa_harness.judge.messages import counted
from copa_harness.results import GateResult, PhaseRecord, Usage
from copa_harness.session.attributing import attributed, searches_both
from copa_harness.session.blessing import baseline_name, candidate
from copa_harness.session.checking import check_arguments
from copa_harness.session.gating import ON_SCORES, Case
from copa_harness.session.guarding import leakage_of
from copa_harness.session.marker import GATES
from copa_harness.session.measuring import Measured, groups_of, measure
from copa_harness.session.memory import Memory
from copa_harness.session.optimizations import Optimized, fingerprints_of
from copa_harness.session.recording import Entry, record_of, shown_as
from copa_harness.session.runs import CopaRun, ScoredEvaluation
from copa_harness.session.settings import Settings

if TYPE_CHECKING:
    import dspy

    from copa_harness.judge.attribution import Attribution
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.tasks.task import Task


def final_entry(
    task: Task,
    optimized: Optimized,
    *,
    base: MeteredLM,
    gates: Mapping[str, Any],
    settings: Settings,
    memory: Memory,
    test: str,
) -> Entry:
    """Measure an optimized program on the test split, hold it to its gates and record it.

    Args:
        task: What to measure on.
        optimized: The program, its model, and how it was found.
        base: The base model.
        gates: Values by name.
        settings: In force for this run.
        memory: Earlier runs of the session; this one is added if it is complete.
        test: Id of the test that asked.

    Raises:
        BudgetExhausted: The ceilings of the whole session cut the evaluation short.
        ArtifactError: A baseline file is damaged, or the evaluation cannot become one.
    """
    from copa_harness.evaluate.examples import example_ids

    result = optimized.result
    case = Case(
        task=task.name,
        strategy=result.strategy,
        model=base.model,
        fingerprints=fingerprints_of(task, optimized.program, optimized.lm),
        calls=result.charged_calls,
        usage=result.usage,
        n_expected=len(task.testset),
        groups=groups_of(task),
        leakage=leakage_of(task, optimized.program),
        earlier=memory.earlier(task, base),
        settings=settings,
    )
    watch = case.watch(example_ids(task.testset), gates) if settings.sequential else None
    measured = measure(
        task,
        optimized.program,
        optimized.lm,
        split="test",
        strategy=result.strategy,
        settings=settings,
        watch=watch,
    )
    evaluation = measured.evaluation
    early = accepted = attribution = None
    more_phases: tuple[PhaseRecord, ...] = ()
    notes = notes_of(measured, optimized.program, optimized.lm)
    if watch is not None:
        early, answers = case.finished(watch, evaluation, gates)
    else:
        if settings.bless:
            accepted = candidate(
                evaluation,
                task=task.name,
                name=baseline_name(result.strategy, base.model),
                fingerprints=case.fingerprints,
                repeats=measured.repeats,
                settings=settings,
            )
        answers = case.judged(evaluation, gates, repeats=measured.repeats, accepted=accepted)
    standing: dict[str, Any] = {}
    if evaluation.n == case.n_expected:
        standing = memory.standing(task, base, case.fingerprints, case.groups)
        memory.remember(task, base, evaluation, case.fingerprints)
        if searches_both(result.strategy):
            plain = memory.plain(task, base)
            assert plain is not None  # evaluated before the search
            attribution, more_phases, note = _attribution(
                task, optimized, base=base, plain=plain, final=evaluation, settings=settings
            )
            notes += note
    notes += tuple(f"{task.name}, {result.strategy}: {said}" for said in result.headlines)
    phases = optimized.phases()
    notes += _over_long(phases, where=f"{task.name}, {result.strategy}")
    if case.leakage.near:
        notes += (f"{task.name}: {case.leakage.text()}",)

    def judge_again(asked: Mapping[str, Any]) -> tuple[GateResult, ...]:
        check_arguments(asked, known=GATES, where="copa_run.check()")
        if early is None:
            judging = case.unannounced(test, asked)
            return judging.judged(evaluation, {**gates, **asked}, repeats=measured.repeats, accepted=accepted)
        if decided := [name for name in asked if name in (*ON_SCORES, "max_error_rate")]:
            raise ConfigurationError(
                f"copa_run.check(): got {', '.join(decided)} for an evaluation that stopped early, when the marker's "
                f"gates were decided (--copa-sequential); expected gates on scores in the marker."
            )
        return answers + case.spending(evaluation, asked)

    run = CopaRun(
        task=task.name,
        strategy=result.strategy,
        evaluation=evaluation,
        baseline=memory.plain(task, base) or evaluation,
        usage=sum((phase.usage for phase in phases), Usage()),
        budget=settings.budget,
        phases=(*phases, *measured.phases, *more_phases),
        gates=answers,
        verdict=overall(answers),
        program=optimized.program,
        lm=optimized.lm,
        artifact=optimized.artifact,
        exhausted=result.exhausted,
        stopped=result.stopped,
        from_disk=optimized.from_disk,
        undecided_fails=bool(gates.get("undecided_fails")),
        repeats=measured.repeats,
        sequential=early,
        attribution=attribution,
        judge_again=judge_again,
    )
    record = record_of(
        measured,
        test=test,
        model=base.model,
        settings=settings,
        optimized=optimized,
        gates=answers,
        phases=more_phases,
        sequential={} if early is None else early.to_json(),
        attribution={} if attribution is None else attribution.to_json(),
        groups=dict(case.groups or {}),
        **shown_as(base),
    )
    return Entry(record, run, baseline=accepted, failures=measured.failures, notes=notes, standing=standing)


def _attribution(
    task: Task,
    optimized: Optimized,
    *,
    base: MeteredLM,
    plain: ScoredEvaluation,
    final: ScoredEvaluation,
    settings: Settings,
) -> tuple[Attribution | None, tuple[PhaseRecord, ...], tuple[str, ...]]:
    """The 2 x 2, its cost, and a note if it could not be measured: the run itself is complete without it."""
    try:
        answer, phases = attributed(task, optimized, base=base, plain=plain, final=final, settings=settings)
    except (CopaError, BudgetExhausted, ValueError) as error:
        where = f"{task.name}, {optimized.result.strategy}"
        return None, (), (f"{where}: what weights and prompts gained was not measured: {error}",)
    return answer, phases, ()


def _over_long(phases: Sequence[PhaseRecord], *, where: str) -> tuple[str, ...]:
    """Training rows that were too long: who sees only scores would not know that part of the data was not used."""
    from copa_harness.optimize.weights import LEFT_OUT

    clauses = [clause for phase in phases for clause in phase.note.split("; ") if clause.endswith(LEFT_OUT)]
    return tuple(
        f"{where}: {clause} of the training; remedy: fewer or shorter demonstrations, or a larger max_length in lora="
        for clause in clauses
    )


def notes_of(measured: Measured, program: dspy.Module, lm: MeteredLM) -> tuple[str, ...]:
    """What the summary has to say about an evaluation beyond its score.

    Args:
        measured: The evaluation.
        program: What was run.
        lm: Model of every predictor without one.
    """
    from copa_harness.lm.constrained import nothing_to_constrain

    notes: tuple[str, ...] = ()
    if nothing_to_constrain(program, lm):
        notes += (
            f"{measured.evaluation.task}: constrain: no output field of {type(program).__name__} has a list of allowed "
            "values (Literal, enum, bool); answers are generated.",
        )
    if not measured.n_metric_calls:
        return notes
    return (
        *notes,
        f"{measured.evaluation.title}: the metric made {counted(measured.n_metric_calls, 'call')} of a model of its "
        f"own on the {measured.evaluation.split} split; they are paid for and counted, in a phase apart.",
    )
