"""DSPy's KNNFewShot with what it leaves to the user: vectors without a model, and a model for the program it returns.

Its result picks demonstrations anew for every input, which settings cannot express: such a program is run, not stored.
Knows nothing of budgets or scores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import dspy
import numpy as np
from dspy import teleprompt
from dspy.teleprompt.teleprompt import Teleprompter

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


class NeighboursProgram(dspy.Module):  # type: ignore[misc]
    """A program whose demonstrations are the nearest training examples of each input."""

    def __init__(self, program: dspy.Module, *, knn: teleprompt.KNNFewShot, plain: dspy.Module) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in program.__dict__.items() if name != "forward"})
        self._knn = knn
        self._plain = plain

    def forward(self, **inputs: Any) -> Any:
        """Answer with demonstrations chosen for these inputs, on the predictors' own models."""
        lms = {name: predictor.lm for name, predictor in self.named_predictors()}
        settings = {"lm": next(iter(lms.values()))} if any(lms.values()) else {}
        nearest = self._knn.KNN(**inputs)
        with dspy.context(**settings):
            student = self._plain.deepcopy()
            student._compiled = False
            compiled = teleprompt.BootstrapFewShot(**self._knn.few_shot_bootstrap_args).compile(student, trainset=nearest)
            for name, predictor in compiled.named_predictors():
                predictor.lm = lms.get(name) or dspy.settings.lm
            return compiled(**inputs)


class NeighboursOptimizer(Teleprompter):
    """KNNFewShot as an optimizer with the usual `compile(student)`.

    Args:
        trainset: Where neighbours come from.
        metric: Decides which bootstrapped traces pass.
        lm: Model for predictors without one.
        k: Neighbours per input.
        vectorizer: Texts to vectors; default `TextVectors`.
        max_bootstrapped_demos: Demonstrations made by running the program on neighbours, one call each; 0 shows the
            labels alone.
        max_labeled_demos: Labelled demonstrations, default `k`.
    """

    def __init__(
        self,
        *,
        trainset: Sequence[dspy.Example],
        metric: Callable[..., Any],
        lm: Any,
        k: int,
        vectorizer: Callable[[list[str]], Any] | None = None,
        max_bootstrapped_demos: int = 0,
        max_labeled_demos: int | None = None,
    ) -> None:
        super().__init__()
        texts = [" | ".join(f"{key}: {value}" for key, value in example.inputs().items()) for example in trainset]
        self.k, self.lm = k, lm
        self._own_vectors = vectorizer is None
        self._knn = teleprompt.KNNFewShot(
            k=k,
            trainset=list(trainset),
            vectorizer=vectorizer or TextVectors(texts),
            metric=metric,
            max_bootstrapped_demos=max_bootstrapped_demos,
            max_labeled_demos=k if max_labeled_demos is None else max_labeled_demos,
        )

    def describe(self) -> str:
        """In words what cannot be read from the program's settings."""
        return f"k={self.k}, {'own' if self._own_vectors else 'given'} vectors"

    def compile(self, student: dspy.Module, **kwargs: Any) -> dspy.Module:
        """The student with demonstrations chosen per input."""
        return NeighboursProgram(student, knn=self._knn, plain=student.deepcopy())
