"""Held-out development tasks: what choices are made on, so that the tasks in ``suites/`` stay unseen.

Made by scikit-learn's generators and from its digits (a few principal components, three digits at a time); scaled by
the training rows' minimum and maximum to 0.0 .. 9.9 and printed with one decimal, like any task of this project that
has no natural one-digit scale. Names and labels are plain words.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits, make_blobs, make_classification, make_moons
from sklearn.decomposition import PCA

from copa_harness.lm.embedded.pretrain.measure import ClassificationTask

_FIELDS = ("stem_height", "stem_depth", "leaf_height", "leaf_depth")
_LABELS = ("lumora", "saltern", "verdigris")


def scaled(features: npt.NDArray[np.float64], train: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Columns mapped to 0.0 .. 9.9 by the training rows' minimum and maximum, one decimal."""
    low, high = features[train].min(0), features[train].max(0)
    share = np.clip((features - low) / np.maximum(high - low, 1e-9), 0, 1)
    return np.asarray(np.round(share * 9.9, 1), np.float64)


def split_task(
    name: str,
    features: npt.NDArray[np.float64],
    classes: npt.NDArray[np.int64],
    *,
    seed: int,
    fields: tuple[str, ...] = _FIELDS,
    labels: tuple[str, ...] = _LABELS,
    instruction: str = "Classify the record.",
    scale: bool = True,
) -> ClassificationTask:
    """75 training and 75 test rows by a seeded permutation."""
    order = np.random.RandomState(seed).permutation(len(classes))
    train, test = order[:75], order[75:150]
    printed = scaled(features, train) if scale else np.round(features, 1)
    labels = labels[: int(classes.max()) + 1]

    def rows(indices: npt.NDArray[np.int64]) -> tuple[tuple[tuple[float, ...], str], ...]:
        return tuple((tuple(float(v) for v in printed[i]), labels[classes[i]]) for i in indices)

    return ClassificationTask(name, fields[: features.shape[1]], labels, instruction, rows(train), rows(test))


def development_tasks(seed: int) -> list[ClassificationTask]:
    """Four tasks at one split seed."""
    blobs, blob_classes = make_blobs(150, n_features=4, centers=3, cluster_std=2.2, random_state=100 + seed)
    hard, hard_classes = make_classification(
        150,
        n_features=4,
        n_informative=4,
        n_redundant=0,
        n_classes=3,
        n_clusters_per_class=1,
        class_sep=1.4,
        random_state=200 + seed,
    )
    moons, moon_classes = make_moons(150, noise=0.15, random_state=300 + seed)
    digits = load_digits()
    chosen = np.isin(digits.target, (0, 3, 7) if seed % 2 else (1, 4, 8))
    components = PCA(4, random_state=0).fit_transform(digits.data[chosen])
    digit_classes = np.unique(digits.target[chosen], return_inverse=True)[1]
    return [
        split_task("blobs", blobs, blob_classes, seed=seed),
        split_task("classification", hard, hard_classes, seed=seed, labels=("amber", "slate", "umber")),
        split_task("moons", moons, moon_classes, seed=seed, fields=("north_gap", "east_gap")),
        split_task(
            "digits", components, digit_classes, seed=seed, fields=("stroke_one", "stroke_two", "loop_one", "loop_two")
        ),
    ]
