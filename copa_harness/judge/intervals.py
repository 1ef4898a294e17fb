"""Intervals around a mean score: exact ideas for right/wrong, the bootstrap for graded scores.

Symbols: n examples, k successes, scores s_1..s_n in [0, 1], m their mean, z the normal quantile.

* right/wrong (all scores 0 or 1): Wilson's score interval, never outside [0, 1] and sensible at k = 0 and k = n
  (Wilson 1927; recommended for small n by Brown, Cai & DasGupta 2001 and, for language-model evaluations, by
  Bowyer et al. 2025, arXiv 2503.01747).
* graded: the bias-corrected and accelerated bootstrap (Efron 1987), by scipy.
* graded but (nearly) constant: resampling sees no spread where there may well be some, so Wilson's interval with
  k = n m is used instead. It is conservative: among all variables on [0, 1] with mean m, right/wrong has the
  greatest variance, m (1 - m).

Knows nothing of models, files or gates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from copa_harness.results import Interval

N_RESAMPLES = 9_999
"""Bootstrap and permutation resamples: p-values to about .0001."""

MIN_DISTINCT_ROWS = 10
"""Below this many rows that differ from the commonest value, the bootstrap is not trusted.

Measured (skewed differences, n = 75): with 7 informative rows a nominal 5 % bootstrap bound misses 22 % of the time.
"""

_CHUNK = 1_000_000


def wilson_interval(successes: float, n: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval for a share.

    Args:
        successes: how many of `n` succeeded; a fraction is allowed (the sum of graded scores gives a conservative
            interval of their mean).
        n: how many were tried; 0 gives the interval 0..1.
        level: two-sided confidence, 0 < level < 1.

    Raises:
        ValueError: for `successes` outside 0..n or `level` outside 0..1.

    Source: Wilson (1927), J. Am. Stat. Assoc. 22; the formula of Brown, Cai & DasGupta (2001), eq. 4.
    """
    _check_level(level)
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"got {successes} successes of {n}; expected 0 <= successes <= n")
    if n == 0:
        return Interval(0.0, 1.0, level, "none")
    z = _normal_quantile(0.5 + level / 2)
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if successes == n else min(1.0, (centre + half) / scale)
    return Interval(low, high, level, "wilson")


def mean_interval(
    scores: Sequence[float], *, level: float = 0.95, seed: int = 0, groups: Sequence[str] | None = None
) -> Interval:
    """Interval around the mean of scores in 0..1.

    Args:
        scores: one number in 0..1 per example; none at all gives 0..1.
        level: two-sided confidence, 0 < level < 1.
        seed: of the bootstrap; equal scores and seed give equal intervals.
        groups: the group of each score, where some examples share one (see `clustered.py`).

    Returns:
        `method` is "wilson" (all 0 or 1), "bca" (graded), "wilson-bound" (graded, too little spread to resample),
        "cluster-bca" or "cluster-bound" (groups), or "none" (no scores).

    Raises:
        ValueError: for scores outside 0..1 or not finite.
    """
    _check_level(level)
    values = np.asarray(list(scores), dtype=np.float64)
    if values.size == 0:
        return Interval(0.0, 1.0, level, "none")
    if not np.all(np.isfinite(values)) or values.min() < 0 or values.max() > 1:
        raise ValueError(f"got scores in {values.min()}..{values.max()}; expected finite numbers in 0..1")
    if groups is not None and len(set(groups)) < len(groups):
        from copa_harness.judge.clustered import clustered_mean_interval

        return clustered_mean_interval(values, groups, level=level, seed=seed)
    total = min(math.fsum(values), float(values.size))
    if bool(np.all((values == 0) | (values == 1))):
        return wilson_interval(round(total), values.size, level=level)
    if n_informative(values) >= MIN_DISTINCT_ROWS:
        bounds = bootstrap_bounds(values, level=level, seed=seed)
        if bounds is not None:
            return Interval(max(0.0, bounds[0]), min(1.0, bounds[1]), level, "bca")
    bound = wilson_interval(total, values.size, level=level)
    return Interval(bound.low, bound.high, level, "wilson-bound")


def rows_to_settle(score: float, threshold: float, *, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Examples at which a true mean of `score` is told from `threshold`; None when they (nearly) coincide.

    Exact variance for right/wrong scores, an upper bound for graded ones.

    Args:
        score: true mean, 0..1.
        threshold: the mean it is told from, 0..1.
        alpha: one-sided error rate.
        power: probability of telling them apart.

    Source: Fleiss, Levin & Paik (2003), Statistical Methods for Rates and Proportions, eq. 2.16.
    """
    distance = abs(score - threshold)
    if distance < 1e-3:
        return None
    spread = _normal_quantile(1 - alpha) * math.sqrt(threshold * (1 - threshold))
    spread += _normal_quantile(power) * math.sqrt(score * (1 - score))
    return max(1, math.ceil((spread / distance) ** 2 - 1e-9))


def n_informative(values: NDArray[np.float64]) -> int:
    """How many values differ from the commonest one: what a bootstrap has to work with."""
    _, counts = np.unique(values, return_counts=True)
    return int(values.size - counts.max())


def bootstrap_bounds(values: NDArray[np.float64], *, level: float, seed: int) -> tuple[float, float] | None:
    """BCa bootstrap bounds of the mean, or None where it does not exist (no spread).

    Source: Efron (1987), "Better bootstrap confidence intervals"; `scipy.stats.bootstrap`.
    """
    from scipy import stats

    result = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=level,
        n_resamples=N_RESAMPLES,
        batch=max(1, _CHUNK // values.size),
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _normal_quantile(probability: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(probability)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"got level={level}; expected a confidence between 0 and 1, such as 0.95")
