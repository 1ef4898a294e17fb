"""Tests of a mean: those that hold at their size for every distribution, however few or skewed the rows, and one more.

Symbols: n rows, d_i in [low, high] one row's value, delta their true mean, delta_0 the value it is tested against;
for right/wrong pairs g gained, l lost, q the true share lost, q + delta_0 the true share gained.

* right/wrong pairs: the exact unconditional test with Tango's score statistic. The p-value is the greatest
  probability, over the unknown q, of a statistic at least as extreme. q is searched in a 1 - GAMMA confidence region
  only, and GAMMA is added (Berger & Boos 1994, JASA 89:1012; Sidik 2003, Stat. Med. 22:265). The asymptotic test
  alone rejects a true delta_0 in up to 8 % of runs at a nominal 5 %.
* anything bounded: Gaffke's test (Gaffke 2005; Phan, Thomas & Learned-Miller 2021, ICML, arXiv 2106.03163): the
  observed values and one unseen value at the far end of the range get random weights (uniform on the simplex); the
  p-value is the share of weightings whose mean reaches delta_0. For right/wrong values it is Clopper-Pearson's.
  It needs no symmetry, so it holds where sign exchanges around a margin and the bootstrap do not.
* enough rows with spread: the t test with a correction for skewness, which is approximate and says so. Gaffke's has
  half its power where changes are small, for it must allow that the next row falls from 1 to 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from copa_harness.judge.intervals import N_RESAMPLES, grouped

GAMMA = 1e-5
"""Error spent on confining the nuisance parameter; small beside any alpha that is shared by many gates."""

MANY_PAIRS = 5_000
"""Beyond so many pairs the asymptotic test is exact for all purposes, and the exact one takes seconds."""

_GRID = 101

_MANY_VALUES = 2_000
"""Beyond so many different values the weights are drawn on a grid: one by one they take seconds."""

_GRID_POINTS = 301

_CHUNK = 1_000_000

_TIE = 1e-9


def exact_share_p_value(
    gained: int, lost: int, n: int, *, difference: float, alternative: Literal["less", "greater"]
) -> float:
    """Exact p-value of a paired difference of shares against `difference`.

    Args:
        gained: pairs wrong before and right after.
        lost: pairs right before and wrong after.
        n: all pairs, at least gained + lost and at least 1.
        difference: the true difference under the null hypothesis, strictly between -1 and 1.
        alternative: "greater" asks whether the data show more than `difference`, "less" whether they show less.

    Raises:
        ValueError: for impossible counts or a difference outside -1..1.

    Source: Sidik (2003); Lloyd & Moldovan (2008), Stat. Med. 27:3540, for the monotone rejection region.
    """
    if n < 1 or min(gained, lost) < 0 or gained + lost > n or not -1 < difference < 1:
        raise ValueError(
            f"got {gained} gained, {lost} lost of {n} against {difference}; expected counts within n, |difference| < 1"
        )
    if alternative == "less":
        return exact_share_p_value(lost, gained, n, difference=-difference, alternative="greater")
    from scipy import stats

    observed = float(tango_statistic(gained, lost, n, difference=difference))
    if n > MANY_PAIRS:
        return float(stats.norm.sf(observed))
    region = least_gained(observed, n, difference=difference)
    return greatest_level(region, n, difference=difference, moved=gained + lost)


def greatest_level(region: NDArray[np.int64], n: int, *, difference: float, moved: int) -> float:
    """The greatest probability of a rejection region under a true `difference`, whatever share of the pairs moves.

    Args:
        region: for each number lost 0..n, the least number gained that is in it (see `least_gained`).
        n: all pairs.
        difference: the true difference, -1..1.
        moved: pairs that moved, which confine that share.
    """
    low, high = _moved_region(moved, n)
    shares_moved = np.linspace(max(low, abs(difference)), max(high, abs(difference)), _GRID)
    return float(min(1.0, region_probability(region, n, difference=difference, moved=shares_moved).max() + GAMMA))


def region_probability(
    region: NDArray[np.int64], n: int, *, difference: float, moved: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Probability of a region of `least_gained` for every share of the pairs that may truly move, summed exactly."""
    from scipy import stats

    each_lost = np.arange(n + 1)
    shares_lost = np.clip((moved - difference) / 2, 0.0, 1.0)[:, None]
    shares_gained = np.clip(shares_lost + difference, 0.0, 1.0)
    rest = np.maximum(1.0 - shares_lost, 1e-300)
    weights = stats.binom.pmf(each_lost, n, shares_lost)
    tails = stats.binom.sf(region - 1, n - each_lost, np.minimum(shares_gained / rest, 1.0))
    probability: NDArray[np.float64] = (weights * tails).sum(axis=1)
    return probability


def least_gained(observed: float, n: int, *, difference: float) -> NDArray[np.int64]:
    """For each number lost 0..n, the least number gained whose statistic reaches the observed one.

    The statistic grows with the number gained, so bisection finds it; n - lost + 1 stands for "never".
    """
    lost = np.arange(n + 1)
    low, high = np.zeros(n + 1, dtype=np.int64), n - lost + 1
    while np.any(low < high):
        middle = (low + high) // 2
        reached = tango_statistic(middle, lost, n, difference=difference) >= observed - _TIE
        high = np.where(reached, middle, high)
        low = np.where(reached, low, np.minimum(middle + 1, high))
    return high


def _moved_region(moved: int, n: int) -> tuple[float, float]:
    """Clopper-Pearson region of the share of pairs that move, at confidence 1 - GAMMA."""
    from scipy import stats

    region = stats.binomtest(moved, n).proportion_ci(1 - GAMMA, method="exact")
    return float(region.low), float(region.high)


def bounded_mean_p_value(
    values: NDArray[np.float64],
    *,
    mean: float,
    alternative: Literal["less", "greater"],
    low: float,
    high: float,
    seed: int = 0,
) -> float:
    """P-value of a true mean of `mean`, valid for independent values of any distribution on [low, high].

    Args:
        values: one number in low..high per independent row (or cluster).
        mean: the true mean under the null hypothesis.
        alternative: "greater" asks whether the true mean is above `mean`, "less" whether it is below.
        low: least possible value.
        high: greatest possible value.
        seed: of the random weights.

    Returns:
        At least 1 / (N_RESAMPLES + 1); no values at all give 1.

    Raises:
        ValueError: for values outside low..high.

    Source: Gaffke (2005), "Three test statistics for a nonparametric one-sided hypothesis on the mean of a
    nonnegative variable"; the weighting is that of Phan, Thomas & Learned-Miller (2021).
    """
    if values.size == 0:
        return 1.0
    if values.min() < low - _TIE or values.max() > high + _TIE:
        raise ValueError(f"got values in {values.min()}..{values.max()}; expected {low}..{high}")
    if alternative == "less":
        return bounded_mean_p_value(-values, mean=-mean, alternative="greater", low=-high, high=-low, seed=seed)
    support, counts = np.unique(np.append(values, low), return_counts=True)
    if support.size > _MANY_VALUES:
        support, counts = _on_grid(support, counts)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // support.size)
    reached = 0
    for start in range(0, N_RESAMPLES, rows):
        # Equal values share one gamma weight: a sum of that many exponentials.
        weights = rng.standard_gamma(counts, (min(rows, N_RESAMPLES - start), support.size))
        reached += int((weights @ (support - mean) <= 0).sum())
    return (reached + 1) / (N_RESAMPLES + 1)


def _on_grid(support: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Values on a grid: each counts for its two neighbours, for the nearer one more, so that the mean stays.

    What is spread is spread a little more, by a thousandth of its variance at most where values fill their range: the
    p-value errs to the safe side.
    """
    grid = np.linspace(support[1], support[-1], _GRID_POINTS)  # the least one is the unseen value, and stays
    place = (support[1:] - grid[0]) / (grid[1] - grid[0])
    left = np.minimum(place.astype(np.int64), _GRID_POINTS - 2)
    share = np.bincount(left, counts[1:] * (1 - (place - left)), _GRID_POINTS)
    share += np.bincount(left + 1, counts[1:] * (place - left), _GRID_POINTS)
    return np.append(support[:1], grid), np.append(counts[:1], np.maximum(share, 0.0))


def clustered_bounded_p_value(
    differences: NDArray[np.float64],
    labels: Sequence[str],
    *,
    difference: float,
    alternative: Literal["less", "greater"],
    seed: int = 0,
) -> float:
    """P-value of a true mean difference of `difference`, -1..1, valid for any distribution of whole groups."""
    groups = grouped(differences, labels)
    # Sizes count: E[t_c - n_c delta_0] = 0 is what a mean of delta_0 over examples says.
    values = (groups.totals - difference * groups.sizes) / groups.sizes.max()
    return bounded_mean_p_value(
        values, mean=0.0, alternative=alternative, low=-1.0 - difference, high=1.0 - difference, seed=seed
    )


def skewed_t_p_value(
    values: NDArray[np.float64], sizes: NDArray[np.float64], *, mean: float, alternative: Literal["less", "greater"]
) -> float:
    """P-value of a true mean of `mean` by the t test with Johnson's correction for skewness: approximate, not exact.

    Args:
        values: one number per independent row, or the total of one group of rows.
        sizes: rows per value. Groups make it the cluster-robust t test of the mean over rows.
        mean: the true mean of a row under the null hypothesis.
        alternative: "greater" asks whether the true mean is above `mean`, "less" whether it is below.

    Source: Johnson (1978), J. Am. Stat. Assoc. 73:536. A plain t test passes a few large losses among many small gains
    in 11 % of runs at 5 %; corrected, it does not.
    """
    from scipy import stats

    if alternative == "less":
        return skewed_t_p_value(-values, sizes, mean=-mean, alternative="greater")
    away = (values - mean * sizes) / sizes.mean()
    n, distance, spread = away.size, float(away.mean()), float(away.std(ddof=1))
    if spread <= _TIE:
        return 1.0
    third = float(((away - distance) ** 3).mean())
    corrected = distance + third / (6 * n * spread**2) + third * distance**2 / (3 * spread**4)
    # The correction is not monotone in the distance: it may only take away.
    return float(stats.t.sf(min(distance, corrected) / spread * math.sqrt(n), n - 1))


def tango_statistic(gained: ArrayLike, lost: ArrayLike, n: int, *, difference: float) -> NDArray[np.float64]:
    """Score statistic of "the true difference is `difference`": large when the data show more, about N(0, 1).

    Args:
        gained: sum of the gains, a number or an array of them.
        lost: sum of the losses, of the same shape.
        n: all pairs.
        difference: the true difference under the null hypothesis, -1..1.

    Source: Tango (1998), eq. 4-6, with the restricted maximum-likelihood estimate q of the share lost.
    """
    g, lo = np.asarray(gained), np.asarray(lost)
    a = 2.0 * n
    b = -g - lo + (2 * n - g + lo) * difference
    c = -lo * difference * (1 - difference)
    share_lost = (np.sqrt(np.maximum(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * share_lost + difference * (1 - difference))
    numerator = g - lo - n * difference
    with np.errstate(divide="ignore", invalid="ignore"):
        value = numerator / np.sqrt(np.maximum(variance, 0.0))
    certain = np.where(np.abs(numerator) < _TIE, 0.0, np.copysign(np.inf, numerator))
    result: NDArray[np.float64] = np.where(variance <= 1e-12, certain, value)
    return result


def tango_bounds(gained: float, lost: float, n: int, *, level: float) -> tuple[float, float]:
    """Tango's score interval of a paired difference of shares, by inverting `tango_statistic`."""
    from scipy import optimize, stats

    z = float(stats.norm.ppf(0.5 + level / 2))
    observed = (gained - lost) / n

    def invert(target: float, edge: float) -> float:
        if abs(observed - edge) < 1e-12:
            return edge

        def gap(difference: float) -> float:
            value = float(tango_statistic(gained, lost, n, difference=difference))
            return max(-1e6, min(1e6, value)) - target

        return float(optimize.brentq(gap, observed, edge, xtol=1e-10))

    return invert(z, -1.0), invert(-z, 1.0)
