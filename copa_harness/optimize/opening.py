"""The opening of a study: which points are looked at before the sampler chooses by itself.

A surrogate model knows nothing before it has seen every option at least once. After the starting points, which others
thought of, comes a *balanced* set of points, in which every option of every dimension occurs about equally often. They
race the incumbent one by one like any other: since a trial sees first what the incumbent gets wrong, a look costs few
examples, and a point that shows nothing there is over.

A tournament over all of them (successive halving; Karnin et al. 2013, Jamieson & Talwalkar 2016) was tried and is not
used: beside a good incumbent it spends whole blocks on points that a few examples rule out for certain.
Knows points and numbers; knows nothing of programs or models.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from copa_harness.optimize.space import Point, Space

MAX_POINTS = 48
"""Points of an opening at most: more only delay the surrogate, which learns from every one of them."""

MIN_POINTS = 16
"""Points of an opening at least."""


def n_opening_points(n_options: int) -> int:
    """How many points the sampler is to see before it chooses by itself.

    Args:
        n_options: Options of the largest dimension; twice as many points show each of them twice.
    """
    return min(MAX_POINTS, max(2 * n_options, MIN_POINTS))


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
