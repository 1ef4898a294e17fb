"""What people say of some answers, beside a metric that scores all of them (a model that judges, say).

Symbols: n answers, f_i the metric's score of answer i; m of them rated by people at y_i; L the rated rows, U the
others; lam a weight.

    theta = mean_L(y) + lam (mean_U(f) - mean_L(f))                              prediction-powered mean of y

It is unbiased for every lam if the rated rows are a random sample, however wrong the metric is; lam is the weight with
the least variance, Cov_L(y, f) / ((1 + m / (n - m)) Var(f)), cut to 0..1. A paired difference of two runs is the same
of d = f_after - f_before and h = y_after - y_before. The standard error is that of the row's (or group's) influences

    rated  (y_i - lam f_i - mean_L) / m          others  lam (f_i - mean_U) / (n - m)

and the interval Student's, with the rated rows less one: approximate. Two made-up rows, which the metric rates as far
too high and too low as the worst of all rated ones (of right/wrong scores by 1), keep it from claiming a perfect metric
after a few that agree. Measured: a 95 % interval covers .93 to 1.00, and .89 where 30 are rated of which one in 20
fails altogether.

Source: Angelopoulos, Duchi & Zrnic (2023), "PPI++: Efficient prediction-powered inference", arXiv 2311.01453.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from copa_harness.formatting import counted, number
from copa_harness.judge.explanations import interval_text
from copa_harness.judge.intervals import group_labels, grouped, wilson_interval
from copa_harness.judge.paired_tests import GATE_LEVEL, is_right_wrong
from copa_harness.results import Interval

MIN_RATED = 15
"""Rated rows, or groups of them, below which there is no interval."""

Scores = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Corrected:
    """A mean by people's scores, with its interval, and how many rows were rated."""

    mean: float
    interval: Interval
    n_rated: int

    def text(self, *, signed: bool = False) -> str:
        """`0.780 (95 % interval 0.701 to 0.859)`."""
        return f"{number(self.mean, signed=signed)} ({interval_text(self.interval, signed=signed)})"


@dataclass(frozen=True, slots=True)
class HumanScores:
    """A run by people's scores.

    Attributes:
        n: answers with a score of the metric.
        n_rated: those that people rated.
        agreement: around the share of the rated ones on which both agree; None for graded scores.
        distance: mean absolute difference of the two scores of an answer.
        kinder: how much higher the metric rates, on average.
        score: the mean by people's scores; None where too few are rated.
        difference: to the accepted result; None without one, or where too few are rated on both sides.
    """

    n: int
    n_rated: int
    agreement: Interval | None
    distance: float
    kinder: float
    score: Corrected | None
    difference: Corrected | None

    def sentence(self) -> str:
        """How far metric and people agree, and what people would say of the run."""
        if not self.n_rated:
            return "nobody rated any of the answers (Task(human=...)), so nothing says what the metric is worth"
        said = f"people rated {self.n_rated} of {counted(self.n, 'answer')}: metric and people "
        if self.agreement is None:
            said += f"differ by {number(self.distance)} on average"
        else:
            said += f"agree on {number(1 - self.distance)} of them ({interval_text(self.agreement)})"
        if self.kinder:
            said += f"; the metric is {'kinder' if self.kinder > 0 else 'stricter'} by {number(abs(self.kinder))}"
        if self.score is None:
            return f"{said}; {MIN_RATED} rated answers, drawn at random, would tell the score by people"
        said += f". By people's scores: {self.score.text()}"
        if (change := self.difference) is not None:
            said += f", {change.text(signed=True)} against the accepted result ({change.n_rated} rated on both sides)"
        return f"{said}; prediction-powered, approximate, of answers rated at random"


def human_scores(
    metric: Scores,
    human: Mapping[str, float],
    *,
    before: tuple[Scores, Mapping[str, float]] | None = None,
    groups: Mapping[str, str] | None = None,
) -> HumanScores:
    """People's scores of a run, beside the metric's.

    Args:
        metric: the metric's score by example id.
        human: people's score of the same answers, where somebody rated them.
        before: both of the accepted result, if there is one that can be compared with.
        groups: group by example id, where examples share one.
    """
    judged = {key: score for key, score in metric.items() if score is not None}
    both = np.array([(judged[key], human[key]) for key in judged if key in human]).reshape(-1, 2)
    away, difference = both[:, 0] - both[:, 1], None
    if before is not None:
        change = {key: judged[key] - old for key, old in before[0].items() if old is not None and key in judged}
        by_people = {key: human[key] - old for key, old in before[1].items() if key in human}
        difference = corrected_mean(change, by_people, level=GATE_LEVEL, least=-1.0, groups=groups)
    return HumanScores(
        n=len(judged),
        n_rated=len(both),
        agreement=wilson_interval(int((away == 0).sum()), len(both)) if is_right_wrong(both) else None,
        distance=float(np.abs(away).mean()) if len(both) else math.nan,
        kinder=float(away.mean()) if len(both) else math.nan,
        score=corrected_mean(judged, human, level=0.95, groups=groups),
        difference=difference,
    )


def corrected_mean(
    metric: Mapping[str, float],
    human: Mapping[str, float],
    *,
    level: float,
    least: float = 0.0,
    groups: Mapping[str, str] | None = None,
) -> Corrected | None:
    """The mean of people's numbers over all rows; None where too few are rated.

    Args:
        metric: a number by example id.
        human: people's number for some of them.
        level: two-sided confidence.
        least: the least value there is.
        groups: group by example id, where examples share one.
    """
    from scipy import stats

    ids = sorted(metric)
    labels = group_labels(ids, groups) or ids
    f = np.array([metric[key] for key in ids], dtype=np.float64)
    y = np.array([human.get(key, math.nan) for key in ids], dtype=np.float64)
    rated = np.isfinite(y)
    n_rated, n_others = int(rated.sum()), int((~rated).sum())
    n_units = len({label for label, is_rated in zip(labels, rated, strict=True) if is_rated})
    if n_units < MIN_RATED:
        return None
    weight = 0.0
    if n_others and (spread := float(f.var())) > 0:
        weight = float(np.cov(y[rated], f[rated])[0, 1]) / ((1 + n_rated / n_others) * spread)
        weight = min(1.0, max(0.0, weight))
    rest = y - weight * f
    mean, influences = float(rest[rated].mean()), np.zeros(len(ids))
    influences[rated] = (rest[rated] - mean) / n_rated
    if n_others:
        influences[~rated] = weight * (f[~rated] - f[~rated].mean()) / n_others
        mean += weight * float(f[~rated].mean())
    variance = float((grouped(influences, labels).totals ** 2).sum()) * n_units / (n_units - 1)
    is_whole = set(np.concatenate([f, y[rated]]).tolist()) <= {-1.0, 0.0, 1.0}
    variance += 2 * (1 / n_rated if is_whole else float(np.abs(influences[rated]).max())) ** 2
    half = float(stats.t.ppf(0.5 + level / 2, n_units - 1)) * math.sqrt(variance)
    low, high = max(least, mean - half), min(1.0, mean + half)
    return Corrected(mean, Interval(low, high, level, "prediction-powered"), n_rated)
