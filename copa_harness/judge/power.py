"""With which probability a true drop is found: power of the paired right/wrong gates.

Symbols: n paired examples, d the share that disagrees, delta = the true drop, so a share (d + delta) / 2 is lost and
(d - delta) / 2 gained; the number that moves is Binomial(n, d), and given it the gains are binomial too.

The fixed gate is the exact McNemar test; its power is summed, not simulated. The sequential gate has no such formula
and is simulated from a seed. How many examples a drop takes: `noninferiority.rows_to_decide`. Source: Connor (1987),
Biometrics 43:207.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from copa_harness.judge.paired_tests import tango_statistic
from copa_harness.judge.sequential.alpha_spending import SpendingSignTest
from copa_harness.judge.sequential.betting import FRACTIONS

N_SIMULATIONS = 1_000
"""Runs behind a simulated power: good to about 1.5 points."""

_MOST_LOOKS = 1_000


@dataclass(frozen=True, slots=True)
class SequentialPower:
    """What stopping early buys and costs, for one true drop.

    Attributes:
        fixed: power of the exact test on all rows.
        sequential: power of looking after every row, with the final look.
        mean_rows: rows used on average.
    """

    fixed: float
    sequential: float
    mean_rows: float


def mcnemar_power(n: int, *, drop: float, disagreement: float, alpha: float = 0.05) -> float:
    """Probability that the exact one-sided McNemar test shows a true drop.

    Args:
        n: paired examples, at least 1.
        drop: true drop, 0..disagreement.
        disagreement: share of examples on which the runs differ, 0..1.
        alpha: one-sided error rate.

    Raises:
        ValueError: for a drop larger than the disagreement, or shares outside 0..1.
    """
    _check(n, drop, disagreement)
    if disagreement == 0:
        return 0.0
    from scipy import stats

    moved = np.arange(n + 1)
    weights = stats.binom.pmf(moved, n, disagreement)
    return float((weights * stats.binom.cdf(_most_gained(n, alpha), moved, (1 - drop / disagreement) / 2)).sum())


def sequential_power(
    n: int, *, drop: float, disagreement: float, margin: float = 0.0, alpha: float = 0.05, seed: int = 0
) -> SequentialPower:
    """Power of the sequential regression gate against a true drop, by simulation, beside that of the fixed one.

    Without a margin the exact test is looked at after every row (`sequential.alpha_spending`); with one, half
    of alpha is spent on looking, half on the exact test of all rows at the end (`sequential.monitors`).

    Args:
        n: rows on offer, at least 1.
        drop: true drop, 0..disagreement.
        disagreement: share of examples on which the runs differ, 0..1.
        margin: allowed drop, 0..1.
        alpha: one-sided error rate.
        seed: of the simulation.
    """
    _check(n, drop, disagreement)
    from scipy import stats

    n_looks = min(n, _MOST_LOOKS)
    rng = np.random.default_rng(seed)
    n_runs = N_SIMULATIONS if margin > 0 or n <= 300 else N_SIMULATIONS // 4
    draws = rng.random((n_runs, n_looks))
    differences = np.where(draws < (disagreement + drop) / 2, -1, np.where(draws < disagreement, 1, 0))
    if margin == 0:
        watched = SpendingSignTest(n_looks, alpha=alpha, n_runs=n_runs)
        for row in range(n_looks):
            watched.add(differences[:, row])
        lost, gained = (differences < 0).sum(axis=1), (differences > 0).sum(axis=1)
        fixed = float((gained <= _most_gained(n_looks, alpha)[lost + gained]).mean())
        found = watched.rejected_at <= n_looks
        return SequentialPower(fixed, float(found.mean()), float(np.minimum(watched.rejected_at, n).mean()))
    # Wealth depends on counts only: log factors of a loss, a gain and an unmoved row, per betting fraction.
    fractions = np.asarray(FRACTIONS)
    room = 1.0 + margin
    by_kind = {value: np.log1p(fractions * (-value - margin) / room) for value in (-1, 0, 1)}
    lost, gained = np.cumsum(differences < 0, axis=1), np.cumsum(differences > 0, axis=1)
    same = np.arange(1, n_looks + 1) - lost - gained
    wealth = np.zeros(differences.shape)
    for index in range(fractions.size):
        logs = lost * by_kind[-1][index] + gained * by_kind[1][index] + same * by_kind[0][index]
        wealth += np.exp(np.minimum(logs, 700.0)) / fractions.size
    crossed = wealth >= 2 / alpha
    stopped = crossed.any(axis=1)
    rows = np.where(stopped, crossed.argmax(axis=1) + 1, n)
    moved = lost[:, -1] + gained[:, -1]
    at_end = gained[:, -1] <= _most_gained(n_looks, alpha / 2)[moved]
    at_end_fixed = gained[:, -1] <= _most_gained(n_looks, alpha)[moved]
    statistic = tango_statistic(gained[:, -1], lost[:, -1], n_looks, difference=-margin)
    at_end &= statistic <= stats.norm.ppf(alpha / 2)
    at_end_fixed &= statistic <= stats.norm.ppf(alpha)
    return SequentialPower(float(at_end_fixed.mean()), float((stopped | at_end).mean()), float(rows.mean()))


def _most_gained(n: int, alpha: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """For 0..n moved rows, the greatest number gained at which McNemar's test shows a drop; -1 where none does."""
    from scipy import stats

    moved = np.arange(n + 1)
    most = stats.binom.ppf(alpha, moved, 0.5)
    most = np.where(np.isnan(most), 0, most)
    found: np.ndarray[tuple[int], np.dtype[np.float64]] = np.where(
        stats.binom.cdf(most, moved, 0.5) <= alpha, most, most - 1
    )
    return np.where(moved == 0, -1.0, found)


def _check(n: int, drop: float, disagreement: float) -> None:
    if n < 1 or math.isnan(drop) or not 0 <= drop <= disagreement <= 1:
        raise ValueError(
            f"got n={n}, drop={drop}, disagreement={disagreement}; expected n >= 1 and 0 <= drop <= disagreement <= 1 "
            f"(a drop of x moves at least a share x of the examples)"
        )
