"""Score sheets: which examples a candidate sees next, and what a half-filled sheet says about the whole.

Symbols: a_i, b_i = scores of the incumbent and of a candidate on validation example i = 1..n. The examples fall into
two strata: H, on which the incumbent can be beaten (a_i < 1), and E, on which it can only be lost to (a_i = 1).

A candidate that is to replace the incumbent must win something on H, however good it is elsewhere. So H comes first: of
a good incumbent few examples are wrong, and a candidate that wins none of them can at best tie and is over. What
happens on E afterwards can only take away, so as soon as the losses reach the gains it is over as well. For right/wrong
scores this drops exactly the candidates that would not end better, with no statistics and no risk; it is the cheapest
order in which this can be found out, since no example of E says anything before H has shown a gain.

The price is that a half-filled sheet is no random sample: it flatters. `estimated_difference` therefore weighs the
strata by their sizes and supposes a moderate loss where nothing was seen. Pure functions of scores.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

Sheet = Sequence[float | None]
"""Scores in the fixed order of the validation examples, None where there is none."""

FULL = 1.0 - 1e-9
"""A score from here on cannot be beaten."""

PRIOR_LOSS = 0.2
"""Supposed loss per example of E before any was seen: what a configuration drawn at random loses to a good one."""

PRIOR_EXAMPLES = 2.0
"""The supposed loss weighs as much as so many examples."""


def mean_score(scores: Sheet) -> float:
    """Mean over the examples that have a score; nan when none has."""
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else math.nan


def next_rows(bar: Sheet, *, seen: Container[int], size: int) -> list[int]:
    """The examples a candidate sees next: those of H, worst first, as long as there are any; then the others in order.

    Args:
        bar: Scores of the candidate to beat; an example without one counts as one of the others.
        seen: Examples the candidate has seen.
        size: Examples at most.
    """
    hard = [i for i, score in enumerate(bar) if score is not None and score < FULL]
    hard.sort(key=lambda i: bar[i] or 0.0)  # stable: the fixed order among equals
    first = [i for i in hard if i not in seen]
    if first:
        return first[:size]
    known = set(hard)
    return [i for i in range(len(bar)) if i not in seen and i not in known][:size]


def paired_differences(new: Sheet, old: Sheet) -> list[float]:
    """``new - old`` on the examples both have a score for."""
    return [b - a for b, a in zip(new, old, strict=False) if b is not None and a is not None]


def estimated_difference(new: Sheet, old: Sheet) -> float:
    """Estimate of the mean of ``new - old`` over all examples `old` has a score for; nan when `new` has seen none.

    Stratified: the mean seen on H stands for all of H, the mean seen on E, drawn towards `PRIOR_LOSS`, for all of E.
    """
    total = 0.0
    n = n_seen = 0
    for is_hard in (True, False):
        rows = [i for i, score in enumerate(old) if score is not None and (score < FULL) == is_hard]
        seen = paired_differences([new[i] for i in rows], [old[i] for i in rows])
        weight = 0.0 if is_hard else PRIOR_EXAMPLES
        n, n_seen = n + len(rows), n_seen + len(seen)
        if rows and len(seen) + weight:
            unseen_mean = (sum(seen) - weight * PRIOR_LOSS) / (len(seen) + weight)
            total += sum(seen) + (len(rows) - len(seen)) * unseen_mean
    return total / n if n_seen else math.nan
