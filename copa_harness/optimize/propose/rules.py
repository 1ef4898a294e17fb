"""Rules learned from the training rows by a shallow decision tree, in words a model can follow; needs no model itself.

    If petal_length is below 2.5 answer setosa, otherwise if petal_width is below 1.7 answer versicolor,
    otherwise answer virginica.

Columns of numbers (missing ones allowed), of categories and of longer texts ("if message mentions refund ...") can all
take part. Thresholds are rounded to the precision the values are printed with: any number in (largest value on the
left, smallest on the right] cuts the rows the same way, and the rounded midpoint is such a number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import numpy as np

from copa_harness.optimize.propose.schema import numbers_of

MAX_WORDS = 12
"""A text column with more different values than this is read word by word."""

MAX_KEYWORDS = 60
"""Words of a text column that can become conditions, the commonest first."""

_WORD = re.compile(r"[^\W\d_]{3,}")


def learn_rules(
    columns: Mapping[str, Sequence[str]],
    labels: Sequence[str],
    *,
    max_depth: int = 3,
    seed: int = 0,
    weights: Sequence[float] | None = None,
) -> tuple[Rule, ...]:
    """Rules from rows, at most two: a chain of one-condition clauses, and the full tree when it is more exact.

    Args:
        columns: Printed values by column name, each as long as `labels`.
        labels: The right answer of each row.
        max_depth: Depth of the tree and length of the chain, 1 to 3 being readable.
        seed: For ties between splits.
        weights: How much each row counts when splits are chosen, above 0; equally by default. Accuracy counts rows.

    Returns:
        Rules with at least one clause that beat always answering the commonest label; best first, possibly none.
    """
    features = [feature for name, values in columns.items() for feature in _features(name, values)]
    counts = Counter(labels)
    if not features or len(counts) < 2:
        return ()
    chance = max(counts.values()) / len(labels)
    rows = np.array(labels, dtype=object)
    row_weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=float)
    chain = _chain(features, rows, row_weights, max_clauses=min(len(counts) - 1, max_depth + 1), seed=seed)
    tree = _tree(features, rows, row_weights, max_depth=max_depth, seed=seed)
    found = [rule for rule in (chain, tree) if rule is not None and rule.clauses and rule.accuracy > chance]
    if len(found) == 2 and found[1].accuracy <= found[0].accuracy:
        found = found[:1]
    return tuple(sorted(found, key=lambda rule: -rule.accuracy))


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
class Condition:
    """One condition on one column.

    Attributes:
        column: Its name.
        word: "below", "at least", "missing", "given", "mentions", "does not mention", "not", or "" for equality.
        value: What the column is compared with; "" for "missing" and "given".
        or_missing: Whether a missing number also meets "below" or "at least".
    """

    column: str
    word: str
    value: str
    or_missing: bool = False

    def __str__(self) -> str:
        if "mention" in self.word:
            return f"{self.column} {self.word} {self.value}"
        said = " ".join(part for part in (self.column, "is", self.word, self.value) if part)
        return f"{said} or missing" if self.or_missing else said


@dataclass(frozen=True, slots=True)
class _Feature:
    """One column of the tree's matrix: numbers (nan where missing), "is this word" or "mentions this word"."""

    column: str
    values: np.ndarray
    word: str | None = None
    precision: int = 0
    is_keyword: bool = False


def _features(name: str, values: Sequence[str]) -> list[_Feature]:
    numbers = numbers_of(values)
    if numbers is not None:
        precision = max(max(0, -int(n.as_tuple().exponent)) for n in numbers if n is not None)
        column = np.array([np.nan if number is None else float(number) for number in numbers])
        return [_Feature(name, column, None, precision)]
    words = sorted(set(values))
    if len(words) < 2:
        return []
    if len(words) <= MAX_WORDS:
        return [_Feature(name, np.array([v == word for v in values], dtype=float), word) for word in words]
    said = [_words(value) for value in values]
    counts = Counter(word for one in said for word in one)
    least, most = max(2, len(values) // 20), len(values) - max(2, len(values) // 20)
    usable = sorted((-count, word) for word, count in counts.items() if least <= count <= most)
    return [
        _Feature(name, np.array([word in one for one in said], dtype=float), word, is_keyword=True)
        for _, word in usable[:MAX_KEYWORDS]
    ]


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.casefold()))


def _chain(
    features: list[_Feature], labels: np.ndarray, weights: np.ndarray, *, max_clauses: int, seed: int
) -> Rule | None:
    """One-condition clauses, each the purer side of the best single split of the rows no clause has caught yet."""
    left = np.ones(len(labels), dtype=bool)
    clauses: list[tuple[tuple[Condition, ...], str]] = []
    predicted = np.empty(len(labels), dtype=object)
    while len(clauses) < max_clauses and len(set(labels[left])) > 1:
        fitted = _fit([_rows(f, left) for f in features], labels[left], weights[left], max_depth=1, seed=seed)
        if fitted.tree_.node_count < 3:
            break
        feature = features[int(fitted.tree_.feature[0])]
        goes_left = _goes_left(feature, fitted.tree_, 0)
        sides = [goes_left & left, ~goes_left & left]
        purity = [_share_of_commonest(labels[side]) for side in sides]
        takes_left = purity[0] > purity[1] or (purity[0] == purity[1] and sides[0].sum() >= sides[1].sum())
        side = sides[0] if takes_left else sides[1]
        label = _commonest(labels[side])
        condition = _condition(feature, goes_left, takes_left, left)
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


def _tree(
    features: list[_Feature], labels: np.ndarray, weights: np.ndarray, *, max_depth: int, seed: int
) -> Rule | None:
    """The whole tree, leaf by leaf; a condition already settled by the clauses before it is left out."""
    fitted = _fit(features, labels, weights, max_depth=max_depth, seed=seed)
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
        feature = features[int(tree.feature[node])]
        goes_left = _goes_left(feature, tree, node)
        first, second = tree.children_left[node], tree.children_right[node]
        leaf_first = len(labels_below(first)) == 1 or len(labels_below(second)) > 1
        if leaf_first:
            walk(first, (*conditions, _condition(feature, goes_left, True, rows)), rows & goes_left)
            walk(second, conditions, rows & ~goes_left)
        else:
            walk(second, (*conditions, _condition(feature, goes_left, False, rows)), rows & ~goes_left)
            walk(first, conditions, rows & goes_left)

    walk(0, (), everything)
    otherwise = clauses.pop()[1]
    predicted = np.array(fitted.predict(np.column_stack([f.values for f in features])), dtype=object)
    return Rule(tuple(clauses), otherwise, float(np.mean(predicted == labels)))


def _fit(features: list[_Feature], labels: np.ndarray, weights: np.ndarray, *, max_depth: int, seed: int) -> Any:
    from sklearn.tree import DecisionTreeClassifier

    smallest = max(1, min(3, len(labels) // 10))
    model = DecisionTreeClassifier(max_depth=max_depth, min_samples_leaf=smallest, random_state=seed)
    return model.fit(np.column_stack([f.values for f in features]), labels.astype(str), sample_weight=weights)


def _goes_left(feature: _Feature, tree: Any, node: int) -> np.ndarray:
    """Which rows a node sends left: small values, and missing ones where the tree has learned so."""
    missing = np.isnan(feature.values)
    return np.where(missing, bool(tree.missing_go_to_left[node]), feature.values <= tree.threshold[node])


def _condition(feature: _Feature, goes_left: np.ndarray, takes_left: bool, rows: np.ndarray) -> Condition:
    if feature.is_keyword:
        return Condition(feature.column, "does not mention" if takes_left else "mentions", str(feature.word))
    if feature.word is not None and not feature.word.strip():
        return Condition(feature.column, "given" if takes_left else "missing", "")
    if feature.word is not None:
        return Condition(feature.column, "not" if takes_left else "", feature.word)
    seen, left = feature.values[rows], goes_left[rows]
    missing = np.isnan(seen)
    has_missing, missing_left = bool(missing.any()), bool(left[missing].any())
    below, above = seen[left & ~missing], seen[~left & ~missing]
    if not (below.size and above.size):  # split by whether there is a number at all
        return Condition(feature.column, "missing" if takes_left == missing_left else "given", "")
    middle = (Decimal(str(below.max())) + Decimal(str(above.min()))) / 2
    value = middle.quantize(Decimal(1).scaleb(-feature.precision), rounding=ROUND_HALF_UP)
    or_missing = has_missing and takes_left == missing_left
    return Condition(feature.column, "below" if takes_left else "at least", str(value), or_missing)


def _rows(feature: _Feature, rows: np.ndarray) -> _Feature:
    return replace(feature, values=feature.values[rows])


def _commonest(labels: np.ndarray) -> str:
    counts = Counter(labels.tolist())
    return str(min(counts, key=lambda label: (-counts[label], label)))


def _share_of_commonest(labels: np.ndarray) -> float:
    return max(Counter(labels.tolist()).values()) / len(labels)
