"""What a copa test holds in its hands: a score that explains itself, an evaluation, and a finished run.

A `Score` is a float, so plain `assert run.score >= 0.85` works; the pytest plugin asks it for its meaning when such an
assertion fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copa_harness.formatting import number
from copa_harness.judge.explanations import format_failure, score_line
from copa_harness.judge.gates import is_failure, overall
from copa_harness.results import (
    Budget,
    EvaluationResult,
    ExampleResult,
    GateResult,
    PhaseRecord,
    Usage,
    Verdict,
)

if TYPE_CHECKING:
    import dspy

    from copa_harness.judge.attribution import Attribution
    from copa_harness.judge.sequential.stopping import SequentialAnswer
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.report.records import RunRecord

DEFERRED = "deferred"
"""Key in a gate's details: it is judged when the session ends."""


def is_deferred(gate: GateResult) -> bool:
    """Whether a gate is left open until the session ends."""
    return bool(gate.details.get(DEFERRED))


class Score(float):
    """A mean score, 0..1, that remembers the evaluation it is the mean of."""

    evaluation: ScoredEvaluation | None

    def __new__(cls, value: float, evaluation: ScoredEvaluation | None = None) -> Score:
        """A score, with the evaluation behind it if there is one."""
        score = super().__new__(cls, value)
        score.evaluation = evaluation
        return score

    def summary(self) -> str:
        """What the number means, in one line; just the number when nothing more is known."""
        return self.evaluation.summary() if self.evaluation is not None else f"score {float(self):.3f}"


@dataclass(frozen=True, slots=True, repr=False)
class ScoredEvaluation(EvaluationResult):
    """An `EvaluationResult` that knows what was evaluated, so that it can be described."""

    task: str = ""
    strategy: str = "none"

    @classmethod
    def of(cls, result: EvaluationResult, *, task: str, strategy: str) -> ScoredEvaluation:
        """The same result with the task's name and the strategy that made the program."""
        values = {entry.name: getattr(result, entry.name) for entry in fields(EvaluationResult)}
        return cls(**values, task=task, strategy=strategy)

    @property
    def score(self) -> Score:
        """Mean score, 0..1; nan when no example has a score."""
        scores = self.scores
        return Score(sum(scores) / len(scores) if scores else float("nan"), self)

    @property
    def title(self) -> str:
        """`iris, p -> w -> p`."""
        return ", ".join(part for part in (self.task, self.strategy) if part)

    def __repr__(self) -> str:
        return f"<ScoredEvaluation {self.summary()}>"

    def summary(self) -> str:
        """`iris, p -> w -> p: score 0.893 on 75 test examples (95 % interval 0.803 to 0.945)`."""
        return f"{self.title}: {score_line(self)}"

    def describe(self) -> str:
        """The score and what it means, and the worst examples; shown beside a failed test."""
        return format_failure(self, title=self.title)


@dataclass(slots=True, eq=False, repr=False)
class CopaRun:
    """One optimization run and its final evaluation: what the report says of it, and what a test can go on with.

    Attributes:
        record: What the report says; most of it can be asked for here.
        evaluation: The optimized program on the test split; the only look at it.
        baseline: The program as written, base model, on the same split.
        program: The optimized program, its model attached.
        lm: The model it runs on, the fine-tuned one if weights were trained.
        from_disk: The optimization was found finished on disk and not run again.
        undecided_fails: Whether `check()` fails on gates that are undecided or not comparable.
        checked: Whether the test called `check()`.
        judge_again: Answers gates that `check()` is given, and tells what was spent on it.
    """

    record: RunRecord
    evaluation: ScoredEvaluation
    baseline: ScoredEvaluation
    program: dspy.Module
    lm: MeteredLM
    from_disk: bool = False
    undecided_fails: bool = False
    checked: bool = False
    judge_again: Callable[[Mapping[str, Any]], tuple[tuple[GateResult, ...], tuple[PhaseRecord, ...]]] | None = None

    @property
    def task(self) -> str:
        """The task's name."""
        return self.record.task

    @property
    def strategy(self) -> str:
        """How weights and prompts were searched."""
        return self.record.strategy

    @property
    def usage(self) -> Usage:
        """What the optimization spent in this session, without the final evaluation.

        `usage.calls` never exceeds `budget.calls`. A run found on disk spends nothing.
        """
        return self.record.search_usage

    @property
    def budget(self) -> Budget:
        """Ceiling of the optimization."""
        return self.record.budget

    @property
    def phases(self) -> tuple[PhaseRecord, ...]:
        """What each phase spent and what it did to the validation score; the final evaluation comes after these."""
        return self.record.phases

    @property
    def gates(self) -> tuple[GateResult, ...]:
        """The answers of the marker's gates, or of those `check()` was given."""
        return self.record.gates

    @property
    def verdict(self) -> Verdict:
        """All gates together."""
        return self.record.verdict

    @property
    def artifact(self) -> Path | None:
        """Directory with program, LoRA adapter and manifest."""
        return Path(self.record.artifact) if self.record.artifact else None

    @property
    def exhausted(self) -> bool:
        """Whether the budget ended the search; the program is the best found until then."""
        return self.record.optimization is not None and self.record.optimization.exhausted

    @property
    def stopped(self) -> str:
        """Why the search ended."""
        return "" if self.record.optimization is None else self.record.optimization.stopped

    @property
    def repeats(self) -> Mapping[str, Sequence[float | None]]:
        """Scores of every repeat by example id; empty unless examples were answered several times."""
        return self.record.repeats

    @property
    def sequential(self) -> SequentialAnswer | None:
        """What stopping early saved and cost; None when all examples were evaluated."""
        return self.record.sequential

    @property
    def attribution(self) -> Attribution | None:
        """What weights and prompts gained, alone and together; None unless the strategy searched both."""
        return self.record.attribution

    @property
    def score(self) -> Score:
        """Mean test score, 0..1."""
        return self.evaluation.score

    @property
    def interval(self) -> tuple[float, float]:
        """The two ends of the 95 % interval of the score."""
        return (self.evaluation.interval.low, self.evaluation.interval.high)

    @property
    def n(self) -> int:
        """Test examples."""
        return self.evaluation.n

    @property
    def completed(self) -> bool:
        """Whether every test example has a score (a spent budget still leaves the best program found)."""
        return self.evaluation.n_failed == 0

    @property
    def improvement(self) -> float:
        """Score minus the score of the program as written, -1..1."""
        return float(self.score) - float(self.baseline.score)

    @property
    def verdict_so_far(self) -> Verdict:
        """The verdict without gates that are left open until the session ends."""
        return overall(gate for gate in self.gates if not is_deferred(gate))

    def __repr__(self) -> str:
        return f"<CopaRun {self.evaluation.summary()}>"

    def worst(self, k: int = 3) -> tuple[ExampleResult, ...]:
        """The `k` worst test examples."""
        return self.evaluation.worst(k)

    def check(self, **gates: Any) -> None:
        """Hold the run to its gates.

        An undecided gate does not fail unless the marker says so: too few examples are not a regression. It
        stands in the summary.

        Args:
            **gates: Gates beside the marker's, or instead of them where both name one: `min_score=0.8`.

        Raises:
            AssertionError: A gate failed; the message says which, by how much, and shows the worst examples.
            ConfigurationError: No such gate, or no such value.
        """
        __tracebackhide__ = True
        self.checked = True
        if gates and self.judge_again is not None:
            answers, spent = self.judge_again(gates)
            phases = (*self.record.phases, *spent)
            self.record = replace(self.record, gates=answers, verdict=overall(answers), phases=phases)
            self.undecided_fails = gates.get("undecided_fails", self.undecided_fails)
        if is_failure(self.verdict_so_far, undecided_fails=self.undecided_fails):
            raise AssertionError(self.describe())

    def describe(self) -> str:
        """What was measured, what it cost and the worst examples; shown beside a failed test."""
        ceiling = f"{self.budget.calls:,.0f}" if self.budget.calls != float("inf") else "any number of"
        hints = []
        if self.strategy != "none":
            change = f"{number(self.improvement, signed=True)} against it"
            hints.append(f"the program as written scored {number(self.baseline.score)}; this one is {change}")
            n_used = 0 if self.record.optimization is None else self.record.optimization.charged_calls
            hints.append(
                f"optimization used {n_used:,} of {ceiling} calls (budget {self.budget.name}) and paid "
                f"{self.usage.paid_calls:,} of them here, {self.usage.train_steps:,} training steps, "
                f"{self.usage.wall_s:.1f} s" + ("; it was found finished on disk" if self.from_disk else "")
            )
        if self.exhausted:
            hints.append("the budget ended the search; this is the best program found until then")
        if self.sequential is not None:
            hints.append(self.sequential.text())
        if self.attribution is not None:
            hints.append(self.attribution.sentence())
        if self.artifact is not None:
            hints.append(f"artifact: {self.artifact}")
        return format_failure(self.evaluation, self.gates, title=self.evaluation.title, hints=hints)
