"""Has the score dropped by more than a margin? Three answers: pass, fail, undecided.

Symbols: delta = true mean difference (new - baseline), m = margin >= 0 (`max_regression`), alpha = error rate of each
one-sided test, d = variance of one example's difference (for right/wrong about the share that disagrees).

    pass       "delta <= -m" is refuted: the drop, if any, is smaller than the margin
    fail       "delta >= -m" is refuted: the drop is larger than the margin
    undecided  neither: the rows needed and the smallest drop these rows could have shown are stated

So an unchanged program fails with probability at most alpha (a failure also needs the exact test of "nothing
changed" to refute it), and a real drop of m passes with probability about alpha. Which error is worse is the
reader's to weigh; neither is hidden in a two-way answer. Right/wrong: Tango's score test against the margin and
the exact McNemar test at 0. Graded: paired permutation of d_i + m and the bootstrap bound. (Size at alpha = .05, by
enumeration for right/wrong, n = 30..200, m = .02, .05, .10: a drop of exactly m passes in at most 5.8 % of runs.)

Formulas of n and power: Connor (1987), Biometrics 43:207, for paired shares. Knows nothing of files or gates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from copa_harness.judge.intervals import MIN_DISTINCT_ROWS
from copa_harness.judge.paired import (
    PairedDifference,
    Pairs,
    difference_interval,
    gained_and_lost,
    is_right_wrong,
    mcnemar_p_value,
    paired_difference,
    permutation_p_value,
    tango_statistic,
)
from copa_harness.results import Verdict

POWER = 0.8
"""Probability with which "would decide it" and "could have seen" are meant."""

MANY_ROWS = 1_000_000
"""Beyond this, "no number of rows one would collect"."""


@dataclass(frozen=True, slots=True)
class Noninferiority:
    """The answer and what it rests on.

    Attributes:
        verdict: PASS, FAIL or UNDECIDED.
        paired: the difference with its interval.
        margin: the drop that is allowed, 0..1.
        p_not_worse: p-value of "the drop is the margin or more"; small means pass.
        p_worse: p-value of "the drop is at most the margin"; small means fail.
        p_any_drop: one-sided p-value of "it did not drop at all".
        rows_to_decide: rows at which this difference, if it is real, is decided with 80 % power; None when no
            reasonable number is enough (the difference sits on the margin) or nothing is open.
        smallest_visible_drop: the smallest true drop these rows would fail with 80 % power; infinite when none would.
    """

    verdict: Verdict
    paired: PairedDifference
    margin: float
    p_not_worse: float
    p_worse: float
    p_any_drop: float
    rows_to_decide: int | None
    smallest_visible_drop: float


def noninferiority(pairs: Pairs, *, margin: float, alpha: float = 0.05, seed: int = 0) -> Noninferiority:
    """Judge a drop against a margin.

    Args:
        pairs: baseline (`before`) and new (`after`) scores of the same examples.
        margin: the largest drop that is acceptable, 0..1.
        alpha: error rate of either decision.
        seed: of the resampling methods.

    Raises:
        ValueError: for a margin outside 0..1 or no pairs.
    """
    if not 0 <= margin <= 1:
        raise ValueError(f"got margin={margin}; expected a drop between 0 and 1, such as 0.05")
    if not pairs.ids:
        raise ValueError("got no examples in common; expected at least one paired example")
    paired = paired_difference(pairs.before, pairs.after, ids=pairs.ids, seed=seed)
    old, new = np.asarray(pairs.before, dtype=np.float64), np.asarray(pairs.after, dtype=np.float64)
    binary = is_right_wrong(old) and is_right_wrong(new)
    p_not_worse, p_worse, p_any_drop = _one_sided(new - old, margin=margin, binary=binary, alpha=alpha, seed=seed)
    if p_worse <= alpha and p_any_drop <= alpha:
        verdict = Verdict.FAIL
    elif p_not_worse <= alpha:
        verdict = Verdict.PASS
    else:
        verdict = Verdict.UNDECIDED
    variance, right_wrong = row_variance(new - old, binary=binary)
    noise = {"margin": margin, "variance": variance, "alpha": alpha}
    rows = None
    if verdict is Verdict.UNDECIDED:
        rows = rows_to_decide(paired.difference, right_wrong=right_wrong, **noise)
        rows = None if rows is None else max(rows, paired.n + 1)
    return Noninferiority(
        verdict=verdict,
        paired=paired,
        margin=margin,
        p_not_worse=p_not_worse,
        p_worse=p_worse,
        p_any_drop=p_any_drop,
        rows_to_decide=rows,
        smallest_visible_drop=smallest_visible_drop(paired.n, right_wrong=right_wrong, **noise),
    )


def _one_sided(
    differences: NDArray[np.float64], *, margin: float, binary: bool, alpha: float, seed: int
) -> tuple[float, float, float]:
    """P-values of "dropped by the margin or more", "dropped by at most the margin", "did not drop"."""
    from scipy import stats

    gained, lost = gained_and_lost(differences)
    n_moved = int((differences != 0).sum())
    if binary:
        p_any_drop = mcnemar_p_value(round(gained), round(lost), alternative="less")
        if margin == 0:
            return mcnemar_p_value(round(gained), round(lost), alternative="greater"), p_any_drop, p_any_drop
    else:
        p_any_drop = permutation_p_value(differences, alternative="less", seed=seed)
        if margin == 0:
            return permutation_p_value(differences, alternative="greater", seed=seed), p_any_drop, p_any_drop
    bound = difference_interval(differences, binary=binary, level=1 - 2 * alpha, seed=seed)
    if bound.method != "bca":
        statistic = tango_statistic(gained, lost, differences.size, difference=-margin)
        return float(stats.norm.sf(statistic)), float(stats.norm.cdf(statistic)), p_any_drop
    p_not_worse = permutation_p_value(differences + margin, alternative="greater", seed=seed)
    p_worse = permutation_p_value(differences + margin, alternative="less", seed=seed)
    # Exchanging signs around the margin assumes symmetry; for skewed differences the bootstrap bound has to agree.
    if bound.low <= -margin and n_moved:
        p_not_worse = max(p_not_worse, math.nextafter(alpha, 1.0))
    if bound.high >= -margin and n_moved:
        p_worse = max(p_worse, math.nextafter(alpha, 1.0))
    return p_not_worse, p_worse, p_any_drop


def row_variance(differences: NDArray[np.float64], *, binary: bool) -> tuple[float, bool]:
    """Variance of one example's difference, and whether it is that of right/wrong differences.

    For right/wrong: the share that moved, with one moved row added, so that "nothing changed on 30 rows" does not
    promise that nothing ever changes. Graded differences with too little spread are bounded by right/wrong ones.
    """
    if not binary and int((differences != 0).sum()) >= MIN_DISTINCT_ROWS:
        return float(np.var(differences, ddof=1)), False
    return float((math.fsum(np.abs(differences)) + 1.0) / (differences.size + 1)), True


def rows_to_decide(
    difference: float, *, margin: float, variance: float, right_wrong: bool = True, alpha: float = 0.05
) -> int | None:
    """Rows at which a true `difference` is told from `-margin` with 80 % power; None when out of reach.

    Args:
        difference: true mean difference, -1..1.
        margin: allowed drop, 0..1.
        variance: of one example's difference; for right/wrong scores the share of examples that disagrees, 0..1.
        right_wrong: whether scores are 0 or 1: a drop of x then needs a share x of examples that moved.
        alpha: one-sided error rate.

    Source: Connor (1987): n = (z_alpha sqrt(v0) + z_beta sqrt(v1))^2 / distance^2.
    """
    distance = abs(difference + margin)
    if distance < 1e-9:
        return None
    z_alpha, z_beta = _quantiles(alpha)
    under_null = max(variance, margin) - margin**2 if right_wrong else variance
    under_truth = max(variance, abs(difference)) - difference**2 if right_wrong else variance
    rows = math.ceil(((z_alpha * math.sqrt(under_null) + z_beta * math.sqrt(under_truth)) / distance) ** 2 - 1e-9)
    return max(rows, 1) if rows <= MANY_ROWS else None


def smallest_visible_drop(
    n: int, *, margin: float, variance: float, right_wrong: bool = True, alpha: float = 0.05
) -> float:
    """The smallest true drop that `n` rows would have shown to exceed the margin with 80 % power.

    Args:
        n: paired examples, at least 1.
        margin: allowed drop, 0..1.
        variance: of one example's difference; for right/wrong scores the share of examples that disagrees, 0..1.
        right_wrong: whether scores are 0 or 1.
        alpha: one-sided error rate.

    Returns:
        A drop, margin..1; infinite when not even a drop of 1 could have been shown.
    """

    def visible(drop: float) -> bool:
        rows = rows_to_decide(-drop, margin=margin, variance=variance, right_wrong=right_wrong, alpha=alpha)
        return rows is not None and rows <= n

    if not visible(1.0):
        return math.inf
    low, high = margin, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if visible(middle) else (middle, high)
    return high


def _quantiles(alpha: float) -> tuple[float, float]:
    from statistics import NormalDist

    normal = NormalDist()
    return normal.inv_cdf(1 - alpha), normal.inv_cdf(POWER)
