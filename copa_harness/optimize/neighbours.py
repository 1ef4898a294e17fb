"""DSPy's KNNFewShot with what it leaves to the user: vectors without a model, and a model for the program it returns.

Its result picks demonstrations anew for every input, which settings cannot express: such a program is run, not stored.
Knows nothing of budgets or scores.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Sequence
from typing import Any

import dspy
import numpy as np
from dspy.predict.knn import KNN
from dspy.teleprompt.teleprompt import Teleprompter
from dspy.utils.exceptions import AdapterParseError

from copa_harness.optimize.demos import labelled_pool

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")


class TextVectors:
    """Vectors for texts, fitted on the training inputs: their numbers standardized, or hashed character n-grams.

    Numbers are used when every training text holds equally many (tabular rows); nearness is then Euclidean, put into
    the dot product KNN ranks by with one more coordinate.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        rows = [_numbers(text) for text in texts]
        self._n = len(rows[0]) if rows and rows[0] and len({len(row) for row in rows}) == 1 else 0
        if self._n:
            table = np.array(rows, dtype=float)
            self._mean, self._sd = table.mean(axis=0), np.where(table.std(axis=0) > 0, table.std(axis=0), 1.0)
        self._fitted = False

    def __call__(self, texts: list[str]) -> np.ndarray:
        """One row per text, float32. The first call takes the training texts, every later one queries (KNN's order)."""
        is_query, self._fitted = self._fitted, True
        if self._n:
            rows = [(_numbers(text) + [0.0] * self._n)[: self._n] for text in texts]
            scaled = (np.array(rows, dtype=float) - self._mean) / self._sd
            # x.q - |x|^2 / 2 orders training rows x by distance to the query q.
            last = np.ones((len(texts), 1)) if is_query else -0.5 * (scaled**2).sum(axis=1, keepdims=True)
            return np.hstack([scaled, last]).astype(np.float32)
        from sklearn.feature_extraction.text import HashingVectorizer

        hashed = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 4), n_features=1024).transform(texts)
        dense: np.ndarray = np.asarray(hashed.todense(), dtype=np.float32)
        return dense


def _numbers(text: str) -> list[float]:
    return [float(match) for match in _NUMBER.findall(text)]


class _Neighbours:
    """What a program needs to find its demonstrations; shared by copies of the program."""

    def __init__(self, knn: KNN, *, metric: Callable[..., Any], max_bootstrapped: int, max_labeled: int) -> None:
        self.knn, self.metric = knn, metric
        self.max_bootstrapped, self.max_labeled = max_bootstrapped, max_labeled

    def __deepcopy__(self, memo: dict[int, Any]) -> _Neighbours:
        return self


def _forward(program: Any, **inputs: Any) -> Any:
    """Answer with demonstrations chosen for these inputs."""
    neighbours: _Neighbours = program._copa_neighbours
    nearest = neighbours.knn(**inputs)
    plain = program.deepcopy()
    del plain.forward  # the class's own
    made = _bootstrapped(plain, nearest, neighbours) if neighbours.max_bootstrapped else {}
    for name, predictor in plain.named_predictors():
        own = made.get(name, [])
        labelled = [demo for demo, _ in labelled_pool(predictor.signature, nearest[: neighbours.max_labeled])]
        predictor.demos = [*own, *labelled[: max(0, neighbours.max_labeled - len(own))]]
    return plain(**inputs)


def _bootstrapped(
    plain: dspy.Module, nearest: Sequence[dspy.Example], neighbours: _Neighbours
) -> dict[str, list[dspy.Example]]:
    """Demonstrations from the program's own answers to its neighbours, where the metric passes them."""
    names = {id(predictor): name for name, predictor in plain.named_predictors()}
    found: dict[str, list[dspy.Example]] = {name: [] for name in names.values()}
    for example in nearest[: neighbours.max_bootstrapped]:
        trace: list[Any] = []
        try:
            with dspy.context(trace=trace):
                prediction = plain(**example.inputs())
        except AdapterParseError:
            continue
        if neighbours.metric(example, prediction, trace) < 1.0:
            continue
        for predictor, given, outputs in trace:
            if id(predictor) in names:
                demo = dspy.Example(augmented=True, **given, **dict(outputs.items()))
                found[names[id(predictor)]].append(demo)
    return found


class NeighboursOptimizer(Teleprompter):
    """KNNFewShot as an optimizer with the usual `compile(student)`.

    DSPy's own runs a whole BootstrapFewShot, progress bars included, for every input; here its retriever is used and
    the demonstrations are put in directly.

    Args:
        trainset: Where neighbours come from.
        metric: Decides which bootstrapped traces pass.
        k: Neighbours per input.
        vectorizer: Texts to vectors; default `TextVectors`.
        max_bootstrapped_demos: Demonstrations made by running the program on neighbours, one run each; 0 shows the
            labels alone.
        max_labeled_demos: Demonstrations in all, default `k`.
    """

    def __init__(
        self,
        *,
        trainset: Sequence[dspy.Example],
        metric: Callable[..., Any],
        k: int,
        vectorizer: Callable[[list[str]], Any] | None = None,
        max_bootstrapped_demos: int = 0,
        max_labeled_demos: int | None = None,
    ) -> None:
        super().__init__()
        texts = [" | ".join(f"{key}: {value}" for key, value in example.inputs().items()) for example in trainset]
        self.name = f"k={k}, {'own' if vectorizer is None else 'given'} vectors, {max_bootstrapped_demos} bootstrapped"
        self._neighbours = _Neighbours(
            KNN(k, list(trainset), vectorizer or TextVectors(texts)),
            metric=metric,
            max_bootstrapped=max_bootstrapped_demos,
            max_labeled=k if max_labeled_demos is None else max_labeled_demos,
        )

    def compile(self, student: dspy.Module, **kwargs: Any) -> dspy.Module:
        """The student with demonstrations chosen per input."""
        program = student.deepcopy()
        program._copa_neighbours = self._neighbours
        program.forward = types.MethodType(_forward, program)
        return program
