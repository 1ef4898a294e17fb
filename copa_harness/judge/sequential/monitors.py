"""Sequential mode: examples in a seeded random order, and a verdict as soon as it is certain enough.

A monitor per gate watches the rows and never takes back a verdict:

* threshold (`min_score`): will the mean of this very split reach it? Rows are drawn without replacement, so the
  question is settled by the last row at the latest, and by certainty as soon as the rest cannot change it. A verdict
  that comes early differs from that of all rows with probability at most alpha.
* regression (`max_regression`, `better_than`): did the score fall, by the margin or more as far as seen? Without a
  margin also: did it rise? For right/wrong scores the exact sign test is looked at after every row (`alpha_spending`);
  for all else half of alpha goes to looking after every row (betting e-process, `betting`), half to the test of all
  rows at the end (`noninferiority`). That a drop of the margin is ruled out is only asked at the end, of all rows, and
  costs nothing: looking for it saves next to no rows of an unchanged program and takes 7 to 15 points of its passes.

Examples of one group are drawn together and are one bet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from copa_harness.judge.sequential.alpha_spending import SpendingSignTest
from copa_harness.judge.sequential.betting import MeanAbove, MeanBelow
from copa_harness.results import Verdict

LEAST_GAIN = 5e-4
"""Mean differences below it are written as 0.000, which nobody takes for a gain."""

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
    """Did the score fall, by at least `margin` as far as seen? Without a margin also: did it rise?

    Args:
        margin: allowed drop, 0..1.
        largest: most examples in a unit.
        alpha: error rate of a pass.
        alpha_fail: error rate of a failure.
        n_units: units on offer, when scores are right or wrong and each example is a unit: the exact test is then
            looked at. Should a graded score turn up all the same, nothing is decided early.
    """

    def __init__(
        self, margin: float, *, largest: int, alpha: float, alpha_fail: float, n_units: int | None = None
    ) -> None:
        self.margin, self._largest = margin, largest
        self.is_exact = n_units is not None and largest == 1
        share = 1.0 if self.is_exact else 0.5  # of the error rate, what is spent on looking
        self._alpha, self._alpha_fail = alpha, alpha_fail
        self._alpha_looking, self._alpha_fail_looking = share * alpha, share * alpha_fail
        self._falls = (
            SpendingSignTest(n_units or 1, alpha=alpha_fail) if self.is_exact else MeanBelow(0.0, low=-1.0, high=1.0)
        )
        self._rises = (
            SpendingSignTest(n_units or 1, alpha=alpha) if self.is_exact else MeanAbove(0.0, low=-1.0, high=1.0)
        )
        self._total, self._n = 0.0, 0
        self.is_graded = False
        self.verdict: Verdict | None = None

    @property
    def p_values(self) -> tuple[float, float]:
        """Of "it did not rise" and of "it did not fall": small ones refute, at whatever row one looks."""
        rises, falls = (
            float(test.p_values[0]) if isinstance(test, SpendingSignTest) else test.p_value
            for test in (self._rises, self._falls)
        )
        return rises, falls

    @property
    def left(self) -> tuple[float, float]:
        """What is left of the error rates of a pass and of a failure, for the test of all rows at the end."""
        if isinstance(self._falls, SpendingSignTest) and isinstance(self._rises, SpendingSignTest):
            rises, falls = float(self._rises.spent[0]), float(self._falls.spent[0])
        else:
            rises, falls = self._alpha_looking, self._alpha_fail_looking
        # Nobody looked for "no drop of the margin", so all of it is left.
        passing = self._alpha if self.margin > 0 else max(self._alpha - rises, self._alpha / 100)
        return passing, max(self._alpha_fail - falls, self._alpha_fail / 100)

    def add(self, differences: Sequence[float]) -> None:
        """See the differences (new - baseline) of one more unit; none for a unit that cannot be compared."""
        if self.verdict is not None:
            return
        self._total, self._n = self._total + sum(differences), self._n + len(differences)
        self.is_graded |= any(difference not in (-1.0, 0.0, 1.0) for difference in differences)
        if isinstance(self._falls, SpendingSignTest) and isinstance(self._rises, SpendingSignTest):
            if self.is_graded:
                return
            moved = np.array([sum(differences)])
            self._falls.add(moved)
            self._rises.add(-moved)
            fell, rose = (test.rejected_at[0] <= test.n_rows for test in (self._falls, self._rises))
        elif isinstance(self._falls, MeanBelow) and isinstance(self._rises, MeanAbove) and differences:
            self._falls.add(sum(differences) / self._largest)
            self._rises.add(sum(differences) / self._largest)
            fell = self._falls.p_value <= self._alpha_fail_looking
            rose = self._rises.p_value <= self._alpha_looking
        else:
            return
        if fell and self._total <= -self.margin * self._n + _SLACK:
            self.verdict = Verdict.FAIL
        elif rose and self.margin == 0 and self._total >= LEAST_GAIN * self._n:
            self.verdict = Verdict.PASS
