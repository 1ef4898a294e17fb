"""Has the score dropped? Three answers about a margin m: pass, fail, undecided.

Symbols: delta = true mean difference (new - baseline), m = margin >= 0 (`max_regression`), alpha = error rate.

    pass       "delta <= -m" is refuted at alpha: the drop, if any, is smaller than the margin
    fail       "delta >= 0" is refuted at the gate's share of alpha, and the observed drop is at least the margin
    undecided  neither: the most that can have been lost is stated, and the rows that would decide it

Passing is undivided, for a suite that passes claims all its gates together. Failing is divided among the gates of a
suite that ask the same question (`alpha_fail`), so an unchanged suite fails with probability at most alpha. A failure
is "proven beyond the margin" when "delta >= -m" is refuted as well.

                  against 0 (fail, and a gain at m = 0)     against -m (pass, "proven")
    right/wrong   exact unconditional                       exact unconditional
    graded        paired permutation                        Gaffke's; t test corrected for skewness, approximate
    groups        the same two on whole groups

The exact unconditional test of "no drop" finds more than McNemar's, which conditions on how many rows moved, and keeps
its level for every share that moves. The t test passes where Gaffke's cannot decide and there are rows enough; it is
the one test here that is not exact, and is named where it decides. The permutation test asks whether the two runs can
be exchanged: it fails a program whose mean is unchanged if a few rows gained much and many lost a little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from copa_harness.judge.exact_tests import (
    bounded_mean_p_value,
    clustered_bounded_p_value,
    exact_share_p_value,
    skewed_t_p_value,
)
from copa_harness.judge.intervals import group_labels, grouped, n_informative
from copa_harness.judge.paired_tests import (
    Alternative,
    PairedDifference,
    PairedScores,
    gained_and_lost,
    is_right_wrong,
    no_change_p_value,
    paired_difference,
)
from copa_harness.judge.power import drop_to_see, rows_for_t, rows_to_pass
from copa_harness.results import Verdict

MIN_ROWS_FOR_T = 50
"""Rows below which the t test is not asked."""

MIN_MOVED_FOR_T = 30
"""Rows that must differ from the commonest change: with 20 of 100 it passed a drop of the margin in 6.7 % at 5 %."""

MIN_GROUPS_FOR_T = 20
"""Groups below which it is not, and that must differ."""

_NEARLY_ONE = 1 - 1e-9


@dataclass(frozen=True, slots=True)
class Noninferiority:
    """The answer and what it rests on.

    Attributes:
        verdict: PASS, FAIL or UNDECIDED.
        paired: the difference with its 1 - 2 alpha interval, which reaches the margin exactly when the gate does not
            pass.
        margin: the drop that is allowed, 0..1.
        p_not_worse: p-value of "the drop is the margin or more"; small means pass.
        p_worse: p-value of "the drop is at most the margin".
        p_any_drop: p-value of "it did not drop at all"; small, with a drop of the margin or more, means fail.
        method: the test behind `p_not_worse`.
        rows_to_decide: rows at which an unchanged program passes in 80 % of runs; None when no reasonable number is
            enough, or nothing is open.
        smallest_visible_drop: the smallest true drop these rows fail in 80 % of runs, infinite when they see none; None
            where nothing is open.
    """

    verdict: Verdict
    paired: PairedDifference
    margin: float
    p_not_worse: float
    p_worse: float
    p_any_drop: float
    method: str
    rows_to_decide: int | None
    smallest_visible_drop: float | None

    @property
    def most_lost(self) -> float:
        """The most that can have been lost, 0..1, at the confidence 1 - alpha."""
        return max(0.0, -self.paired.interval.low)


def noninferiority(
    pairs: PairedScores, *, margin: float, alpha: float = 0.05, alpha_fail: float | None = None, seed: int = 0
) -> Noninferiority:
    """Judge a drop against a margin.

    Args:
        pairs: baseline (`before`) and new (`after`) scores of the same examples.
        margin: the largest drop that is acceptable, 0..1.
        alpha: error rate of a pass.
        alpha_fail: error rate of a failure; by default the same. 0 never fails.
        seed: of the resampling methods.

    Raises:
        ValueError: for a margin outside 0..1 or no pairs.
    """
    if not 0 <= margin <= 1:
        raise ValueError(f"got margin={margin}; expected a drop between 0 and 1, such as 0.05")
    if not pairs.ids:
        raise ValueError("got no examples in common; expected at least one paired example")
    failing = alpha if alpha_fail is None else alpha_fail
    paired = paired_difference(pairs, level=1 - 2 * alpha, seed=seed)
    tests = _Tests.of(pairs, margin=margin, seed=seed)
    p_not_worse, method = tests.not_worse(alpha)
    p_any_drop = tests.of_no_change("less")
    if p_any_drop <= failing and -paired.difference >= margin - 1e-9 and paired.difference < 0:
        verdict = Verdict.FAIL
    else:
        verdict = Verdict.PASS if p_not_worse <= alpha and paired.difference > -margin else Verdict.UNDECIDED
    # The interval is another method's: what the exact test decides, its end must not deny.
    reaches = paired.interval.low <= -margin
    if reaches == (verdict is Verdict.PASS):
        paired = replace(paired, interval=replace(paired.interval, low=-margin))
    is_open = verdict is Verdict.UNDECIDED
    return Noninferiority(
        verdict=verdict,
        paired=paired,
        margin=margin,
        p_not_worse=p_not_worse,
        p_worse=p_any_drop if margin == 0 else tests.against_margin("less"),
        p_any_drop=p_any_drop,
        method=method,
        rows_to_decide=tests.rows_to_decide(alpha) if is_open else None,
        smallest_visible_drop=tests.visible_drop(failing or alpha) if is_open else None,
    )


@dataclass(frozen=True, slots=True)
class _Tests:
    """The tests that fit one kind of scores.

    Attributes:
        differences: new - baseline, by row.
        labels: the group of each row, None where rows are independent.
        margin: the drop that is allowed.
        of_no_change: p-value of "no change" against a change to one side.
        against_margin: p-value of "a drop of exactly the margin" against more (greater) or less.
        right_wrong: whether scores are 0 or 1 and rows are independent.
    """

    differences: NDArray[np.float64]
    labels: Sequence[str] | None
    margin: float
    of_no_change: Callable[[Alternative], float]
    against_margin: Callable[[Alternative], float]
    right_wrong: bool

    @classmethod
    def of(cls, pairs: PairedScores, *, margin: float, seed: int) -> _Tests:
        old, new = np.asarray(pairs.before, dtype=np.float64), np.asarray(pairs.after, dtype=np.float64)
        differences, labels = new - old, group_labels(pairs.ids, pairs.groups)
        n, null = differences.size, -min(margin, _NEARLY_ONE)
        right_wrong = labels is None and is_right_wrong(old) and is_right_wrong(new)
        gained, lost = gained_and_lost(differences)

        def against_margin(side: Alternative) -> float:
            if right_wrong:
                return exact_share_p_value(round(gained), round(lost), n, difference=null, alternative=side)
            if labels is not None:
                return clustered_bounded_p_value(differences, labels, difference=-margin, alternative=side, seed=seed)
            return bounded_mean_p_value(differences, mean=-margin, alternative=side, low=-1.0, high=1.0, seed=seed)

        def of_no_change(side: Alternative) -> float:
            return no_change_p_value(differences, labels, right_wrong=right_wrong, alternative=side, seed=seed)

        return cls(differences, labels, margin, of_no_change, against_margin, right_wrong)

    def not_worse(self, alpha: float) -> tuple[float, str]:
        """P-value of "the drop is the margin or more", and the test it is of."""
        if self.right_wrong:
            change = self.of_no_change if self.margin == 0 else self.against_margin
            return change("greater"), "exact unconditional test"
        exact = self.against_margin("greater")
        if self.margin == 0:
            exact = max(exact, self.of_no_change("greater"))
        if exact <= alpha or self.margin == 0 or not self._is_enough_for_t:
            return exact, "Gaffke's test"
        values, sizes = self._units
        approximate = skewed_t_p_value(values, sizes, mean=-self.margin, alternative="greater")
        if approximate > alpha:
            return exact, "Gaffke's test"
        return approximate, "t test corrected for skewness, approximate"

    @property
    def _units(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Totals and sizes of what is independent: groups, or rows."""
        if self.labels is None:
            return self.differences, np.ones(self.differences.size)
        groups = grouped(self.differences, self.labels)
        return groups.totals, groups.sizes

    @property
    def _is_enough_for_t(self) -> bool:
        values, sizes = self._units
        n_least, n_moved = MIN_ROWS_FOR_T, MIN_MOVED_FOR_T
        if self.labels is not None:
            n_least = n_moved = MIN_GROUPS_FOR_T
        return values.size >= n_least and n_informative(np.round(values / sizes, 9)) >= n_moved

    def rows_to_decide(self, alpha: float) -> int | None:
        """Rows at which an unchanged program passes, by what moved here; never fewer than there are."""
        n = self.differences.size
        if self.margin == 0:
            return None
        if self.right_wrong:
            moved = float(np.abs(self.differences).mean())
            needed = rows_to_pass(disagreement=moved, margin=self.margin, alpha=alpha)
            return None if needed is None else max(needed, n + 1)
        values, sizes = self._units
        units = 0.0
        if self._is_enough_for_t:
            each = (values - values.sum() / n * sizes) / sizes.mean()
        else:
            each = values / sizes
            # Where nothing moves, Gaffke's test needs so many units, each of which may hide the one that falls by 1.
            units = math.log(alpha) / math.log1p(-min(self.margin, _NEARLY_ONE))
        units += rows_for_t(float(np.std(each)), margin=self.margin, alpha=alpha)
        return max(math.ceil(units * float(sizes.mean()) - 1e-9), n + 1)

    def visible_drop(self, alpha: float) -> float:
        """The smallest true drop these rows fail in 80 % of runs, where scores are graded by the t test's formula."""
        if self.right_wrong:
            moved = float(np.abs(self.differences).mean())
            return drop_to_see(self.differences.size, disagreement=moved, margin=self.margin, alpha=alpha)
        values, sizes = self._units
        if values.size < math.log2(1 / alpha):  # so few signs cannot be against it
            return math.inf
        error = (float(np.std(values / sizes)) or 1 / math.sqrt(values.size)) / math.sqrt(values.size)
        seen = math.sqrt(rows_for_t(error, margin=1.0, alpha=alpha))
        drop = max(seen, self.margin + math.sqrt(rows_for_t(error, margin=1.0, alpha=0.5)))
        return drop if drop <= 1 else math.inf
