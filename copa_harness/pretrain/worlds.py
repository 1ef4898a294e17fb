"""The synthetic tasks behind the episodes: how feature values and labels come about, and rules put into words.

A world draws N examples: ``shares`` (N, F), each value as a share 0..1 of its column's range, and ``classes`` (N,).
Kinds: ``gauss`` (Gaussian classes, sometimes correlated or with noise columns), ``linear`` (bands along one
direction), ``axis`` (an unspoken threshold rule), ``rule`` (a threshold rule which the instruction states). This
module knows nothing of templates or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Shares = npt.NDArray[np.float64]
Classes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Clause:
    """``if feature <operator> threshold then class``; the threshold as printed."""

    feature: int
    operator: str
    threshold: str
    label: int

    def holds(self, printed: str) -> bool:
        """Whether a printed value fulfils the clause."""
        value, threshold = float(printed), float(self.threshold)
        if self.operator == "below":
            return value < threshold
        return value >= threshold if self.operator == "at least" else value > threshold


def gaussian_world(
    rng: np.random.Generator, n_features: int, n_classes: int, *, spread: float, n_examples: int
) -> tuple[Shares, Classes]:
    """Gaussian classes at random places; ``spread`` is the typical standard deviation as a share of the range."""
    noise_columns = rng.random(n_features) < (0.15 if n_features > 1 else 0.0)
    if noise_columns.all():
        noise_columns[:] = False
    centres = np.zeros((n_classes, n_features))
    for _ in range(20):
        centres = rng.random((n_classes, n_features)) * 0.8 + 0.1
        if rng.random() < 0.35:
            line = np.sort(rng.random(n_classes) * 0.8 + 0.1)[rng.permutation(n_classes)]
            sign = rng.choice([1.0, 1.0, 1.0, -1.0], n_features)
            centres = 0.5 + sign * (line[:, None] - 0.5) + rng.normal(0, 0.08, centres.shape)
        centres[:, noise_columns] = centres[:1, noise_columns]
        gaps = [np.linalg.norm(centres[a] - centres[b]) / spread for a in range(n_classes) for b in range(a)]
        if min(gaps) > 3:
            break
    scales = spread * rng.uniform(0.5, 1.5, (n_classes, n_features))
    scales[:, noise_columns] = rng.uniform(0.05, 0.2)
    classes = rng.integers(0, n_classes, n_examples)
    noise = rng.standard_normal((n_examples, n_features))
    if n_features > 1 and rng.random() < 0.4:
        shared = rng.standard_normal((n_examples, 1))
        weight = rng.uniform(0.3, 0.8)
        noise = np.sqrt(1 - weight) * noise + np.sqrt(weight) * shared
    return centres[classes] + scales[classes] * noise, classes


def linear_world(
    rng: np.random.Generator, n_features: int, n_classes: int, *, n_examples: int
) -> tuple[Shares, Classes]:
    """Bands along one direction, the examples nearest to the borders left out."""
    direction = rng.standard_normal(n_features)
    shares = rng.random((n_examples * 3, n_features))
    position = shares @ direction
    borders = np.quantile(position, np.linspace(0, 1, n_classes + 1)[1:-1])
    classes = np.searchsorted(borders, position)
    kept = np.argsort(-np.min(np.abs(position[:, None] - borders[None]), axis=1))[:n_examples]
    kept = rng.permutation(kept)
    return shares[kept], classes[kept].astype(np.int64)


def rule_shape(rng: np.random.Generator, n_features: int, n_classes: int) -> list[tuple[int, str, float, int]]:
    """A random rule of ``n_classes - 1`` clauses as (feature, operator, threshold share, class)."""
    classes = [int(c) for c in rng.permutation(n_classes)]
    n_clauses = n_classes - 1
    one_feature = n_features == 1 or rng.random() < 0.35
    operators = ["below", "at least", "above"]
    clauses: list[tuple[int, str, float, int]] = []
    if one_feature and n_clauses > 1:
        feature = int(rng.integers(n_features))
        while True:
            borders = np.sort(rng.uniform(0.12, 0.88, n_clauses))
            if np.min(np.diff(borders)) > 0.15:
                break
        upward = rng.random() < 0.7
        operator = "below" if upward else operators[int(rng.integers(1, 3))]
        for i in range(n_clauses):
            clauses.append((feature, operator, float(borders[i] if upward else borders[-1 - i]), classes[i]))
        return clauses
    features = [int(f) for f in rng.permutation(n_features)]
    for i in range(n_clauses):
        operator = operators[int(rng.choice(3, p=[0.6, 0.2, 0.2]))]
        low, high = (0.3, 0.7) if n_clauses == 1 else (0.3, 0.6)
        threshold = float(rng.uniform(low, high))
        clauses.append(
            (features[i % n_features], operator, threshold if operator == "below" else 1 - threshold, classes[i])
        )
    return clauses


def rule_shares(
    rng: np.random.Generator, clauses: list[tuple[int, str, float, int]], n_features: int, *, n_examples: int
) -> Shares:
    """Values for a rule: uniform or clustered, both sides of every threshold visited about equally."""
    shares = rng.random((n_examples, n_features))
    if rng.random() < 0.5:
        centres = rng.random((int(rng.integers(2, 6)), n_features))
        shares = centres[rng.integers(0, len(centres), n_examples)] + 0.07 * rng.standard_normal(
            (n_examples, n_features)
        )
    for feature in {clause[0] for clause in clauses}:
        borders = np.sort([0.0, 1.0] + [clause[2] for clause in clauses if clause[0] == feature])
        redrawn = rng.random(n_examples) < 0.7
        segment = rng.integers(0, len(borders) - 1, n_examples)
        value = borders[segment] + (borders[segment + 1] - borders[segment]) * rng.random(n_examples)
        shares[:, feature] = np.where(redrawn, value, shares[:, feature])
    return np.clip(shares, 0.0, 1.0)


def rule_text(
    rng: np.random.Generator,
    clauses: list[Clause],
    names: list[str],
    labels: list[str],
    last: int,
    *,
    main_share: float,
) -> tuple[str, list[int], list[int], list[int]]:
    """A rule in words.

    Returns:
        The sentence, and character positions in it: of each clause's field name, of each clause's threshold, and of
        each label (one per clause, then the last one).
    """
    style = 0 if rng.random() < main_share else int(rng.integers(1, 5))
    words = {"below": "below", "at least": "at least", "above": "above"}
    if style:
        words = {
            "below": str(rng.choice(["less than", "under", "below", "<"])),
            "at least": str(rng.choice(["at least", ">=", "not below"])),
            "above": str(rng.choice(["more than", "over", "above", ">"])),
        }
    text, fields, thresholds, places = "", [], [], []
    joint = "; " if style and rng.random() < 0.5 else ", "
    for i, clause in enumerate(clauses):
        word = words[clause.operator]
        copula = "" if word in ("<", ">", ">=") else "is "
        condition = f"{names[clause.feature]} {copula}{word} "
        if style in (0, 1, 4):
            text += "If " if i == 0 else (joint + ("otherwise if " if style != 4 else "if "))
            fields.append(len(text))
            text += condition
            thresholds.append(len(text))
            text += clause.threshold + {0: " answer ", 1: " then ", 4: ", "}[style]
            places.append(len(text))
            text += labels[clause.label]
        else:
            text += joint if i else ""
            places.append(len(text))
            text += labels[clause.label] + (" if " if style == 2 else " when ")
            fields.append(len(text))
            text += condition
            thresholds.append(len(text))
            text += clause.threshold
    text += joint + ("otherwise answer " if style == 0 else "otherwise " if rng.random() < 0.6 else "else ")
    places.append(len(text))
    return text + labels[last] + ".", fields, thresholds, places
