"""The opening of a study: many points looked at briefly, the promising half looked at longer, until few are left.

A surrogate model knows nothing before it has seen every option at least once, and a race against a weak incumbent drops
nobody; so a small budget spent one candidate at a time ends among the first few it happened to try. The opening spends
its share on breadth instead: a *balanced* set of points, in which every option of every dimension occurs about equally
often, is halved after every block of examples (successive halving; Karnin et al. 2013, Jamieson & Talwalkar 2016).
Before it, a few starting points race alone (`SCOUTS`), so that a good program is there early and sets the bar.

Symbols: n = points, b = examples per block, V = all validation examples. Halving every block costs at most 2 n b
example evaluations plus what the last few still need. Knows points and numbers; knows nothing of programs or models.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from copa_harness.optimize.space import Point, Space

MAX_POINTS = 48
"""Points of an opening at most: more only delay the surrogate, which learns from every one of them."""

MIN_POINTS = 4
"""Below this an opening is no tournament, and racing one by one is cheaper."""

SCOUTS = 2
"""So many starting points race alone before the tournament: the best of them is what all others have to beat."""

SURVIVORS = 3
"""So many are always completed: the last halvings would decide on too few differing examples."""


def n_opening_points(n_examples: float, *, block_size: int, n_options: int) -> int:
    """How many points an opening of so many example evaluations can carry; 0 when too few for a tournament.

    Args:
        n_examples: Example evaluations it may use, `inf` for no bound.
        block_size: Examples per block.
        n_options: Options of the largest dimension; twice as many points show each of them twice.
    """
    wanted = min(MAX_POINTS, max(2 * n_options, 16))
    n = wanted if math.isinf(n_examples) else min(wanted, int(n_examples // (2 * block_size)))
    return n if n >= MIN_POINTS else 0


def balanced_points(
    space: Space, n: int, generator: np.random.Generator, *, taken: Collection[tuple[str, ...]] = ()
) -> tuple[Point, ...]:
    """Up to `n` points in which every option of every dimension occurs about equally often.

    Each dimension goes through its options in a random order, again and again; points seen already are left out.

    Args:
        space: Where the points lie.
        n: How many are wanted.
        generator: Source of randomness.
        taken: Signatures (see `Space.signature`) that are not to come again.
    """
    seen = set(taken)
    points: list[Point] = []
    orders: dict[str, list[str]] = {name: [] for name in space.dimensions}
    for _ in range(4 * n):
        if len(points) == n or len(seen) >= space.size:
            break
        point: Point = {}
        for name, options in space.dimensions.items():
            if not orders[name]:
                orders[name] = [options[int(i)] for i in generator.permutation(len(options))]
            point[name] = orders[name].pop()
        signature = space.signature(point)
        if signature not in seen:
            seen.add(signature)
            points.append(point)
    return tuple(points)


def survivors(means: Sequence[float], generator: np.random.Generator) -> tuple[int, ...]:
    """Which of the candidates go on: the better half, at least `SURVIVORS`, drawn by lot when means are equal.

    Ties are common, as a first block may be easy for all; the lot keeps the points nobody thought of in the game.

    Args:
        means: Mean score of each on the same examples, nan for none.
        generator: Source of the lots.
    """
    lots = generator.permutation(len(means))
    alive = [i for i, mean in enumerate(means) if not math.isnan(mean)]
    n = max(SURVIVORS, math.ceil(len(alive) / 2))
    return tuple(sorted(sorted(alive, key=lambda i: (-means[i], lots[i]))[:n]))
