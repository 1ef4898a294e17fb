"""Has the score dropped by more than a margin? Three answers: pass, fail, undecided.

Symbols: delta = true mean difference (new - baseline), m = margin >= 0 (`max_regression`), alpha = error rate of each
one-sided test, d = variance of one example's difference (for right/wrong about the share that disagrees).

    pass       "delta <= -m" is refuted: the drop, if any, is smaller than the margin
    fail       "delta >= -m" is refuted: the drop is larger than the margin
    undecided  neither: the rows needed and the smallest drop these rows could have shown are stated

A failure also needs the test of "nothing changed" to refute it, so an unchanged program fails with probability at
most alpha. Against the margin every test holds its size for any distribution (`exact_tests`):

    right/wrong   exact McNemar at 0, the exact unconditional test at -m
    graded        paired permutation at 0, Gaffke's test at -m (and at 0, for a pass)
    groups        the same two on whole groups

At m = 0 a graded failure says "this is not nothing, and it is down"; a graded pass is a promise about the mean and
holds however skewed the differences are.

Formulas of n and power: Connor (1987), Biometrics 43:207, for paired shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from copa_harness.judge.exact_tests import (
    bounded_mean_p_value,
    clustered_bounded_p_value,
    clustered_row_variance,
    exact_share_p_value,
)
from copa_harness.judge.intervals import MIN_DISTINCT_ROWS, group_labels, grouped
from copa_harness.judge.paired_tests import (
    PairedDifference,
    PairedScores,
    gained_and_lost,
    is_right_wrong,
    mcnemar_p_value,
    paired_difference,
    permutation_p_value,
)
from copa_harness.results import Verdict

POWER = 0.8
"""Probability with which "would decide it" and "could have seen" are meant."""

MANY_ROWS = 1_000_000
"""Beyond this, "no number of rows one would collect"."""

_NEARLY_ONE = 1 - 1e-9


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


def noninferiority(pairs: PairedScores, *, margin: float, alpha: float = 0.05, seed: int = 0) -> Noninferiority:
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
    paired = paired_difference(pairs, seed=seed)
    old, new = np.asarray(pairs.before, dtype=np.float64), np.asarray(pairs.after, dtype=np.float64)
    binary = is_right_wrong(old) and is_right_wrong(new)
    labels = group_labels(pairs.ids, pairs.groups)
    if labels is not None:
        p_not_worse, p_worse, p_any_drop = _one_sided_groups(new - old, labels, margin=margin, seed=seed)
    else:
        p_not_worse, p_worse, p_any_drop = _one_sided(new - old, margin=margin, binary=binary, seed=seed)
    if p_worse <= alpha and p_any_drop <= alpha:
        verdict = Verdict.FAIL
    elif p_not_worse <= alpha:
        verdict = Verdict.PASS
    else:
        verdict = Verdict.UNDECIDED
    variance, right_wrong = row_variance(new - old, binary=binary, labels=labels)
    per_unit = 1.0 if labels is None else len(labels) / len(set(labels))
    noise = {"margin": margin, "variance": variance, "alpha": alpha, "rows_per_unit": per_unit}
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
    differences: NDArray[np.float64], *, margin: float, binary: bool, seed: int
) -> tuple[float, float, float]:
    """P-values of "dropped by the margin or more", "dropped by at most the margin", "did not drop"."""
    if binary:
        gained, lost = (round(total) for total in gained_and_lost(differences))
        p_any_drop = mcnemar_p_value(gained, lost, alternative="less")
        if margin == 0:
            return mcnemar_p_value(gained, lost, alternative="greater"), p_any_drop, p_any_drop
        null = -min(margin, _NEARLY_ONE)
        p_not_worse = exact_share_p_value(gained, lost, differences.size, difference=null, alternative="greater")
        p_worse = exact_share_p_value(gained, lost, differences.size, difference=null, alternative="less")
        return p_not_worse, p_worse, p_any_drop

    def against_margin(alternative: Literal["less", "greater"]) -> float:
        return bounded_mean_p_value(differences, mean=-margin, alternative=alternative, low=-1.0, high=1.0, seed=seed)

    p_any_drop = permutation_p_value(differences, alternative="less", seed=seed)
    p_not_worse = against_margin("greater")
    if margin == 0:
        return (
            max(p_not_worse, permutation_p_value(differences, alternative="greater", seed=seed)),
            p_any_drop,
            p_any_drop,
        )
    return p_not_worse, against_margin("less"), p_any_drop


def _one_sided_groups(
    differences: NDArray[np.float64], labels: Sequence[str], *, margin: float, seed: int
) -> tuple[float, float, float]:
    """The same three p-values with whole groups as the independent units."""
    totals = grouped(differences, labels).totals

    def against_margin(alternative: Literal["less", "greater"]) -> float:
        return clustered_bounded_p_value(differences, labels, difference=-margin, alternative=alternative, seed=seed)

    p_any_drop = permutation_p_value(totals, alternative="less", seed=seed)
    p_not_worse = against_margin("greater")
    if margin == 0:
        return max(p_not_worse, permutation_p_value(totals, alternative="greater", seed=seed)), p_any_drop, p_any_drop
    return p_not_worse, against_margin("less"), p_any_drop


def row_variance(
    differences: NDArray[np.float64], *, binary: bool, labels: Sequence[str] | None = None
) -> tuple[float, bool]:
    """Variance of one example's difference, and whether it is that of right/wrong differences.

    For right/wrong: the share that moved, with one moved row added, so that "nothing changed on 30 rows" does not
    promise that nothing ever changes. Graded differences with too little spread are bounded by right/wrong ones.
    With groups it is the variance that gives the clustered standard error.
    """
    if labels is not None and np.ptp(differences) > 0:
        return clustered_row_variance(differences, labels), False
    if not binary and int((differences != 0).sum()) >= MIN_DISTINCT_ROWS:
        return float(np.var(differences, ddof=1)), False
    return float((math.fsum(np.abs(differences)) + 1.0) / (differences.size + 1)), True


def rows_to_decide(
    difference: float,
    *,
    margin: float,
    variance: float,
    right_wrong: bool = True,
    alpha: float = 0.05,
    rows_per_unit: float = 1.0,
) -> int | None:
    """Rows at which a true `difference` is told from `-margin` with 80 % power; None when out of reach.

    Args:
        difference: true mean difference, -1..1.
        margin: allowed drop, 0..1.
        variance: of one example's difference; for right/wrong scores the share of examples that disagrees, 0..1.
        right_wrong: whether scores are 0 or 1: a drop of x then needs a share x of examples that moved.
        alpha: one-sided error rate.
        rows_per_unit: examples per group, where groups are the independent units.

    Source: Connor (1987): n = (z_alpha sqrt(v0) + z_beta sqrt(v1))^2 / distance^2. Graded scores pay for the one
    unseen row of Gaffke's test on top: distance = (z_alpha + z_beta) sqrt(v / n) + 1 / n.
    """
    distance = abs(difference + margin)
    if distance < 1e-9:
        return None
    z_alpha, z_beta = _quantiles(alpha)
    under_null = max(variance, margin) - margin**2 if right_wrong else variance
    under_truth = max(variance, abs(difference)) - difference**2 if right_wrong else variance
    spread = z_alpha * math.sqrt(under_null) + z_beta * math.sqrt(under_truth)
    is_exchange_test = margin == 0 and difference < 0
    unseen = 0.0 if right_wrong or is_exchange_test else rows_per_unit
    # distance = spread u + unseen u^2 with u = 1 / sqrt(n), solved for u without cancellation.
    root = (spread + math.sqrt(spread**2 + 4 * unseen * distance)) / (2 * distance)
    rows = math.ceil(root**2 - 1e-9)
    return max(rows, 1) if rows <= MANY_ROWS else None


def smallest_visible_drop(
    n: int,
    *,
    margin: float,
    variance: float,
    right_wrong: bool = True,
    alpha: float = 0.05,
    rows_per_unit: float = 1.0,
) -> float:
    """The smallest true drop that `n` rows would have shown to exceed the margin with 80 % power.

    Args:
        n: paired examples, at least 1.
        margin: allowed drop, 0..1.
        variance: of one example's difference; for right/wrong scores the share of examples that disagrees, 0..1.
        right_wrong: whether scores are 0 or 1.
        alpha: one-sided error rate.
        rows_per_unit: examples per group, where groups are the independent units.

    Returns:
        A drop, margin..1; infinite when not even a drop of 1 could have been shown.
    """

    def visible(drop: float) -> bool:
        rows = rows_to_decide(
            -drop,
            margin=margin,
            variance=variance,
            right_wrong=right_wrong,
            alpha=alpha,
            rows_per_unit=rows_per_unit,
        )
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
