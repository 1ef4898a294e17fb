"""Which rows make a demonstration set, by how alike they are: needs no model.

Symbols: n rows with vectors V (n, d) and strata (labels); every pick takes the strata in turn, so a set shows all
labels as evenly as it can. Pure functions from vectors and a generator to row numbers.

* ``diverse``: farthest-first traversal (Gonzalez 1985; k-center), within each stratum, from a random first row.
* ``typical``: the rows nearest to the centres of as many clusters of each stratum (k-means), drawn anew per set.
* ``heaviest``: rows of the greatest weight first.
* ``mutated``: a set given, with some of its rows exchanged, also for neighbours of wrong answers (kNN prompting, Liu et
  al. 2022, arXiv 2101.06804).

Vectors are standardized numbers, one-hot categories and TF-IDF of longer texts: every column of the inputs becomes a
block of coordinates whose mean squared distance between rows is 1, so a text counts as much as a number however many
words it has. Missing numbers lie at the mean. Rows that are to be compared must be given in one call.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import dspy
import numpy as np
from numpy.typing import NDArray

from copa_harness.optimize.propose.schema import columns_of, numbers_of

Vectors = NDArray[np.float64]
"""(n, d) coordinates."""

MAX_CATEGORIES = 12
"""A text column with more different values than this is read word by word."""


def row_vectors(examples: Sequence[dspy.Example], input_fields: Sequence[str]) -> Vectors:
    """(n, d) coordinates of the examples' inputs; Euclidean distances between them say how alike two inputs are.

    Args:
        examples: Rows that hold all the fields.
        input_fields: The fields to look at.
    """
    blocks = [_block(values) for values in columns_of(examples, input_fields).values()]
    found = [block for block in blocks if block is not None]
    return np.hstack(found) if found else np.zeros((len(examples), 1))


def distances(rows: Vectors, others: Vectors) -> NDArray[np.float64]:
    """(n, m) Euclidean distances."""
    squared = (rows**2).sum(1)[:, None] + (others**2).sum(1)[None, :] - 2 * rows @ others.T
    return np.asarray(np.sqrt(np.maximum(squared, 0.0)))


def _block(values: Sequence[str]) -> Vectors | None:
    """One column's coordinates; None when they are the same for every row."""
    numbers = numbers_of(values)
    if numbers is not None:
        column = np.array([np.nan if number is None else float(number) for number in numbers])
        raw: Any = np.nan_to_num(column - np.nanmean(column))[:, None]
    elif len(words := sorted(set(values))) <= MAX_CATEGORIES:
        raw = np.array([[value == word for word in words] for value in values], dtype=float)
    else:
        from sklearn.feature_extraction.text import TfidfVectorizer

        try:
            raw = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b").fit_transform(values).toarray()
        except ValueError:  # no word in any of them
            return None
    centred = raw - raw.mean(0)
    spread = float(2 * (centred**2).sum(1).mean())  # the mean squared distance between two rows drawn at random
    return np.asarray(centred / np.sqrt(spread), dtype=np.float64) if spread > 0 else None


def quotas(strata: Sequence[str], size: int, generator: np.random.Generator) -> dict[str, int]:
    """How many rows of each stratum a set of `size` takes: as equal as their numbers allow, the odd ones at random."""
    left = {name: strata.count(name) for name in sorted(set(strata))}
    taken = dict.fromkeys(left, 0)
    while sum(taken.values()) < min(size, len(strata)):
        for name in generator.permutation(sorted(left)).tolist():
            if left[name] and sum(taken.values()) < size:
                taken[name] += 1
                left[name] -= 1
    return taken


def diverse_rows(vectors: Vectors, strata: Sequence[str], size: int, generator: np.random.Generator) -> list[int]:
    """Rows far from one another within each stratum."""
    chosen: list[int] = []
    for name, count in quotas(strata, size, generator).items():
        members = _members(strata, name)
        picked = [int(generator.choice(members))] if count else []
        while len(picked) < count:
            nearest = distances(vectors[members], vectors[picked]).min(1)
            nearest[np.isin(members, picked)] = -1.0  # equal rows are at distance 0, chosen ones are out
            picked.append(int(members[int(np.argmax(nearest))]))
        chosen.extend(picked)
    return chosen


def typical_rows(vectors: Vectors, strata: Sequence[str], size: int, generator: np.random.Generator) -> list[int]:
    """Rows nearest to the centres of their stratum's clusters, as many clusters as rows are taken."""
    from scipy.cluster.vq import kmeans2  # and not scikit-learn's, whose OpenMP threads hang in forked processes

    chosen: list[int] = []
    for name, count in quotas(strata, size, generator).items():
        members = _members(strata, name)
        n_clusters = min(count, len(np.unique(vectors[members], axis=0)))
        if not n_clusters:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an empty cluster keeps its centre, which serves as well
            centres, _ = kmeans2(vectors[members], n_clusters, iter=50, minit="++", seed=int(generator.integers(2**31)))
        far = distances(vectors[members], centres)
        picked: list[int] = []
        for cluster in range(n_clusters):
            row = next(int(members[i]) for i in np.argsort(far[:, cluster], kind="stable") if members[i] not in picked)
            picked.append(row)
        rest = [int(row) for row in generator.permutation(members) if row not in picked]  # equal rows make few clusters
        chosen.extend([*picked, *rest[: count - len(picked)]])
    return chosen


def heaviest_rows(
    strata: Sequence[str], weights: Sequence[float], size: int, generator: np.random.Generator
) -> list[int]:
    """In each stratum, the rows of the greatest weight.

    Args:
        strata: n labels.
        weights: n numbers, e.g. a draw of what each row adds to the score.
        size: Rows wanted.
        generator: Decides which strata get the odd places.
    """
    values = np.asarray(weights, dtype=float)
    chosen: list[int] = []
    for name, count in quotas(strata, size, generator).items():
        members = _members(strata, name)
        chosen.extend(int(row) for row in members[np.argsort(-values[members], kind="stable")][:count])
    return chosen


def mutated_rows(
    vectors: Vectors,
    strata: Sequence[str],
    current: Sequence[int],
    generator: np.random.Generator,
    *,
    targets: Vectors,
) -> list[int]:
    """A set around a given one: up to a third of its rows exchanged, each for another of the same stratum.

    Every other exchange takes in the row of the stratum nearest to a target drawn at random, if there are targets; the
    others take in a row drawn at random.

    Args:
        vectors: (n, d).
        strata: n labels.
        current: The rows to begin with, at least one; their order is kept.
        generator: Source of randomness.
        targets: (m, d) inputs that were answered wrong, possibly none.
    """
    chosen = [int(row) for row in current]
    for place in generator.permutation(len(chosen))[: 1 + int(generator.integers(max(1, len(chosen) // 3)))]:
        others = [row for row in _members(strata, strata[chosen[place]]).tolist() if row not in chosen]
        if not others:
            continue
        if len(targets) and generator.random() < 0.5:
            target = targets[[int(generator.integers(len(targets)))]]
            chosen[place] = others[int(np.argmin(distances(vectors[others], target)[:, 0]))]
        else:
            chosen[place] = int(generator.choice(others))
    return chosen


def _members(strata: Sequence[str], name: str) -> np.ndarray:
    return np.array([i for i, one in enumerate(strata) if one == name])
