"""Examples that share something (a passage, a document, a user) are not independent: clusters are.

Symbols: G groups, n_c examples of group c, N = sum n_c, t_c the group's total of scores or differences; the mean is
sum t_c / N. Everything here treats the group as the independent unit:

* interval: BCa bootstrap of the ratio sum t_c / sum n_c over whole groups (scipy); with too few informative groups
  Wilson's or Tango's interval at the effective number N_e = N^2 / sum n_c^2, the value for answers that always agree
  within a group (Kish 1965). Clustered standard errors for evaluations: Miller 2024, arXiv 2411.00640.
* "nothing changed": the sign of t_c is exchanged for whole groups (exact when the runs are exchangeable).
* against a margin: Gaffke's test of (t_c - n_c delta_0) / max n_c, groups being drawn independently.

Measured: at an intra-group correlation of .71, 50 groups of 10, ignoring the groups alarms in 43 % of runs at 5 %.
Knows nothing of models, files, gates or verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from copa_harness.judge.exact import bounded_mean_p_value
from copa_harness.judge.intervals import N_RESAMPLES, n_informative, wilson_interval
from copa_harness.results import Interval

MIN_GROUPS = 15
"""Groups that differ, below which whole groups are not resampled but bounded."""

_CHUNK = 1_000_000


@dataclass(frozen=True, slots=True)
class Groups:
    """Totals and sizes by group, in order of the group's label."""

    totals: NDArray[np.float64]
    sizes: NDArray[np.float64]

    @property
    def n(self) -> float:
        """Examples in all groups."""
        return float(self.sizes.sum())

    @property
    def effective_n(self) -> float:
        """Independent examples that say as much, if answers within a group always agree."""
        return self.n**2 / float((self.sizes**2).sum())

    @property
    def means(self) -> NDArray[np.float64]:
        """Mean per group."""
        return self.totals / self.sizes


def group_labels(ids: Sequence[str], groups: Mapping[str, str] | None) -> tuple[str, ...] | None:
    """The group of each example; None when no two share one, for then nothing is clustered.

    Args:
        ids: example ids.
        groups: group by example id; an example that is missing is a group of its own.
    """
    if not groups:
        return None
    # A label that is an id's must not meet a group of that name.
    labels = tuple(f"group {groups[example_id]}" if example_id in groups else f"id {example_id}" for example_id in ids)
    return labels if len(set(labels)) < len(labels) else None


def grouped(values: NDArray[np.float64], labels: Sequence[str]) -> Groups:
    """Totals and sizes of `values` by label.

    Raises:
        ValueError: for unequal lengths.
    """
    if len(labels) != values.size:
        raise ValueError(f"got {values.size} values and {len(labels)} groups; expected one group per value")
    _, index = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    sizes = np.bincount(index).astype(np.float64)
    totals = np.zeros(sizes.size)
    np.add.at(totals, index, values)
    return Groups(totals, sizes)


def clustered_mean_interval(
    scores: NDArray[np.float64], labels: Sequence[str], *, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of a mean score whose examples come in groups; `method` is "cluster-bca" or "cluster-bound"."""
    groups = grouped(scores, labels)
    bounds = _bootstrap(groups, level=level, seed=seed)
    if bounds is not None:
        return Interval(max(0.0, bounds[0]), min(1.0, bounds[1]), level, "cluster-bca")
    share = min(1.0, max(0.0, float(groups.totals.sum()) / groups.n))
    n_whole = max(1, math.floor(groups.effective_n + 1e-9))
    bound = wilson_interval(share * n_whole, n_whole, level=level)
    return Interval(bound.low, bound.high, level, "cluster-bound")


def clustered_difference_interval(
    differences: NDArray[np.float64], labels: Sequence[str], *, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of a mean difference whose examples come in groups; `method` as for the mean."""
    from copa_harness.judge.paired import gained_and_lost, tango_bounds

    groups = grouped(differences, labels)
    bounds = _bootstrap(groups, level=level, seed=seed)
    if bounds is not None:
        return Interval(max(-1.0, bounds[0]), min(1.0, bounds[1]), level, "cluster-bca")
    gained, lost = gained_and_lost(differences)
    n_whole = max(1, math.floor(groups.effective_n + 1e-9))
    scale = n_whole / groups.n
    low, high = tango_bounds(gained * scale, lost * scale, n_whole, level=level)
    return Interval(low, high, level, "cluster-bound")


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


def clustered_row_variance(differences: NDArray[np.float64], labels: Sequence[str]) -> float:
    """Variance of one example's difference that, over N independent examples, gives the clustered standard error."""
    groups = grouped(differences, labels)
    n_groups = groups.sizes.size
    if n_groups < 2:
        return 1.0
    mean = float(groups.totals.sum()) / groups.n
    return float(((groups.totals - mean * groups.sizes) ** 2).sum() * n_groups / (n_groups - 1) / groups.n)


def _bootstrap(groups: Groups, *, level: float, seed: int) -> tuple[float, float] | None:
    """BCa bounds of the ratio over whole groups, or None where there is too little to resample."""
    if n_informative(groups.means) < MIN_GROUPS:
        return None
    from scipy import stats

    def ratio(totals: NDArray[np.float64], sizes: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        quotient: NDArray[np.float64] = totals.sum(axis=axis) / sizes.sum(axis=axis)
        return quotient

    result = stats.bootstrap(
        (groups.totals, groups.sizes),
        ratio,
        paired=True,
        vectorized=True,
        confidence_level=level,
        n_resamples=N_RESAMPLES,
        batch=max(1, _CHUNK // groups.sizes.size),
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None
