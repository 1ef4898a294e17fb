"""Several optimizers over one or several tasks: Holm-corrected differences to a reference.

Symbols: T tasks, task t with n_t examples that all compared strategies have a score for, d_te the difference of
strategy and reference on example e of task t.

* difference = mean over tasks of the mean over examples, every task counting the same; its test exchanges the signs
  of d_te / (T n_t) example by example (with one task it is the test of `paired_tests`), its interval is that of their
  mean, a little wide where tasks differ. It is about these tasks, not about tasks at large. Examples that share a group
  are exchanged and resampled together.
* p-values against the reference are Holm-corrected over the strategies.

There are no mean ranks and no test of them: over one task they say what the scores say, and Friedman's test has no
power below eight tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from copa_harness.formatting import counted, number, probability
from copa_harness.judge.intervals import Groups, group_labels, grouped
from copa_harness.judge.paired_tests import (
    PairedScores,
    difference_interval,
    paired_difference,
    permutation_p_value,
)
from copa_harness.results import Interval

Scores = Mapping[str, float | None]
_Labels = tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class StrategyRow:
    """One strategy beside the reference.

    Attributes:
        strategy: its name.
        score: mean over tasks of the mean score on the common examples, 0..1.
        difference: to the reference, -1..1; 0 for the reference itself.
        interval: around the difference.
        p_value: of "no difference", on its own; 1 for the reference.
        adjusted: the same, Holm-corrected over the strategies.
    """

    strategy: str
    score: float
    difference: float
    interval: Interval
    p_value: float
    adjusted: float


@dataclass(frozen=True, slots=True)
class StrategyComparison:
    """Strategies over the same examples of the same tasks.

    Attributes:
        reference: what the others are compared with.
        tasks: the tasks, in order of their names.
        n: common examples over all tasks.
        rows: the strategies, best score first.
    """

    reference: str
    tasks: tuple[str, ...]
    n: int
    rows: tuple[StrategyRow, ...]

    def sentence(self, *, alpha: float = 0.05) -> str:
        """Which strategies are shown to be better or worse than the reference, and what to do if none is."""
        shown = [row for row in self.rows if row.strategy != self.reference and row.adjusted <= alpha]
        over = f"{counted(self.n, 'example')} of {counted(len(self.tasks), 'task')}"
        if not shown:
            return (
                f"No strategy is shown to differ from {self.reference} on {over} (Holm-corrected). Next: choose by "
                f"cost, or add test examples."
            )
        parts = [
            f"{row.strategy} {'better' if row.difference > 0 else 'worse'} by {number(abs(row.difference))} "
            f"(adjusted {probability(row.adjusted)})"
            for row in shown
        ]
        return f"Against {self.reference} on {over}: {', '.join(parts)}."


def compare_strategies(
    scores: Mapping[str, Mapping[str, Scores]],
    *,
    reference: str,
    level: float = 0.95,
    seed: int = 0,
    groups: Mapping[str, Mapping[str, str]] | None = None,
) -> StrategyComparison:
    """Compare strategies with a reference.

    Args:
        scores: strategy -> task -> example id -> score 0..1. Only tasks that every strategy has run count, and of
            those the examples every strategy has a score for.
        reference: one of the strategies.
        level: two-sided confidence of each interval (not corrected).
        seed: of the resampling methods.
        groups: task -> example id -> group, where examples share one.

    Raises:
        ValueError: the reference is missing, or the strategies have no example in common.
    """
    if reference not in scores:
        raise ValueError(f"got {sorted(scores)} without the reference {reference!r}; expected it among the strategies")
    tasks = sorted(set.intersection(*(set(by_task) for by_task in scores.values())))
    table: dict[str, NDArray[np.float64]] = {}  # task -> strategies x common examples
    names = list(scores)
    common_ids: dict[str, list[str]] = {}
    for task in tasks:
        scored = [{key for key, score in scores[name][task].items() if score is not None} for name in names]
        ids = sorted(set.intersection(*scored))
        if ids:
            common_ids[task] = ids
            table[task] = np.asarray([[float(scores[name][task][key] or 0.0) for key in ids] for name in names])
    if not table:
        raise ValueError("got strategies without a common example; expected at least one task all of them have run")
    anchor = names.index(reference)
    labels = {task: group_labels(ids, (groups or {}).get(task)) for task, ids in common_ids.items()}
    others = [index for index in range(len(names)) if index != anchor]
    compared = {
        index: _difference(table, common_ids, labels, anchor, index, level=level, seed=seed) for index in others
    }
    adjusted = dict(zip(others, holm_adjusted([compared[index][2] for index in others]), strict=True))
    rows = []
    for index, name in enumerate(names):
        nothing = (0.0, Interval(0.0, 0.0, level, "none"), 1.0)
        difference, interval, p_value = compared.get(index, nothing)
        score = float(np.mean([cells[index].mean() for cells in table.values()]))
        rows.append(StrategyRow(name, score, difference, interval, p_value, adjusted.get(index, 1.0)))
    return StrategyComparison(
        reference=reference,
        tasks=tuple(table),
        n=sum(cells.shape[1] for cells in table.values()),
        rows=tuple(sorted(rows, key=lambda row: (-row.score, row.strategy))),
    )


def holm_adjusted(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjusted p-values, in the order given.

    Raises:
        ValueError: for a p-value outside 0..1.

    Source: Holm (1979); equal to `statsmodels.stats.multitest.multipletests(method="holm")`.
    """
    if any(math.isnan(p) or not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"got p-values {[p for p in p_values if not 0 <= p <= 1]}; expected numbers in 0..1")
    adjusted = [0.0] * len(p_values)
    greatest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        greatest = max(greatest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = greatest
    return tuple(adjusted)


def _difference(
    table: Mapping[str, NDArray[np.float64]],
    ids: Mapping[str, Sequence[str]],
    labels: Mapping[str, _Labels],
    anchor: int,
    index: int,
    *,
    level: float,
    seed: int,
) -> tuple[float, Interval, float]:
    """Mean difference over tasks, its interval and its p-value."""
    if len(table) == 1:
        ((task, cells),) = table.items()
        together = labels[task]
        groups = None if together is None else dict(zip(ids[task], together, strict=True))
        pairs = PairedScores(ids[task], cells[anchor].tolist(), cells[index].tolist(), groups)
        paired = paired_difference(pairs, level=level, seed=seed)
        return paired.difference, paired.interval, paired.p_value
    by_task = [_units(cells[index] - cells[anchor], labels[task]) for task, cells in table.items()]
    weighted = np.concatenate([units.totals / (len(by_task) * units.n) for units in by_task])
    scaled = weighted * weighted.size  # their mean is the difference, and each about the size of one
    interval = difference_interval(scaled, binary=False, level=level, seed=seed)
    return float(math.fsum(weighted)), interval, permutation_p_value(scaled, seed=seed)


def _units(values: NDArray[np.float64], labels: _Labels) -> Groups:
    """What is independent of one another: whole groups, or examples where none share one."""
    return Groups(values, np.ones(values.size)) if labels is None else grouped(values, labels)
