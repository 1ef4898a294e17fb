"""Betting e-processes: evidence against a mean that may be looked at after every row.

Symbols: rows x_1, x_2, ... in [low, high], seen in random order; H0: their mean is at least (at most) mu. A gambler
starts with wealth 1 and bets a fraction theta of it against H0 on every row; under H0 the wealth is a nonnegative
supermartingale, so by Ville's inequality it ever reaches 1 / alpha with probability at most alpha, however often one
looks and whenever one stops.

    K_t = sum_theta w_theta prod_{s <= t} (1 + theta (x_s - mu) / (mu - low))          (evidence for a mean above mu)

The fractions are a fixed grid with equal weights ("diversified Kelly"), so no row is spent on learning one.

* independent rows from a population: mu is constant.
* a shuffled split of N rows, asked about the mean of that very split: before row t the mean of what is left is
  (N mu - S_{t-1}) / (N - t + 1), which takes the place of mu; when it leaves [low, high] the answer is certain.

Source: Waudby-Smith & Ramdas (2024), "Estimating means of bounded random variables by betting", JRSS-B 86:1, section 5
(without replacement) and appendix B (grids).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FRACTIONS = (0.1, 0.3, 0.6, 0.95)
"""Shares of the wealth that are bet; the spread covers drops from barely visible to nearly every row that moves."""

_SLACK = 1e-9


class MeanAbove:
    """Evidence that the mean of rows in [low, high] is above `mean`, one row at a time.

    Args:
        mean: the mean under the null hypothesis, low..high; evidence is against "at most `mean`".
        low: least possible value of a row.
        high: greatest possible value of a row.
        n_rows: rows in the split, when the question is about the mean of exactly these (drawn without replacement);
            None for independent rows from a population.

    Raises:
        ValueError: for a mean outside low..high.
    """

    def __init__(self, mean: float, *, low: float, high: float, n_rows: int | None = None) -> None:
        if not low <= mean <= high:
            raise ValueError(f"got a mean of {mean} for rows in {low}..{high}; expected one inside")
        self._mean, self._low, self._high, self._n_rows = mean, low, high, n_rows
        self._fractions: NDArray[np.float64] = np.asarray(FRACTIONS)
        self._log_wealth: NDArray[np.float64] = np.zeros(len(FRACTIONS))
        self._log_peak = 0.0
        self._total = 0.0
        self.n_seen = 0

    @property
    def p_value(self) -> float:
        """1 / the greatest wealth so far: at most alpha with probability at most alpha, at any time."""
        return math.exp(-self._log_peak)

    @property
    def is_certain(self) -> bool:
        """Whether the rows still to come cannot bring the mean of the split down to `mean`."""
        return math.isinf(self._log_peak)

    def add(self, value: float) -> None:
        """Bet on one more row.

        Raises:
            ValueError: for a value outside low..high, or more rows than the split has.
        """
        if not self._low - _SLACK <= value <= self._high + _SLACK:
            raise ValueError(f"got a row of {value}; expected {self._low}..{self._high}")
        expected = self._expected()
        self.n_seen += 1
        self._total += value
        # With no room below, the null has every row at `low`: one that is not there refutes it.
        room = expected - self._low
        if room <= _SLACK:
            self._log_peak = math.inf if value > self._low + _SLACK else self._log_peak
        else:
            factors = 1.0 + self._fractions * (value - expected) / room
            self._log_wealth = self._log_wealth + np.log(np.maximum(factors, 1e-300))
            top = float(self._log_wealth.max())
            wealth = top + math.log(float(np.exp(self._log_wealth - top).mean()))
            self._log_peak = max(self._log_peak, wealth)
        if self._n_rows is not None and self._total + (self._n_rows - self.n_seen) * self._low > (
            self._n_rows * self._mean + _SLACK
        ):
            self._log_peak = math.inf

    def _expected(self) -> float:
        """Mean of the next row under the null hypothesis, given the rows so far."""
        if self._n_rows is None:
            return self._mean
        left = self._n_rows - self.n_seen
        if left <= 0:
            raise ValueError(f"got a row beyond the {self._n_rows} of the split")
        return min(self._high, max(self._low, (self._n_rows * self._mean - self._total) / left))


class MeanBelow:
    """Evidence that the mean of rows in [low, high] is below `mean`: `MeanAbove` of the negated rows."""

    def __init__(self, mean: float, *, low: float, high: float, n_rows: int | None = None) -> None:
        self._mirrored = MeanAbove(-mean, low=-high, high=-low, n_rows=n_rows)

    @property
    def p_value(self) -> float:
        """1 / the greatest wealth so far."""
        return self._mirrored.p_value

    @property
    def is_certain(self) -> bool:
        """Whether the rows still to come cannot bring the mean of the split up to `mean`."""
        return self._mirrored.is_certain

    def add(self, value: float) -> None:
        """Bet on one more row."""
        self._mirrored.add(-value)
