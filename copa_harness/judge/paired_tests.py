"""Two runs over the same examples, compared example by example.

Symbols: differences d_i = after_i - before_i in [-1, 1] over n paired examples; g = sum of the positive parts
("gained"), l = sum of the negative parts ("lost"), delta = (g - l) / n.

* right/wrong: the exact unconditional test (`exact_tests`) and Tango's score interval, which stays honest at
  g = l = 0 where Wald and Newcombe intervals collapse (Tango 1998, Stat. Med. 17:891).
* graded: the paired permutation test (random signs on d_i, exact when there are few) and the BCa bootstrap of the
  mean difference. With too few non-zero differences to resample, Tango's interval with fractional g and l is used:
  of all d on [-1, 1] with these g and l, the values -1, 0, 1 have the greatest variance.

Every table and every gate has its p-value of "nothing changed" from `no_change_p_value`, and an interval ends at 0
where that test and its own method disagree about 0: so no two places say different things of the same two runs.

Pairing keeps what the examples share out of the noise; unpaired comparisons need several times the examples (Miller
2024, arXiv 2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from copa_harness.judge.exact_tests import exact_share_p_value, tango_bounds
from copa_harness.judge.intervals import (
    MIN_DISTINCT_ROWS,
    N_RESAMPLES,
    bootstrap_bounds,
    group_bootstrap_bounds,
    group_labels,
    grouped,
)
from copa_harness.results import EvaluationResult, Interval

Alternative = Literal["less", "greater"]

GATE_LEVEL = 0.9
"""Confidence of intervals beside a gate's test at 5 %, which is one-sided: 1 - 2 alpha, so that they say the same."""

_CHUNK = 1_000_000

_DECIMALS = 10


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of after - before over `n` paired examples, -1..1.

    `p_value` is two-sided, of "nothing changed" (1 when no example changed). `n_better` and `n_worse` count the
    examples that moved; `disagreement` is the mean of |d|, for right/wrong the share of examples that moved;
    `n_groups` counts the groups when examples share them, else 0.
    """

    difference: float
    interval: Interval
    p_value: float
    method: str
    n: int
    n_better: int = 0
    n_worse: int = 0
    disagreement: float = 0.0
    n_groups: int = 0

    @property
    def p_one_sided(self) -> float:
        """Of "no change in the direction that is seen", as gates test it."""
        return self.p_value / 2


@dataclass(frozen=True, slots=True)
class PairedScores:
    """Scores of two runs over the same examples.

    Attributes:
        ids: the examples' ids, each once.
        before: scores of the reference run, 0..1, in the same order.
        after: scores of the new run, 0..1, in the same order.
        groups: group by example id, where examples share one; None for none.
        n_only_before: examples with a score in the reference run only.
        n_only_after: examples with a score in the new run only.
    """

    ids: Sequence[str]
    before: Sequence[float]
    after: Sequence[float]
    groups: Mapping[str, str] | None = None
    n_only_before: int = 0
    n_only_after: int = 0


def scores_by_id(evaluation: EvaluationResult | Iterable[tuple[str, float | None]]) -> dict[str, float | None]:
    """Scores under their example id; a repeated id (a duplicated example) gets `#2`, `#3`, ... in order."""
    if isinstance(evaluation, EvaluationResult):
        return by_id(evaluation, "score")
    return _numbered(evaluation)


def by_id(evaluation: EvaluationResult, attribute: str) -> dict[str, Any]:
    """An attribute of every example's result, under ids as `scores_by_id` has them."""
    return _numbered((row.example_id, getattr(row, attribute)) for row in evaluation.results)


def _numbered(rows: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    seen: dict[str, int] = {}
    for example_id, value in rows:
        seen[example_id] = seen.get(example_id, 0) + 1
        found[example_id if seen[example_id] == 1 else f"{example_id}#{seen[example_id]}"] = value
    return found


def pair_up(
    before: Mapping[str, float | None], after: Mapping[str, float | None], *, groups: Mapping[str, str] | None = None
) -> PairedScores:
    """Pair two runs by example id, in order of the id; examples without a score on either side are only counted."""
    scored_before = {example_id: score for example_id, score in before.items() if score is not None}
    scored_after = {example_id: score for example_id, score in after.items() if score is not None}
    ids = tuple(sorted(scored_before.keys() & scored_after.keys()))
    return PairedScores(
        ids=ids,
        before=tuple(scored_before[example_id] for example_id in ids),
        after=tuple(scored_after[example_id] for example_id in ids),
        groups=groups,
        n_only_before=len(scored_before) - len(ids),
        n_only_after=len(scored_after) - len(ids),
    )


def paired_difference(pairs: PairedScores, *, level: float = 0.95, seed: int = 0) -> PairedDifference:
    """Compare two runs over the same examples.

    The ids make the answer independent of the order of the examples, and a repeated id is refused: the same example
    counted twice is not two observations.

    Args:
        pairs: scores before and after.
        level: two-sided confidence of the interval.
        seed: of the resampling methods.

    Returns:
        The difference; over no examples at all it is nan with the interval -1..1.

    Raises:
        ValueError: for unequal lengths, repeated ids or scores outside 0..1.
    """
    ids, before, after = pairs.ids, pairs.before, pairs.after
    if not len(before) == len(after) == len(ids):
        raise ValueError(f"got {len(before)} before, {len(after)} after, {len(ids)} ids; expected equal lengths")
    if len(set(ids)) != len(ids):
        raise ValueError(f"got {len(ids) - len(set(ids))} repeated example ids; expected one row per example (pair_up)")
    order = sorted(range(len(ids)), key=lambda index: ids[index])
    old, new = (np.asarray([run[index] for index in order], dtype=np.float64) for run in (before, after))
    for run in (old, new):
        if run.size and not (np.all(np.isfinite(run)) and run.min() >= 0 and run.max() <= 1):
            raise ValueError(f"got scores in {run.min()}..{run.max()}; expected finite numbers in 0..1")
    differences = new - old
    n = differences.size
    if n == 0:
        return PairedDifference(math.nan, Interval(-1.0, 1.0, level, "none"), 1.0, "none", 0)
    gained, lost = gained_and_lost(differences)
    binary = is_right_wrong(old) and is_right_wrong(new)
    labels = group_labels([ids[index] for index in order], pairs.groups)
    if labels is not None:
        interval = clustered_difference_interval(differences, labels, level=level, seed=seed)
        method = "paired permutation of groups"
    else:
        interval = difference_interval(differences, binary=binary, level=level, seed=seed)
        method = "exact unconditional test" if binary else "paired permutation"
    difference = float(math.fsum(differences) / n)
    side: Alternative = "greater" if difference > 0 else "less"
    p_value = min(1.0, 2 * no_change_p_value(differences, labels, right_wrong=binary, alternative=side, seed=seed))
    return PairedDifference(
        difference=difference,
        interval=_agreeing(interval, p_value),
        p_value=p_value,
        method=method,
        n=n,
        n_better=int((differences > 0).sum()),
        n_worse=int((differences < 0).sum()),
        disagreement=(gained + lost) / n,
        n_groups=0 if labels is None else len(set(labels)),
    )


def is_right_wrong(scores: NDArray[np.float64]) -> bool:
    """Whether every score is 0 or 1."""
    return bool(np.all((scores == 0) | (scores == 1)))


def gained_and_lost(differences: NDArray[np.float64]) -> tuple[float, float]:
    """Sum of the positive and of the (absolute) negative differences; counts when scores are right/wrong."""
    return math.fsum(differences[differences > 0]), math.fsum(-differences[differences < 0])


def difference_interval(differences: NDArray[np.float64], *, binary: bool, level: float, seed: int) -> Interval:
    """Interval of the mean difference: Tango's (right/wrong), BCa (graded), or Tango's as a bound (too few moved)."""
    gained, lost = gained_and_lost(differences)
    n_moved = int((differences != 0).sum())
    spread = bool(np.ptp(differences) > 0)
    if not binary and n_moved >= MIN_DISTINCT_ROWS and spread:
        bounds = bootstrap_bounds(differences, level=level, seed=seed)
        if bounds is not None:
            return Interval(max(-1.0, bounds[0]), min(1.0, bounds[1]), level, "bca")
    low, high = tango_bounds(gained, lost, differences.size, level=level)
    return Interval(low, high, level, "tango" if binary else "tango-bound")


def clustered_difference_interval(
    differences: NDArray[np.float64], labels: Sequence[str], *, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of a mean difference whose examples come in groups; `method` as for the mean."""
    groups = grouped(differences, labels)
    bounds = group_bootstrap_bounds(groups, level=level, seed=seed)
    if bounds is not None:
        return Interval(max(-1.0, bounds[0]), min(1.0, bounds[1]), level, "cluster-bca")
    gained, lost = gained_and_lost(differences)
    n_whole = max(1, math.floor(groups.effective_n + 1e-9))
    scale = n_whole / groups.n
    low, high = tango_bounds(gained * scale, lost * scale, n_whole, level=level)
    return Interval(low, high, level, "cluster-bound")


def no_change_p_value(
    differences: NDArray[np.float64],
    labels: Sequence[str] | None,
    *,
    right_wrong: bool,
    alternative: Alternative,
    seed: int = 0,
) -> float:
    """P-value of "nothing changed", against a change to one side; 1 where no example changed.

    Args:
        differences: after - before, one per example.
        labels: the group of each example; None where examples are independent.
        right_wrong: whether both runs' scores are 0 or 1.
        alternative: "less" asks for a loss, "greater" for a gain.
        seed: of the resampling, where scores are graded or grouped.
    """
    if labels is not None:
        return permutation_p_value(grouped(differences, labels).totals, alternative=alternative, seed=seed)
    if not right_wrong:
        return permutation_p_value(differences, alternative=alternative, seed=seed)
    gained, lost = (round(total) for total in gained_and_lost(differences))
    if gained + lost == 0:
        return 1.0
    return exact_share_p_value(gained, lost, differences.size, difference=0.0, alternative=alternative)


def _agreeing(interval: Interval, p_value: float) -> Interval:
    """The interval, ended at 0 where it would deny what the test says of 0."""
    is_shown, reaches = p_value <= 1 - interval.level + 1e-12, interval.low < 0 < interval.high
    if is_shown != reaches:
        return interval
    if is_shown:  # the nearer end is the one in dispute
        is_low = -interval.low < interval.high
        return replace(interval, low=0.0 if is_low else interval.low, high=interval.high if is_low else 0.0)
    return replace(interval, low=min(interval.low, 0.0), high=max(interval.high, 0.0))


def permutation_p_value(
    differences: NDArray[np.float64],
    *,
    alternative: Literal["two-sided", "less", "greater"] = "two-sided",
    seed: int = 0,
) -> float:
    """Paired permutation test of a mean difference of zero: the signs of the differences are exchanged.

    Zero differences change nothing under any exchange and are left out. Small problems are enumerated exactly, larger
    ones sampled, with the observed arrangement counted in, so a p-value is never 0 and the test never too eager.

    Source: Pitman (1937); Phipson & Smyth (2010) for the count. The same test as `scipy.stats.permutation_test` with
    `permutation_type="samples"` (property-tested against it), as one matrix product: scipy's takes seconds for
    thousands of rows.
    """
    moved = np.sort(differences[differences != 0])
    if moved.size == 0:
        return 1.0
    exact = moved.size <= math.log2(N_RESAMPLES)
    # Rounded, so that equal sums added in another order count as ties.
    observed = round(float(moved.sum()), _DECIMALS)
    totals = np.round(sign_flip_sums(moved) if exact else _some_exchanges(moved, seed=seed), _DECIMALS)
    added = 0 if exact else 1
    less = (int((totals <= observed).sum()) + added) / (totals.size + added)
    greater = (int((totals >= observed).sum()) + added) / (totals.size + added)
    return {"less": less, "greater": greater, "two-sided": min(1.0, 2 * min(less, greater))}[alternative]


def sign_flip_sums(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of k differences under every choice of their signs: what an exact test of "nothing changed" counts.

    Args:
        differences: (k,), or (k, m) for m columns whose signs are exchanged together, row by row.

    Returns:
        (2^k,), or (2^k, m).
    """
    sums: NDArray[np.float64] = np.zeros((1, *differences.shape[1:]))
    for difference in differences:
        sums = np.concatenate([sums - difference, sums + difference])
    return sums


def _some_exchanges(moved: NDArray[np.float64], *, seed: int) -> NDArray[np.float64]:
    """Sums under `N_RESAMPLES` random choices of signs: eight at a time, whose 256 sums are looked up by one byte."""
    rng = np.random.default_rng(seed)
    eights = np.concatenate([moved, np.zeros(-moved.size % 8)]).reshape(-1, 8)
    tables, places = sign_flip_sums(eights.T), np.arange(len(eights))
    rows = max(1, _CHUNK // len(eights))
    return np.concatenate(
        [
            tables[rng.integers(0, 256, (min(rows, N_RESAMPLES - start), len(eights)), dtype=np.uint8), places].sum(1)
            for start in range(0, N_RESAMPLES, rows)
        ]
    )
