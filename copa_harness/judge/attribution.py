"""What do tuned weights gain, what do optimized prompts gain, and what do they gain together?

Symbols: per example e the scores of four systems over the same examples,

                     plain prompts   optimized prompts
    base weights          a_e               b_e
    tuned weights         c_e               d_e

    prompts alone      b - a            weights alone      c - a            both      d - a
    interaction        (d - c) - (b - a) = d - b - c + a        per example, in [-2, 2]

The interaction is what the two gain together beyond the sum of what each gains alone. All effects are paired by
example, so what the examples share cancels; the interaction's interval is that of half its value, which lies in [-1, 1]
like any difference. A contrast of a 2 x 2 design: Cox (1984), Int. Stat. Rev. 52:1. This is the COPA table with error
bars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from copa_harness.formatting import counted, number
from copa_harness.judge.explanations import interval_text
from copa_harness.judge.intervals import group_labels, grouped, mean_interval
from copa_harness.judge.paired_tests import (
    PairedDifference,
    PairedScores,
    clustered_difference_interval,
    difference_interval,
    paired_difference,
    permutation_p_value,
)
from copa_harness.results import Interval

CELLS = ("base_plain", "base_optimized", "tuned_plain", "tuned_optimized")
"""The four systems: weights first, prompts second."""

Scores = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Attribution:
    """The 2 x 2 of weights and prompts over the examples all four systems have a score for.

    Attributes:
        n: examples in all four.
        means: mean score per cell (`CELLS`), 0..1.
        intervals: around them.
        prompts: gain of optimized prompts on base weights.
        weights: gain of tuned weights with plain prompts.
        both: gain of both together.
        prompts_on_tuned: gain of optimized prompts on tuned weights.
        weights_on_optimized: gain of tuned weights under optimized prompts.
        interaction: gain of both beyond the sum of the two alone, -2..2.
    """

    n: int
    means: Mapping[str, float]
    intervals: Mapping[str, Interval]
    prompts: PairedDifference
    weights: PairedDifference
    both: PairedDifference
    prompts_on_tuned: PairedDifference
    weights_on_optimized: PairedDifference
    interaction: PairedDifference

    @property
    def beyond_full_marks(self) -> float:
        """By how much the sum of the two alone goes beyond a mean of 1; so much less they gain together in any case."""
        return max(0.0, self.means["base_plain"] + self.prompts.difference + self.weights.difference - 1)

    def sentence(self) -> str:
        """`together they gain 0.040 more than the sum of the two alone (95 % interval ...)`, and what it means."""
        effect, interval = self.interaction.difference, self.interaction.interval
        if interval.low > 0:
            meaning = "each makes the other worth more: optimize them together."
        elif interval.high < -self.beyond_full_marks - 1e-9:
            meaning = "they overlap: much of what one gains the other gains too, so the cheaper one may be enough."
        elif interval.high < 0:
            meaning = "the two alone would add up to more than full marks, so this says nothing of overlap."
        else:
            meaning = f"on {counted(self.n, 'example')} the two effects cannot be told from simply adding up."
        direction = "more" if effect >= 0 else "less"
        return (
            f"Together they gain {number(abs(effect))} {direction} than the sum of the two alone "
            f"({interval_text(interval, signed=True)}); {meaning}"
        )

    def numbers(self) -> dict[str, Any]:
        """What a report says of it, as plain JSON types."""
        effects = {name: _effect(getattr(self, name)) for name in EFFECTS}
        cells = {name: [self.means[name], self.intervals[name].low, self.intervals[name].high] for name in CELLS}
        return {"n": self.n, "cells": cells, "effects": effects, "sentence": self.sentence()}


EFFECTS = ("prompts", "weights", "both", "prompts_on_tuned", "weights_on_optimized", "interaction")
"""Names of the effects of an `Attribution`, in the order they are told."""


def attribute_gains(
    *,
    base_plain: Scores,
    base_optimized: Scores,
    tuned_plain: Scores,
    tuned_optimized: Scores,
    level: float = 0.95,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
) -> Attribution:
    """Split what weights and prompts gained.

    Args:
        base_plain: scores 0..1 by example id of the program as written on the base model.
        base_optimized: of the optimized prompts on the base model.
        tuned_plain: of the program as written on the tuned model.
        tuned_optimized: of the optimized prompts on the tuned model.
        level: two-sided confidence.
        seed: of the resampling methods.
        groups: group by example id, where examples share one.

    Raises:
        ValueError: no example has a score in all four.
    """
    cells = dict(zip(CELLS, (base_plain, base_optimized, tuned_plain, tuned_optimized), strict=True))
    scored = [{key for key, score in cell.items() if score is not None} for cell in cells.values()]
    ids = sorted(set.intersection(*scored))
    if not ids:
        raise ValueError("got no example with a score in all four cells; expected the same examples in each")
    values = {name: np.asarray([float(cell[key] or 0.0) for key in ids]) for name, cell in cells.items()}
    labels = group_labels(ids, groups)

    def gain(before: str, after: str) -> PairedDifference:
        pairs = PairedScores(ids, values[before].tolist(), values[after].tolist(), groups)
        return paired_difference(pairs, level=level, seed=seed)

    plain, optimized, tuned, joint = (values[name] for name in CELLS)
    # Rounded: effects that add up exactly must not leave the last bits of floating point as a finding.
    halves = np.round((joint - optimized - tuned + plain) / 2, 12)
    if labels is None:
        interval = difference_interval(halves, binary=False, level=level, seed=seed)
        p_value = permutation_p_value(halves, seed=seed)
    else:
        interval = clustered_difference_interval(halves, labels, level=level, seed=seed)
        p_value = permutation_p_value(grouped(halves, labels).totals, seed=seed)
    interaction = PairedDifference(
        difference=2 * math.fsum(halves) / len(ids),
        interval=replace(interval, low=2 * interval.low, high=2 * interval.high),
        p_value=p_value,
        method="paired permutation" if labels is None else "paired permutation of groups",
        n=len(ids),
        n_better=int((halves > 0).sum()),
        n_worse=int((halves < 0).sum()),
        disagreement=float(np.abs(halves).mean() * 2),
        n_groups=0 if labels is None else len(set(labels)),
    )
    return Attribution(
        n=len(ids),
        means={name: float(np.mean(cell)) for name, cell in values.items()},
        intervals={
            name: mean_interval(cell.tolist(), level=level, seed=seed, groups=labels) for name, cell in values.items()
        },
        prompts=gain("base_plain", "base_optimized"),
        weights=gain("base_plain", "tuned_plain"),
        both=gain("base_plain", "tuned_optimized"),
        prompts_on_tuned=gain("tuned_plain", "tuned_optimized"),
        weights_on_optimized=gain("base_optimized", "tuned_optimized"),
        interaction=interaction,
    )


def _effect(difference: PairedDifference) -> dict[str, float]:
    return {
        "difference": difference.difference,
        "low": difference.interval.low,
        "high": difference.interval.high,
        "p_value": difference.p_value,
    }
