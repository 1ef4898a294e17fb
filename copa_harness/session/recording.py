"""The end of a run: the optimized program measured on the test split, judged, attributed and recorded.

The one place where the test split meets an optimized program.

What is noted of every evaluation: its record, and what the session's end has to say about it beyond that.

Entries become rows of plain JSON types, so that the processes of one session can hand them to the one that reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from copa_harness.errors import BudgetExhausted, ConfigurationError, CopaError
from copa_harness.judge.gates import is_failure, overall
from copa_harness.results import GateResult, PhaseRecord, Usage, Verdict
from copa_harness.session.evaluation import Measured, attributed, groups_of, leakage_of, measure, searches_both
from copa_harness.session.finish import candidate, to_row
from copa_harness.session.gates import ON_SCORES, Case, Memory, baseline_name
from copa_harness.session.optimizations import Optimized, fingerprints_of
from copa_harness.session.runs import CopaRun, ScoredEvaluation
from copa_harness.session.settings import Settings, check_gates
from copa_harness.wording import counted

if TYPE_CHECKING:
    import dspy

    from copa_harness.judge.attribution import Attribution
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.optimize.result import OptimizationResult
    from copa_harness.report.records import RunRecord
    from copa_harness.session.runs import CopaRun
    from copa_harness.store.baselines import Baseline
    from copa_harness.tasks.task import Task


@dataclass(frozen=True, slots=True)
class Entry:
    """One evaluation.

    Attributes:
        record: For the report.
        run: The run it belongs to, if any; gates that its test asked for later are its.
        baseline: What it becomes if the session is blessed.
        failures: Attempts at a call that failed, by kind: how many and the first traceback.
        notes: Sentences for the summary.
        cut_short: The session's ceilings ended it; it has no score.
        standing: What other runs need to compare themselves with it: `key` (task and base model), `fingerprints` and
            `groups`; empty unless it is a whole test split of a named strategy.
    """

    record: RunRecord
    run: CopaRun | None = None
    baseline: Baseline | None = None
    failures: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    cut_short: bool = False
    standing: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """As plain JSON types."""
        run, record = self.run, self.record
        if run is not None and run.gates != record.gates:
            record = replace(record, gates=run.gates, verdict=run.verdict)
        failed = run is not None and is_failure(run.verdict_so_far, undecided_fails=run.undecided_fails)
        return {
            "test": record.test,
            "record": record.to_json(),
            "unchecked": failed and run is not None and not run.checked,
            "baseline": to_row(self.baseline),
            "failures": {kind: list(counted) for kind, counted in self.failures.items()},
            "notes": list(self.notes),
            "cut_short": self.cut_short,
            "standing": dict(self.standing),
            "checked": run is not None and run.checked,
            "undecided_fails": run is not None and run.undecided_fails,
        }


def record_of(
    measured: Measured,
    *,
    test: str,
    model: str,
    settings: Settings,
    optimized: Optimized | None = None,
    gates: tuple[GateResult, ...] = (),
    phases: tuple[PhaseRecord, ...] = (),
    **more: Any,
) -> RunRecord:
    """The record of an evaluation with the optimization that led to it; its cost is then told.

    Args:
        measured: The evaluation.
        test: Id of the test that asked.
        model: Name of the base model.
        settings: In force for this run.
        optimized: What led to the program, if anything.
        gates: Their answers.
        phases: What was spent beyond optimization and evaluation.
        **more: Further attributes of the record.
    """
    from copa_harness.report.records import RunRecord

    evaluation = measured.evaluation
    phases = (*(optimized.phases() if optimized else ()), *measured.phases, *phases)
    if optimized is not None:
        optimized.told = True
        more |= {
            "artifact": str(optimized.artifact.absolute()),
            "budget": settings.budget,
            "validation_before": optimized.result.score_before,
            "validation_after": optimized.result.score_after,
            "stopped": optimized.result.stopped,
            "exhausted": optimized.result.exhausted,
            "credit": optimized.result.credit,
            "learned": optimized.result.learned,
            "front": optimized.result.front,
            "notes": optimized.result.notes,
            "search": search_of(optimized.result),
            "evidence": optimized.result.evidence,
        }
    return RunRecord.from_evaluation(
        evaluation,
        test=test,
        task=evaluation.task,
        strategy=evaluation.strategy,
        lm=model,
        split=evaluation.split,
        gates=gates,
        usage=sum((phase.usage for phase in phases), Usage()),
        phases=phases,
        seed=settings.seed,
        repeats=measured.repeats,
        **more,
    )


def search_of(result: OptimizationResult) -> dict[str, Any]:
    """Why an optimization ended, for the report; empty when there was nothing to search."""
    if not result.phases:
        return {}
    return {
        "reason": result.reason or result.stopped,
        "n_trials": result.n_trials,
        "calls": result.charged_calls,
    }


def shown_as(lm: MeteredLM) -> dict[str, str]:
    """What tables call a model, where its name alone does not say how it answers."""
    return {"label": f"{lm.model}, constrained"} if lm.constrain else {}


def cut_short_record(
    reason: str,
    *,
    test: str,
    task: str,
    strategy: str,
    model: str,
    split: str,
    n_expected: int,
    settings: Settings,
    phases: tuple[PhaseRecord, ...] = (),
) -> RunRecord:
    """The record of an evaluation that the session's ceilings ended: no score, and nothing passed or failed.

    Args:
        reason: What was refused.
        test: Id of the test that asked.
        task: The task's name.
        strategy: How the program was to be made.
        model: Name of the base model.
        split: The split.
        n_expected: Its examples.
        settings: In force for this run.
        phases: What was paid for all the same.
    """
    from copa_harness.report.records import RunRecord

    gate = GateResult(
        "completed",
        Verdict.UNDECIDED,
        f"budget exhausted: {reason}. There is no score to judge. Next: raise --copa-total-budget and run again; what "
        f"was answered is cached and free.",
        {"n": 0, "n_expected": n_expected},
    )
    return RunRecord.from_evaluation(
        None,
        test=test,
        task=task,
        strategy=strategy,
        lm=model,
        split=split,
        gates=(gate,),
        usage=sum((phase.usage for phase in phases), Usage()),
        phases=phases,
        budget=settings.budget,
        seed=settings.seed,
        stopped="budget",
        exhausted=True,
    )


def final_entry(
    task: Task,
    optimized: Optimized,
    *,
    base: MeteredLM,
    settings: Settings,
    memory: Memory,
    test: str,
) -> Entry:
    """Measure an optimized program on the test split, hold it to its gates and record it.

    Args:
        task: What to measure on.
        optimized: The program, its model, and how it was found.
        base: The base model.
        settings: In force for this run, its gates among them.
        memory: Earlier runs of the session; this one is added if it is complete.
        test: Id of the test that asked.

    Raises:
        BudgetExhausted: The ceilings of the whole session cut the evaluation short.
        ArtifactError: A baseline file is damaged, or the evaluation cannot become one.
    """
    from copa_harness.evaluate.examples import example_ids

    result, gates = optimized.result, settings.gates
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
        check_gates(asked, where="copa_run.check()")
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
