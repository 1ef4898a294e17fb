"""Rows as vectors, without a model: standardized numbers, one-hot categories, TF-IDF of longer texts.

Symbols: n rows, d coordinates. Every column of the inputs becomes a block of coordinates whose mean squared distance
between rows is 1, so a text counts as much as a number however many words it has. Missing numbers lie at the mean. Rows
that are to be compared must be given in one call. Knows printed values; knows nothing of labels, models or scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dspy
import numpy as np
from numpy.typing import NDArray

from copa_harness.optimize.schema import columns_of, numbers_of

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
