"""Sequential mode: examples in a seeded random order, and a verdict as soon as it is certain enough.

A monitor per gate watches the rows and never takes back a verdict:

* threshold (`min_score`): will the mean of this very split reach it? Rows are drawn without replacement, so the
  question is settled by the last row at the latest, and by certainty as soon as the rest cannot change it. A verdict
  that comes early differs from that of all rows with probability at most alpha.
* regression (`max_regression`, `better_than`): is the true mean difference below (above) minus the margin? For
  right/wrong scores without a margin McNemar's exact test is looked at after every row (`alpha_spending`). For all
  else half of alpha goes to looking after every row (betting e-process, `betting`), half to the test of all rows at
  the end (`noninferiority`). Either way the whole errs with probability at most alpha; the answer says how much
  power stopping early costs.

Examples of one group are drawn together and are one bet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from copa_harness.judge.sequential.alpha_spending import SpendingSignTest
from copa_harness.judge.sequential.betting import MeanAbove, MeanBelow
from copa_harness.results import Verdict

_SLACK = 1e-9


def random_order(
    ids: Sequence[str], *, seed: int, groups: Mapping[str, str] | None = None
) -> tuple[tuple[str, ...], ...]:
    """The examples in a random order, as units to be drawn together: one example each, or one group.

    The order depends on the ids and the seed only, not on the order they come in: a run that is repeated sees the
    same rows first, and nobody can have chosen them.

    Args:
        ids: example ids, each once.
        seed: of the order.
        groups: group by example id; an example that is missing is a unit of its own.

    Raises:
        ValueError: for repeated ids.
    """
    if len(set(ids)) != len(ids):
        raise ValueError(f"got {len(ids) - len(set(ids))} repeated example ids; expected each once")
    units: dict[tuple[bool, str], list[str]] = {}
    for example_id in sorted(ids):
        in_group = groups is not None and example_id in groups
        label = groups[example_id] if groups is not None and in_group else example_id
        units.setdefault((in_group, label), []).append(example_id)
    shuffled = [tuple(units[key]) for key in sorted(units)]
    order = np.random.default_rng(seed).permutation(len(shuffled))
    return tuple(shuffled[index] for index in order)


class ThresholdMonitor:
    """Will the mean of the split reach `threshold`?

    Args:
        threshold: least mean score, 0..1.
        sizes: examples per unit, in the order they will be drawn.
        alpha: probability that an early verdict is not the one of all rows.
    """

    def __init__(self, threshold: float, *, sizes: Sequence[int], alpha: float) -> None:
        self.threshold, self.alpha = threshold, alpha
        self._n_rows, self._largest = sum(sizes), max(sizes, default=1)
        # Units of unequal size are bets on sum(score - threshold) / largest, which is 0 on average at the threshold.
        low, high = -threshold, 1.0 - threshold
        self._reaches = MeanAbove(0.0, low=low, high=high, n_rows=len(sizes))
        self._misses = MeanBelow(0.0, low=low, high=high, n_rows=len(sizes))
        self._n_seen, self._least, self._most = 0, 0.0, 0.0
        self.n_failed = 0
        self.verdict: Verdict | None = None

    @property
    def p_values(self) -> tuple[float, float]:
        """Of "misses the threshold" and of "reaches it": small ones refute."""
        return self._reaches.p_value, self._misses.p_value

    @property
    def is_certain(self) -> bool:
        """Whether the rows still to come cannot change the verdict."""
        rest = self._n_rows - self._n_seen
        needed = self.threshold * self._n_rows - _SLACK
        return self._least >= needed or self._most + rest < needed

    def add(self, scores: Sequence[float | None]) -> None:
        """See one more unit. A failed row (None) counts against whatever verdict is near."""
        if self.verdict is not None:
            return
        worst = [0.0 if score is None else score for score in scores]
        best = [1.0 if score is None else score for score in scores]
        self._n_seen += len(scores)
        self._least += sum(worst)
        self._most += sum(best)
        self.n_failed += sum(score is None for score in scores)
        self._reaches.add(sum(score - self.threshold for score in worst) / self._largest)
        self._misses.add(sum(score - self.threshold for score in best) / self._largest)
        rest = self._n_rows - self._n_seen
        needed = self.threshold * self._n_rows - _SLACK
        if self._least >= needed:
            self.verdict = Verdict.PASS
        elif self._most + rest < needed:
            self.verdict = Verdict.FAIL
        elif rest == 0:
            n_scored = self._n_rows - self.n_failed
            reached = self._least >= self.threshold * n_scored - _SLACK
            self.verdict = Verdict.UNDECIDED if not n_scored else Verdict.PASS if reached else Verdict.FAIL
        elif self._reaches.p_value <= self.alpha:
            self.verdict = Verdict.PASS
        elif self._misses.p_value <= self.alpha:
            self.verdict = Verdict.FAIL


class RegressionMonitor:
    """Has the true mean dropped by more than `margin`, or is that ruled out?

    Args:
        margin: allowed drop, 0..1; 0 asks whether the score fell (fail) or rose (pass).
        largest: most examples in a unit.
        alpha: error rate of either decision.
        n_units: units on offer, when scores are right or wrong and each example is a unit: without a margin the
            exact test is then looked at. Should a graded score turn up all the same, nothing is decided early.
    """

    def __init__(self, margin: float, *, largest: int, alpha: float, n_units: int | None = None) -> None:
        self.margin, self._largest = margin, largest
        exact = n_units is not None and margin == 0 and largest == 1
        self._falls = SpendingSignTest(n_units or 1, alpha=alpha) if exact else None
        self._rises = SpendingSignTest(n_units or 1, alpha=alpha) if exact else None
        self._is_graded = False
        self.alpha = alpha if exact else alpha / 2
        self._not_worse = MeanAbove(0.0, low=-1.0 + margin, high=1.0 + margin)
        self._worse = MeanBelow(0.0, low=-1.0 + margin, high=1.0 + margin)
        self.verdict: Verdict | None = None

    @property
    def p_values(self) -> tuple[float, float]:
        """Of "the drop is the margin or more" and of "at most the margin": small ones refute."""
        if self._falls is not None and self._rises is not None:
            return float(self._rises.p_values[0]), float(self._falls.p_values[0])
        return self._not_worse.p_value, self._worse.p_value

    @property
    def is_exact(self) -> bool:
        """Whether the exact test is looked at, which needs no test of all rows at the end."""
        return self._falls is not None and not self._is_graded

    @property
    def alpha_at_the_end(self) -> float:
        """The error rate of a test of all rows that agrees with what was spent on looking."""
        if self._falls is None or self._rises is None:
            return self.alpha
        if self._is_graded:
            return max(self.alpha - float(max(self._falls.spent[0], self._rises.spent[0])), self.alpha / 100)
        level = float(min(self._falls.level_of_last_look[0], self._rises.level_of_last_look[0]))
        return max(level, self.alpha / 100)  # a level of 0 is for so few moved rows that no test rejects

    def add(self, differences: Sequence[float]) -> None:
        """See the differences (new - baseline) of one more unit; none for a unit that cannot be compared."""
        if self.verdict is not None:
            return
        if self._falls is not None and self._rises is not None:
            self._is_graded |= any(difference not in (-1.0, 0.0, 1.0) for difference in differences)
            if not self._is_graded:
                moved = np.array([sum(differences)])
                self._falls.add(moved)
                self._rises.add(-moved)
                if self._falls.rejected_at[0] <= self._falls.n_rows:
                    self.verdict = Verdict.FAIL
                elif self._rises.rejected_at[0] <= self._rises.n_rows:
                    self.verdict = Verdict.PASS
            return
        if not differences:
            return
        value = sum(difference + self.margin for difference in differences) / self._largest
        self._not_worse.add(value)
        self._worse.add(value)
        if self._worse.p_value <= self.alpha:
            self.verdict = Verdict.FAIL
        elif self._not_worse.p_value <= self.alpha:
            self.verdict = Verdict.PASS
