"""The exact McNemar test looked at after every row: its error rate is spent little by little as rows come in.

Symbols: n rows on offer, t seen, of which m moved and g were gained; alpha = error rate of the whole run. If nothing
dropped, each row that moves is a gain with probability 1/2 (or more), whatever share moves; so given *when* rows move,
g is a fair random walk, and the probability that it ever falls to a boundary is summed exactly. After row t at most

    alpha (t / n)^1.5                                                                     (error that may be spent)

of it may be used up, looks before included: the boundary at row t is the greatest c for which this holds. A run that
falls to it is stopped; over all looks this happens by chance with probability at most alpha. The last look has what is
left of alpha, so next to no power is lost to a single look at all rows, and a large drop is found in half of them.

Source: Lan & DeMets (1983), Biometrika 70:659, with the power family of Kim & DeMets (1987), Biometrika 74:149; the
p-value orders outcomes by the row they stop at (Jennison & Turnbull 2000, section 8.4).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SPENDING_POWER = 1.5
"""Of t / n: 1 stops large drops a little earlier, 3 is a single look at the end in all but name."""

_SLACK = 1e-12


class SpendingSignTest:
    """Evidence that losses are likelier than gains, for one run or many side by side.

    Args:
        n_rows: rows on offer, at least 1; the last one may use all of `alpha`.
        alpha: error rate of the whole run.
        n_runs: independent runs watched at once.

    Attributes:
        n_rows: as given.
        rejected_at: row, from 1, at which each run was stopped; n_rows + 1 where it was not.

    Raises:
        ValueError: for less than one row.
    """

    def __init__(self, n_rows: int, *, alpha: float, n_runs: int = 1) -> None:
        if n_rows < 1:
            raise ValueError(f"got {n_rows} rows; expected at least 1")
        self.n_rows, self._alpha, self._n_seen = n_rows, alpha, 0
        self._alive: NDArray[np.float64] = np.ones((n_runs, 1))  # probability of each number gained, not yet stopped
        self._spent: NDArray[np.float64] = np.zeros(n_runs)
        self._gained: NDArray[np.int64] = np.zeros(n_runs, dtype=np.int64)
        self._p_at_stop: NDArray[np.float64] = np.full(n_runs, np.nan)
        self.rejected_at: NDArray[np.int64] = np.full(n_runs, n_rows + 1, dtype=np.int64)

    @property
    def spent(self) -> NDArray[np.float64]:
        """The error used up so far, per run."""
        return self._spent

    @property
    def p_values(self) -> NDArray[np.float64]:
        """Per run: the probability, if nothing dropped, of stopping earlier or of no more gains at this row.

        It is a p-value where the run has stopped and at the last row; before, it says how far the evidence is.
        """
        index = np.minimum(self._gained, self._alive.shape[1] - 1)
        now = self._spent + np.cumsum(self._alive, axis=1)[np.arange(len(index)), index]
        return np.where(np.isnan(self._p_at_stop), np.minimum(now, 1.0), self._p_at_stop)

    def add(self, values: NDArray[np.float64]) -> None:
        """See one more row of every run: below 0 is a loss, above 0 a gain, 0 a row that did not move.

        Raises:
            ValueError: for more rows than are on offer.
        """
        if self._n_seen >= self.n_rows:
            raise ValueError(f"got a row beyond the {self.n_rows} on offer")
        self._n_seen += 1
        moved = values != 0
        if moved.any():
            grown = np.pad(self._alive, ((0, 0), (0, 1)))
            halves = 0.5 * grown[moved]
            halves[:, 1:] += 0.5 * grown[moved, :-1]
            grown[moved] = halves
            self._alive = grown
        self._gained += values > 0
        self._look()

    def _look(self) -> None:
        runs = np.arange(self._gained.size)
        sums = np.cumsum(self._alive, axis=1)
        may_spend = self._alpha * (self._n_seen / self.n_rows) ** SPENDING_POWER - self._spent
        boundary = (sums <= may_spend[:, None] + _SLACK).sum(axis=1) - 1
        spends = boundary >= 0
        stopped = spends & (self._gained <= boundary) & (self.rejected_at > self.n_rows)
        self._p_at_stop[stopped] = (self._spent + sums[runs, np.minimum(self._gained, sums.shape[1] - 1)])[stopped]
        self.rejected_at[stopped] = self._n_seen
        self._spent = self._spent + np.where(spends, sums[runs, np.maximum(boundary, 0)], 0.0)
        self._alive[np.arange(self._alive.shape[1])[None, :] <= boundary[:, None]] = 0.0
