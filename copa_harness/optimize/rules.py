"""Rules learned from the training rows by a shallow decision tree, in words a model can follow; needs no model itself.

    If petal_length is below 2.5 answer setosa, otherwise if petal_width is below 1.7 answer versicolor,
    otherwise answer virginica.

Knows columns and labels; knows nothing of DSPy, prompts or scores. Thresholds are rounded to the precision the values
are printed with: any number in (largest value on the left, smallest on the right] cuts the rows the same way, and the
rounded midpoint is such a number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from typing import Any

import numpy as np

MAX_WORDS = 12
"""A text column with more different values than this is not turned into conditions."""


@dataclass(frozen=True, slots=True)
class Condition:
    """``column is word value``, where word is below, at least, or empty for equality."""

    column: str
    word: str
    value: str

    def __str__(self) -> str:
        return f"{self.column} is {self.word} {self.value}" if self.word else f"{self.column} is {self.value}"


@dataclass(frozen=True, slots=True)
class Rule:
    """A decision list: clauses (conditions, label) tried in order, then `otherwise`; accuracy on the rows it saw."""

    clauses: tuple[tuple[tuple[Condition, ...], str], ...]
    otherwise: str
    accuracy: float

    @property
    def text(self) -> str:
        """The rule in words."""
        said = [f"if {' and '.join(map(str, conditions))} answer {label}" for conditions, label in self.clauses]
        sentence = ", otherwise ".join([*said, f"answer {self.otherwise}"])
        return sentence[0].upper() + sentence[1:] + "."


@dataclass(frozen=True, slots=True)
class _Feature:
    """One column of the tree's matrix: a number column, or "is this word" of a text column."""

    column: str
    values: np.ndarray
    word: str | None = None
    precision: int = 0


def learn_rules(
    columns: Mapping[str, Sequence[str]], labels: Sequence[str], *, max_depth: int = 3, seed: int = 0
) -> tuple[Rule, ...]:
    """Rules from rows, at most two: a chain of one-condition clauses, and the full tree when it is more exact.

    Args:
        columns: Printed values by column name, each as long as `labels`.
        labels: The right answer of each row.
        max_depth: Depth of the tree and length of the chain, 1 to 3 being readable.
        seed: For ties between splits.

    Returns:
        Rules with at least one clause that beat always answering the commonest label; best first, possibly none.
    """
    features = [feature for name, values in columns.items() for feature in _features(name, values)]
    counts = Counter(labels)
    if not features or len(counts) < 2:
        return ()
    chance = max(counts.values()) / len(labels)
    rows = np.array(labels, dtype=object)
    chain = _chain(features, rows, max_clauses=min(len(counts) - 1, max_depth + 1), seed=seed)
    tree = _tree(features, rows, max_depth=max_depth, seed=seed)
    found = [rule for rule in (chain, tree) if rule is not None and rule.clauses and rule.accuracy > chance]
    if len(found) == 2 and found[1].accuracy <= found[0].accuracy:
        found = found[:1]
    return tuple(sorted(found, key=lambda rule: -rule.accuracy))


def _features(name: str, values: Sequence[str]) -> list[_Feature]:
    try:
        numbers = [Decimal(value.strip()) for value in values]
    except InvalidOperation:
        words = sorted(set(values))
        if not 2 <= len(words) <= MAX_WORDS:
            return []
        return [_Feature(name, np.array([v == word for v in values], dtype=float), word) for word in words]
    if not all(number.is_finite() for number in numbers) or len(set(numbers)) < 2:
        return []
    precision = max(max(0, -int(number.as_tuple().exponent)) for number in numbers)
    return [_Feature(name, np.array([float(number) for number in numbers]), None, precision)]


def _chain(features: list[_Feature], labels: np.ndarray, *, max_clauses: int, seed: int) -> Rule | None:
    """One-condition clauses, each the purer side of the best single split of the rows no clause has caught yet."""
    left = np.ones(len(labels), dtype=bool)
    clauses: list[tuple[tuple[Condition, ...], str]] = []
    predicted = np.empty(len(labels), dtype=object)
    while len(clauses) < max_clauses and len(set(labels[left])) > 1:
        fitted = _fit([_rows(f, left) for f in features], labels[left], max_depth=1, seed=seed)
        if fitted.tree_.node_count < 3:
            break
        feature = features[int(fitted.tree_.feature[0])]
        goes_left = feature.values <= fitted.tree_.threshold[0]
        sides = [goes_left & left, ~goes_left & left]
        purity = [_share_of_commonest(labels[side]) for side in sides]
        takes_left = purity[0] > purity[1] or (purity[0] == purity[1] and sides[0].sum() >= sides[1].sum())
        side = sides[0] if takes_left else sides[1]
        label = _commonest(labels[side])
        condition = _condition(feature, float(fitted.tree_.threshold[0]), takes_left, left)
        clauses.append(((condition,), label))
        predicted[side] = label
        left &= ~side
    if not clauses:
        return None
    otherwise = _commonest(labels[left])
    predicted[left] = otherwise
    while clauses and clauses[-1][1] == otherwise:
        clauses.pop()
    return Rule(tuple(clauses), otherwise, float(np.mean(predicted == labels)))


def _tree(features: list[_Feature], labels: np.ndarray, *, max_depth: int, seed: int) -> Rule | None:
    """The whole tree, leaf by leaf; a condition already settled by the clauses before it is left out."""
    fitted = _fit(features, labels, max_depth=max_depth, seed=seed)
    tree = fitted.tree_
    everything = np.ones(len(labels), dtype=bool)
    clauses: list[tuple[tuple[Condition, ...], str]] = []

    def label_at(node: int) -> str:
        return str(fitted.classes_[int(np.argmax(tree.value[node][0]))])

    def labels_below(node: int) -> set[str]:
        if tree.children_left[node] < 0:
            return {label_at(node)}
        return labels_below(tree.children_left[node]) | labels_below(tree.children_right[node])

    def walk(node: int, conditions: tuple[Condition, ...], rows: np.ndarray) -> None:
        below = labels_below(node)
        if len(below) == 1:
            clauses.append((conditions, below.pop()))
            return
        feature, threshold = features[int(tree.feature[node])], float(tree.threshold[node])
        goes_left = feature.values <= threshold
        first, second = tree.children_left[node], tree.children_right[node]
        leaf_first = len(labels_below(first)) == 1 or len(labels_below(second)) > 1
        if leaf_first:
            walk(first, (*conditions, _condition(feature, threshold, True, rows)), rows & goes_left)
            walk(second, conditions, rows & ~goes_left)
        else:
            walk(second, (*conditions, _condition(feature, threshold, False, rows)), rows & ~goes_left)
            walk(first, conditions, rows & goes_left)

    walk(0, (), everything)
    otherwise = clauses.pop()[1]
    predicted = np.array(fitted.predict(np.column_stack([f.values for f in features])), dtype=object)
    return Rule(tuple(clauses), otherwise, float(np.mean(predicted == labels)))


def _fit(features: list[_Feature], labels: np.ndarray, *, max_depth: int, seed: int) -> Any:
    from sklearn.tree import DecisionTreeClassifier

    smallest = max(1, min(3, len(labels) // 10))
    model = DecisionTreeClassifier(max_depth=max_depth, min_samples_leaf=smallest, random_state=seed)
    return model.fit(np.column_stack([f.values for f in features]), labels.astype(str))


def _condition(feature: _Feature, threshold: float, takes_left: bool, rows: np.ndarray) -> Condition:
    if feature.word is not None:
        return Condition(feature.column, "not" if takes_left else "", feature.word)
    seen = feature.values[rows]
    low, high = seen[seen <= threshold].max(), seen[seen > threshold].min()
    middle = (Decimal(str(low)) + Decimal(str(high))) / 2
    step = Decimal(1).scaleb(-feature.precision)
    value = middle.quantize(step, rounding=ROUND_HALF_UP)
    return Condition(feature.column, "below" if takes_left else "at least", str(value))


def _rows(feature: _Feature, rows: np.ndarray) -> _Feature:
    return _Feature(feature.column, feature.values[rows], feature.word, feature.precision)


def _commonest(labels: np.ndarray) -> str:
    counts = Counter(labels.tolist())
    return str(min(counts, key=lambda label: (-counts[label], label)))


def _share_of_commonest(labels: np.ndarray) -> float:
    return max(Counter(labels.tolist()).values()) / len(labels)
