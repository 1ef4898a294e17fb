"""What so many rows can decide: chances of the regression gate to pass and to fail, and the rows that takes.

Symbols: n paired examples, d the share on which the runs disagree, delta = the true drop, so a share (d + delta) / 2 is
lost and (d - delta) / 2 gained; m the margin.

    pass    the exact unconditional test refutes a drop of m or more, at alpha
    fail    the exact unconditional test refutes "no drop" at its share of alpha, and the observed drop is at least m

Right/wrong scores: both are sums over all outcomes, nothing is simulated; the tests' critical values are those for a
share d that moves. Graded scores: the t test's formula, on whole groups where there are any.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from copa_harness.judge.exact_tests import greatest_level, least_gained, region_probability

POWER = 0.8
"""Probability with which "would decide it" and "could be seen" are meant."""

MANY_ROWS = 20_000
"""Beyond this, "no number of rows one would collect"."""

MANY_EXACT = 1_000
"""Beyond this the formula is right to a few percent, and the exact search takes seconds."""

_STEP = 1.03
"""From one number of rows that is looked at to the next."""


def chance_to_pass(n: int, *, disagreement: float, margin: float, drop: float = 0.0, alpha: float = 0.05) -> float:
    """Probability that the gate passes.

    Args:
        n: paired examples, at least 1.
        disagreement: share of examples on which the runs differ, drop..1.
        margin: allowed drop, 0..1.
        drop: true drop; negative for a gain.
        alpha: one-sided error rate.

    Raises:
        ValueError: for a drop larger than the disagreement, or shares outside 0..1.
    """
    _check(n, drop, disagreement)
    region = _region(n, -min(margin, 1 - 1e-9), round(disagreement * n), alpha)
    return _probability(region, n, drop=-drop, disagreement=disagreement)


def chance_to_fail(n: int, *, disagreement: float, drop: float, margin: float = 0.0, alpha: float = 0.05) -> float:
    """Probability that the gate fails; the same arguments.

    Args:
        n: paired examples, at least 1.
        disagreement: share of examples on which the runs differ, drop..1.
        drop: true drop.
        margin: allowed drop, 0..1.
        alpha: error rate of this gate, its share of what the gates of a suite have together.
    """
    _check(n, drop, disagreement)
    # The same test with gains and losses exchanged; the observed drop is at least the margin.
    region = _region(n, 0.0, round(disagreement * n), alpha)
    least = math.ceil(margin * n - 1e-9)
    return _probability(np.maximum(region, np.arange(n + 1) + least), n, drop=drop, disagreement=disagreement)


def rows_to_pass(*, disagreement: float, margin: float, alpha: float = 0.05) -> int | None:
    """Rows at which an unchanged program passes in 80 % of runs; None when out of reach, as for a margin of 0.

    Args:
        disagreement: share of examples on which the runs differ, 0..1.
        margin: allowed drop, 0..1.
        alpha: one-sided error rate.
    """

    def enough(n: int) -> bool:
        return chance_to_pass(n, disagreement=disagreement, margin=margin, alpha=alpha) >= POWER

    if margin <= 0:
        return None
    guess = max(rows_for_t(math.sqrt(disagreement), margin=margin, alpha=alpha), math.log(alpha) / math.log1p(-margin))
    n = max(2, math.ceil(guess - 1e-9))
    if n > MANY_EXACT:
        return n if n <= MANY_ROWS else None
    while not enough(n):
        n = math.ceil(n * _STEP)
    while n > 2 and enough(fewer := math.floor(n / _STEP)):
        n = fewer
    return n


def rows_for_t(spread: float, *, margin: float, alpha: float = 0.05) -> float:
    """Rows, or groups, at which a t test passes an unchanged program in 80 % of runs.

    Args:
        spread: standard deviation of one row's difference, or of a group's per row.
        margin: allowed drop, above 0.
        alpha: one-sided error rate.
    """
    from statistics import NormalDist

    quantile = NormalDist().inv_cdf
    return ((quantile(1 - alpha) + quantile(POWER)) * spread / margin) ** 2


def drop_to_see(n: int, *, disagreement: float, margin: float = 0.0, alpha: float = 0.05) -> float:
    """The smallest true drop that `n` rows fail in 80 % of runs; infinite when they see none.

    Args:
        n: paired examples, at least 1.
        disagreement: share of examples on which the runs differ when nothing is lost, 0..1; a drop moves as many.
        margin: allowed drop, 0..1.
        alpha: error rate of this gate.
    """

    def seen(drop: float) -> bool:
        moved = max(drop, disagreement)
        return chance_to_fail(n, disagreement=moved, drop=drop, margin=margin, alpha=alpha) >= POWER

    if not seen(1.0):
        return math.inf
    low, high = 0.0, 1.0
    while high - low > 0.001:
        middle = (low + high) / 2
        low, high = (low, middle) if seen(middle) else (middle, high)
    return high


@lru_cache(maxsize=256)
def _region(n: int, difference: float, moved: int, alpha: float) -> NDArray[np.int64]:
    """For each number lost 0..n, the least number gained at which the exact test rejects "at most `difference`"."""
    from statistics import NormalDist

    def region(critical: float) -> NDArray[np.int64]:
        return least_gained(critical, n, difference=difference)

    def is_valid(critical: float) -> bool:
        return greatest_level(region(critical), n, difference=difference, moved=min(moved, n)) <= alpha

    low = max(0.0, NormalDist().inv_cdf(1 - alpha) - 0.1)  # the asymptotic test is hardly ever too careful
    high = low + 1.0
    while high < 1e3 and not is_valid(high):
        low, high = high, 2 * high
    while high - low > 2e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if is_valid(middle) else (middle, high)
    return region(high)


def _probability(region: NDArray[np.int64], n: int, *, drop: float, disagreement: float) -> float:
    return float(region_probability(region, n, difference=drop, moved=np.array([disagreement]))[0])


def _check(n: int, drop: float, disagreement: float) -> None:
    if n < 1 or math.isnan(drop) or not abs(drop) <= disagreement + 1e-12 or disagreement > 1:
        raise ValueError(
            f"got n={n}, drop={drop}, disagreement={disagreement}; expected n >= 1 and a drop of at most the "
            f"disagreement, which is at most 1 (a drop of x moves at least a share x of the examples)"
        )
