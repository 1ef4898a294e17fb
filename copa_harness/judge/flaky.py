"""The same examples answered again: k times in a run (is the model flaky?), or long after (is it still the same?).

Symbols: s_ij the score of example i in repeat j, m_i its mean over k repeats, s^2 the mean variance within examples.

The example is what was drawn at random, so intervals and tests are about the means m_i, one per example; their spread
already holds the model's noise, divided by k, so nothing is counted twice and repeats are never taken for new
examples. The split of the variance (a one-way random-effects analysis, Searle 1971) says whether more repeats or more
examples would help:

    Var(mean) = model noise  s^2 / (n k)  +  examples  (Var(m_i) - s^2 / k) / n

Source: Miller 2024, arXiv 2411.00640, section 3.

A canary is an example whose stored answer is asked for again. If the model is what it was, the stored answer s and two
new ones a, b are three draws of one distribution, whatever it is, and any of them may stand in the first place. Two
statistics are summed over rows: d(s, a) + d(s, b), with d = 1 for another answer, + 1 for another score, and
s - (a + b) / 2 of the scores. Each p-value counts the 3^n exchanges that go as far, exactly; the smaller one is
doubled. So a provider that never answers twice alike raises no alarm by that alone, a steady one is found out by four
changed rows, and one that has become erratic by its scores.

An example is stable when it passes every repeat or none; the others are the ones a single run calls right or wrong by
chance. `min_pass_all` is the gate on the share of examples that pass all repeats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from copa_harness.documents import digest_of
from copa_harness.errors import ProviderError
from copa_harness.formatting import counted, number, probability
from copa_harness.judge.explanations import interval_text
from copa_harness.judge.intervals import group_labels, mean_interval, wilson_interval
from copa_harness.judge.paired_tests import scores_by_id
from copa_harness.results import EvaluationResult, ExampleResult, GateResult, Interval, Outcome, Phase, Usage, Verdict

Repeats = Mapping[str, Sequence[float | None]]
"""Scores of an example's repeats, by example id; None where a repeat has no score."""


@dataclass(frozen=True, slots=True)
class RepeatedMean:
    """Mean score of repeated answers, and where its uncertainty comes from.

    Attributes:
        mean: mean over examples of the mean over repeats, 0..1; nan without any.
        interval: around it, over examples.
        n: examples with a score.
        k: repeats per example (the least, where some failed).
        model_error: standard error that comes from the model answering differently each time.
        example_error: standard error that comes from which examples were drawn.
    """

    mean: float
    interval: Interval
    n: int
    k: int
    model_error: float
    example_error: float

    def advice(self) -> str:
        """Whether repeats or examples would make the mean more certain."""
        if self.n < 2 or self.k < 2:
            return "One repeat cannot tell the model's noise from that of the examples; use --copa-repeat=3 or more."
        if self.model_error + self.example_error == 0:
            return "Neither the model nor the examples varied."
        share = self.model_error**2 / (self.model_error**2 + self.example_error**2)
        what = "more repeats would help" if share > 0.5 else "more examples would help, more repeats hardly"
        return f"{100 * share:.0f} % of the variance of the mean is the model's own noise: {what}."


def repeats_of(evaluations: Sequence[EvaluationResult]) -> dict[str, tuple[float | None, ...]]:
    """Scores by example id over several evaluations of the same examples, in the order of the first.

    Raises:
        ValueError: no evaluation, or they are not about the same examples.
    """
    if not evaluations:
        raise ValueError("got no evaluations; expected at least one")
    runs = [scores_by_id(evaluation) for evaluation in evaluations]
    if any(run.keys() != runs[0].keys() for run in runs):
        raise ValueError("got repeats over different examples; expected the same example ids in every repeat")
    return {example_id: tuple(run[example_id] for run in runs) for example_id in runs[0]}


def example_means(repeats: Repeats) -> dict[str, float | None]:
    """Mean score per example over the repeats that have one; None where none has."""
    return {example_id: _mean([s for s in scores if s is not None]) for example_id, scores in repeats.items()}


def repeated_mean(
    repeats: Repeats, *, level: float = 0.95, seed: int = 0, groups: Mapping[str, str] | None = None
) -> RepeatedMean:
    """Mean of repeated answers with an interval over examples, and its two sources of error.

    Args:
        repeats: scores 0..1 by example id.
        level: two-sided confidence.
        seed: of the bootstrap.
        groups: group by example id, where examples share one.
    """
    scored = {key: [s for s in scores if s is not None] for key, scores in repeats.items()}
    scored = {key: scores for key, scores in scored.items() if scores}
    means = [float(_mean(scores) or 0.0) for scores in scored.values()]
    interval = mean_interval(means, level=level, seed=seed, groups=group_labels(list(scored), groups))
    n, k = len(means), min((len(scores) for scores in scored.values()), default=0)
    if n < 2:
        return RepeatedMean(means[0] if means else math.nan, interval, n, k, 0.0, 0.0)
    several = [scores for scores in scored.values() if len(scores) > 1]
    within = float(np.mean([np.var(scores, ddof=1) for scores in several])) if several else 0.0
    noise = float(np.mean([within / len(scores) for scores in scored.values()]))
    between = max(0.0, float(np.var(means, ddof=1)) - noise)
    return RepeatedMean(math.fsum(means) / n, interval, n, k, math.sqrt(noise / n), math.sqrt(between / n))


def merge_repeats(
    evaluations: Sequence[EvaluationResult], *, seed: int = 0, groups: Mapping[str, str] | None = None
) -> EvaluationResult:
    """One evaluation that stands for k: each example's score is its mean over the repeats.

    Gates, baselines and paired comparisons of this evaluation are about examples, with the model's noise inside. An
    example that failed in every repeat has no score; one that failed in some keeps the mean of the others and says so.

    Raises:
        ValueError: no evaluation, or they are not about the same examples.
    """
    repeats = repeats_of(evaluations)
    if len(evaluations) == 1:
        return evaluations[0]
    means = list(example_means(repeats).values())
    by_row = list(zip(*(_in_order(evaluation, list(repeats)) for evaluation in evaluations), strict=True))
    rows = tuple(_merged(row, mean) for row, mean in zip(by_row, means, strict=True))
    return EvaluationResult(
        split=evaluations[0].split,
        lm=evaluations[0].lm,
        results=rows,
        interval=repeated_mean(repeats, seed=seed, groups=groups).interval,
        usage=sum((evaluation.usage for evaluation in evaluations), Usage()),
    )


def _merged(rows: Sequence[ExampleResult], mean: float | None) -> ExampleResult:
    """The row of the worst repeat with the mean score: its answer is the one worth reading."""
    scored = [row for row in rows if row.score is not None]
    requests = digest_of(row.requests for row in rows if row.requests)
    if not scored or mean is None:
        return replace(rows[0], requests=requests)
    worst = min(scored, key=lambda row: row.score if row.score is not None else math.inf)
    lost = len(rows) - len(scored)
    note = f"{lost} of {len(rows)} repeats have no score" if lost else worst.error
    outcome: Outcome = "unparsed" if mean == 0 and worst.outcome == "unparsed" else "ok"
    return replace(worst, score=mean, outcome=outcome, error=note, requests=requests)


def _in_order(evaluation: EvaluationResult, ids: Sequence[str]) -> list[ExampleResult]:
    by_id = dict(zip(scores_by_id(evaluation), evaluation.results, strict=True))
    return [by_id[example_id] for example_id in ids]


def _mean(scores: Sequence[float]) -> float | None:
    return math.fsum(scores) / len(scores) if scores else None


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
    advice: str

    @property
    def pass_all(self) -> float:
        """Share of the examples that passed every repeat, 0..1; 0 without examples."""
        return self.n_pass_all / self.n if self.n else 0.0


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
    return FlakyReport(
        n=len(complete),
        n_incomplete=len(repeats) - len(complete),
        k=k,
        pass_score=pass_score,
        n_pass_all=n_pass_all,
        n_pass_none=sum(count == 0 for count in passed.values()),
        pass_all_interval=wilson_interval(n_pass_all, len(complete)),
        flaky=tuple(flaky),
        advice=repeated_mean(complete).advice(),
    )


def min_pass_all(report: FlakyReport, least: float) -> GateResult:
    """The gate on the share of examples that pass all k repeats; about the number measured, like `min_score`."""
    gate = f"min_pass_all={least:g}"
    details = {
        "pass_all": report.pass_all,
        "n": report.n,
        "k": report.k,
        "low": report.pass_all_interval.low,
        "high": report.pass_all_interval.high,
        "flaky": [row.example_id for row in report.flaky],
        "n_incomplete": report.n_incomplete,
    }
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


# -- canaries

DRIFT_ALPHA = 0.05
"""Error rate of calling something a drift."""


@dataclass(frozen=True, slots=True)
class Canary:
    """One example: its stored result and two new ones, the same where nothing can vary.

    `varying`: phases of calls whose model may answer otherwise when it is asked again, None for those of the program.
    """

    stored: ExampleResult
    new: ExampleResult
    newer: ExampleResult
    varying: Set[Phase | None] = frozenset()

    @property
    def distances(self) -> tuple[int, int, int]:
        """Stored to new, stored to newer, new to newer."""
        return _distance(self.stored, self.new), _distance(self.stored, self.newer), _distance(self.new, self.newer)

    @property
    def ways(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """What it adds to both statistics (scores in hundredths) if each of the three stood in the first place."""
        s_a, s_b, a_b = self.distances
        s, a, b = (round(100 * (result.score or 0.0)) for result in (self.stored, self.new, self.newer))
        return (s_a + s_b, s_a + a_b, s_b + a_b), (2 * s - a - b, 2 * a - s - b, 2 * b - s - a)

    @property
    def is_faulty(self) -> bool:
        """Whether something changed that cannot."""
        is_answer = _said(self.stored) != _said(self.new)
        return self.distances[0] > 0 and not (self.varying - {Phase.METRIC} if is_answer else self.varying)


def _said(result: ExampleResult) -> tuple[object, ...]:
    return result.outcome, result.answer, result.predicted, result.calls


def _distance(one: ExampleResult, other: ExampleResult) -> int:
    return int(_said(one) != _said(other)) + int(one.score != other.score)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Whether stored answers are still what a model answers.

    Attributes:
        model: which.
        n: canaries that have a score each time; `n_unanswered` have none.
        n_changed: those whose new answer or score is not the stored one; of `n_rescored` only the score is another.
        n_unsteady: those whose two new answers or scores differ.
        n_faulty: those that changed though nothing in them can vary.
        score_stored: mean score of the stored answers, 0..1; `score_now` of the new ones.
        p_value: of "the model is what it was"; None where nothing can vary.
        since: date of the oldest stored answer; "" where nobody noted it.
    """

    model: str
    n: int
    n_unanswered: int
    n_changed: int
    n_rescored: int
    n_unsteady: int
    n_faulty: int
    score_stored: float
    score_now: float
    p_value: float | None
    since: str = ""

    @property
    def name(self) -> str:
        """`fault`, `drift`, or "" where neither is shown."""
        is_shown = self.p_value is not None and self.p_value <= DRIFT_ALPHA
        return "fault" if self.n_faulty else "drift" if is_shown else ""

    def text(self) -> str:
        """What was found and what to do, in a few sentences."""
        stored = counted(self.n, "stored answer") + (f" (the oldest of {self.since})" if self.since else "")
        lost = f" {self.n_unanswered} more got no score." if self.n_unanswered else ""
        if not self.n_changed:
            return f"no drift: all of {stored} come out the same when {self.model} is asked again.{lost}"
        found = f"{self.n_changed} of {stored} come out otherwise when {self.model} is asked again"
        scores = f"Mean score of these rows {number(self.score_stored)} stored, {number(self.score_now)} now.{lost}"
        if self.n_faulty:
            return (
                f"FAULT: {found}, {self.n_faulty} of them though nothing in them can vary (weights of this process, "
                f"temperature 0). {scores} Next: if the cache comes from another machine or device, begin one here "
                f"(--copa-cache-dir); if not, program or metric are no function of the example, or the model is faulty."
            )
        assert self.p_value is not None
        found += f"; between two askings now {self.n_unsteady} differ ({probability(self.p_value)})"
        if not self.name:
            return f"no drift is shown: {found}. {scores}"
        whose = " Only scores changed, no answers: it is a model that the metric asks."
        return (
            f"DRIFT: {found}.{whose if self.n_rescored == self.n_changed else ''} {scores} Stored and accepted answers "
            f"are no longer this model's, so whatever compares new ones with them measures the provider too. Next: "
            f"measure both sides anew (another --copa-cache-dir, then --copa-bless), or name a dated version of the "
            f"model."
        )


def drift_of(canaries: Sequence[Canary], *, model: str, since: str = "") -> Drift:
    """What canaries show.

    Args:
        canaries: independent examples.
        model: what was asked.
        since: date of the oldest stored answer.

    Raises:
        ProviderError: none of them has a score each time.
    """
    scored = [one for one in canaries if None not in (one.stored.score, one.new.score, one.newer.score)]
    if not scored:
        raise ProviderError(f"none of {len(canaries)} rows got a score; the first: {canaries[0].new.error}")
    changed = [one for one in scored if one.distances[0]]
    ways = [one.ways for one in scored if one.varying]
    return Drift(
        model=model,
        n=len(scored),
        n_unanswered=len(canaries) - len(scored),
        n_changed=len(changed),
        n_rescored=sum(_said(one.stored) == _said(one.new) for one in changed),
        n_unsteady=sum(one.distances[2] > 0 for one in scored),
        n_faulty=sum(one.is_faulty for one in scored),
        score_stored=math.fsum(one.stored.score or 0.0 for one in scored) / len(scored),
        score_now=math.fsum((one.new.score or 0.0) + (one.newer.score or 0.0) for one in scored) / (2 * len(scored)),
        p_value=min(1.0, 2 * min(map(exchange_p_value, zip(*ways, strict=True)))) if ways else None,
        since=since,
    )


def exchange_p_value(ways: Sequence[tuple[int, int, int]]) -> float:
    """P-value of "the first of three is drawn like the other two": how often chance puts the total as far from 0.

    Args:
        ways: by row, what it adds to the total if the first, the second or the third stood in the first place.
    """
    span = sum(max(map(abs, three)) for three in ways)
    chances = np.zeros(2 * span + 1)
    chances[span] = 1.0
    for three in ways:
        chances = np.mean([np.roll(chances, way) for way in three], axis=0)
    observed = abs(sum(three[0] for three in ways))
    return min(1.0, float(chances[np.abs(np.arange(-span, span + 1)) >= observed].sum()))
