"""What is noted of every evaluation: its record, and what the session's end has to say about it beyond that.

Entries become rows of plain JSON types, so that the processes of one session can hand them to the one that reports.
Knows nothing of how anything was measured, and nothing of pytest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from copa_harness.judge.gates import is_failure
from copa_harness.results import GateResult, PhaseRecord, Usage, Verdict
from copa_harness.session.blessing import to_row
from copa_harness.session.measuring import Measured
from copa_harness.session.optimizations import Optimized
from copa_harness.session.settings import Settings

if TYPE_CHECKING:
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.optimize.outcome import OptimizationResult
    from copa_harness.report.records import RunRecord
    from copa_harness.session.runs import CopaRun
    from copa_harness.store.baselines import Baseline


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
        "reason": result.reason or result.stopped, "n_trials": result.n_trials, "calls": result.charged_calls,
    }  # fmt: skip


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
