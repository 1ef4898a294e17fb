"""Flaky model or flaky test? Per-example pass rates over k repeats, and a gate on the share that passes them all.

An example is stable when it passes every repeat or none; the others are the ones a single run calls right or wrong by
chance. Pure functions of scores; knows nothing of models, files or pytest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from copa_harness.judge.intervals import wilson_interval
from copa_harness.judge.messages import counted, interval_text, number
from copa_harness.judge.repeats import Repeats, repeated_mean
from copa_harness.results import GateResult, Interval, Verdict


@dataclass(frozen=True, slots=True)
class FlakyExample:
    """An example that passed some repeats and failed others."""

    example_id: str
    n_passed: int
    k: int
    scores: tuple[float, ...]

    @property
    def pass_rate(self) -> float:
        """Share of the repeats passed, 0..1."""
        return self.n_passed / self.k


@dataclass(frozen=True, slots=True)
class FlakyReport:
    """Stability of a run's answers.

    Attributes:
        n: examples all of whose repeats have a score.
        n_incomplete: examples left out because a repeat has no score.
        k: repeats per example.
        pass_score: least score that counts as passed.
        n_pass_all: examples that passed every repeat.
        n_pass_none: examples that passed no repeat.
        pass_all_interval: around the share that passes every repeat.
        flaky: the others, nearest to a coin flip first.
        model_error: standard error of the mean score from the model's noise alone.
        example_error: the same from the choice of examples.
        advice: whether repeats or examples would help.
    """

    n: int
    n_incomplete: int
    k: int
    pass_score: float
    n_pass_all: int
    n_pass_none: int
    pass_all_interval: Interval
    flaky: tuple[FlakyExample, ...]
    model_error: float
    example_error: float
    advice: str

    @property
    def pass_all(self) -> float:
        """Share of the examples that passed every repeat, 0..1; 0 without examples."""
        return self.n_pass_all / self.n if self.n else 0.0

    def text(self, *, n_shown: int = 10) -> str:
        """Lines for a terminal: the shares, what to do, and the most unstable examples."""
        lines = [
            f"{counted(self.n, 'example')}, {self.k} repeats each: {self.n_pass_all} passed all, "
            f"{self.n_pass_none} passed none, {len(self.flaky)} passed some. {self.advice}"
        ]
        lines += [f"  {row.example_id}  passed {row.n_passed} of {row.k}" for row in self.flaky[:n_shown]]
        if len(self.flaky) > n_shown:
            lines.append(f"  and {len(self.flaky) - n_shown} more")
        return "\n".join(lines)


def flaky_report(repeats: Repeats, *, pass_score: float = 1.0) -> FlakyReport:
    """How stable the answers are.

    Args:
        repeats: scores 0..1 by example id, the same number of repeats for every example.
        pass_score: least score that counts as passed, 0..1.

    Raises:
        ValueError: unequal numbers of repeats, or none.
    """
    counts = {len(scores) for scores in repeats.values()}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"got {sorted(counts)} repeats per example; expected the same number, at least 1, for all")
    complete = {
        example_id: tuple(score for score in scores if score is not None)
        for example_id, scores in repeats.items()
        if all(score is not None for score in scores)
    }
    k = counts.pop() if counts else 0
    passed = {key: sum(score >= pass_score for score in scores) for key, scores in complete.items()}
    flaky = [FlakyExample(key, count, k, complete[key]) for key, count in passed.items() if 0 < count < k]
    flaky.sort(key=lambda row: (abs(2 * row.n_passed - row.k), row.example_id))
    n_pass_all = sum(count == k for count in passed.values())
    spread = repeated_mean(complete)
    return FlakyReport(
        n=len(complete),
        n_incomplete=len(repeats) - len(complete),
        k=k,
        pass_score=pass_score,
        n_pass_all=n_pass_all,
        n_pass_none=sum(count == 0 for count in passed.values()),
        pass_all_interval=wilson_interval(n_pass_all, len(complete)),
        flaky=tuple(flaky),
        model_error=spread.model_error,
        example_error=spread.example_error,
        advice=spread.advice(),
    )


def min_pass_all(report: FlakyReport, least: float) -> GateResult:
    """The gate on the share of examples that pass all k repeats; about the number measured, like `min_score`."""
    gate = f"min_pass_all={least:g}"
    details = {
        "pass_all": report.pass_all, "n": report.n, "k": report.k, "low": report.pass_all_interval.low,
        "high": report.pass_all_interval.high, "flaky": [row.example_id for row in report.flaky],
        "n_incomplete": report.n_incomplete,
    }  # fmt: skip
    if report.k < 2 or not report.n:
        message = (
            f"{report.k} repeat(s) of {counted(report.n, 'complete example')} cannot show stability. Next: run with "
            f"--copa-repeat=3 or more."
        )
        return GateResult(gate, Verdict.UNDECIDED, message, details)
    measured = (
        f"{report.n_pass_all} of {counted(report.n, 'example')} passed all {report.k} repeats "
        f"({interval_text(report.pass_all_interval)})"
    )
    if report.n_incomplete:
        measured += f", {counted(report.n_incomplete, 'example')} left out for a repeat without score"
    if report.pass_all >= least - 1e-9:
        return GateResult(gate, Verdict.PASS, f"got {number(report.pass_all)}: {measured}.", details)
    message = (
        f"got {number(report.pass_all)}, expected at least {least:g}: {measured}; {len(report.flaky)} passed some "
        f"repeats only ({_named(report.flaky)}). Next: look at those; lower the temperature if answers need not vary, "
        f"add demonstrations like them, or check whether the metric itself is at fault."
    )
    return GateResult(gate, Verdict.FAIL, message, details)


def _named(flaky: Sequence[FlakyExample], *, n_shown: int = 3) -> str:
    names = [f"{row.example_id}: {row.n_passed} of {row.k}" for row in flaky[:n_shown]]
    return ", ".join(names) + (", ..." if len(flaky) > n_shown else "") if names else "none"
