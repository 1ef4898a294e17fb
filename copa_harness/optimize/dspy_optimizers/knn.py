"""DSPy's KNNFewShot with what it leaves to the user: vectors without a model, and a model for the program it returns.

Its result picks demonstrations anew for every input, which settings cannot express: such a program is run, not stored.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dspy
import numpy as np
from dspy.predict.knn import KNN
from dspy.teleprompt.teleprompt import Teleprompter

from copa_harness.evaluate.runner import run_examples
from copa_harness.optimize.propose.demos import labelled_demos, traced_demos
from copa_harness.results import Phase

if TYPE_CHECKING:
    from copa_harness.optimize.dspy_optimizers.contract import OptimizerJob

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
    """What a program needs to find its demonstrations; shared by copies of the program.

    Attributes:
        knn: Inputs to training examples.
        traces: By identity of a training example, its demonstrations by predictor: what the program itself did with it.
        n_traced: Neighbours whose traces are shown.
        n_labeled: Demonstrations in all, labelled rows after the traces.
        shows: Whether a demonstration may be shown.
    """

    def __init__(
        self,
        knn: KNN,
        *,
        traces: Mapping[int, Mapping[str, dspy.Example]],
        n_traced: int,
        n_labeled: int,
        shows: Callable[[Any], bool],
    ) -> None:
        self.knn, self.traces, self.shows = knn, traces, shows
        self.n_traced, self.n_labeled = n_traced, n_labeled

    def __deepcopy__(self, memo: dict[int, Any]) -> _Neighbours:
        return self

    def demos(self, name: str, signature: Any, inputs: Mapping[str, Any]) -> list[dspy.Example]:
        """The demonstrations of one predictor for these inputs of the program; never the very same inputs."""
        nearest = [one for one in self.knn(**inputs) if dict(one.inputs()) != dict(inputs)]
        with_trace = [one for one in nearest if name in self.traces.get(id(one), {})][: self.n_traced]
        traced = [self.traces[id(one)][name] for one in with_trace]
        shown = {id(one) for one in with_trace}
        others = [one for one in nearest if id(one) not in shown]
        labelled = [demo for demo, _ in labelled_demos(signature, others)][: max(0, self.n_labeled - len(traced))]
        return [demo for demo in (*traced, *labelled) if self.shows(demo)]


def _forward(program: Any, **inputs: Any) -> Any:
    """Answer with demonstrations chosen for these inputs; the trace is told in the program's own predictors."""
    neighbours: _Neighbours = program._copa_neighbours
    plain = program.deepcopy()
    del plain.forward  # the class's own
    own = dict(program.named_predictors())
    outer_of = {}
    for name, predictor in plain.named_predictors():
        predictor.demos = neighbours.demos(name, predictor.signature, inputs)
        outer_of[id(predictor)] = own[name]
    outer, trace = dspy.settings.trace, []  # type: Any, list[Any]
    with dspy.context(trace=trace):
        try:
            return plain(**inputs)
        finally:
            if outer is not None:
                outer.extend((outer_of.get(id(predictor), predictor), *rest) for predictor, *rest in trace)


class NeighboursOptimizer(Teleprompter):
    """KNNFewShot as an optimizer with the usual `compile(student)`.

    DSPy's own runs a whole BootstrapFewShot, progress bars included, for every input; here its retriever is used, the
    program (or its teacher) is run on the training examples once, and their demonstrations are put in directly: in use
    an answer costs no more calls than the program's own.

    Args:
        job: Examples, metric and threads.
        k: Neighbours per input.
        vectorizer: Texts to vectors; default `TextVectors`.
        max_bootstrapped_demos: Neighbours shown as the program answered them, where that passed; 0 runs nothing.
        max_labeled_demos: Demonstrations in all, default `k`.
        teacher: Program that is run on the training examples instead of the student; has the same predictors.
    """

    def __init__(
        self,
        job: OptimizerJob,
        *,
        k: int,
        vectorizer: Callable[[list[str]], Any] | None = None,
        max_bootstrapped_demos: int = 0,
        max_labeled_demos: int | None = None,
        teacher: dspy.Module | None = None,
    ) -> None:
        super().__init__()
        self._job, self._teacher = job, teacher
        texts = [" | ".join(f"{key}: {value}" for key, value in example.inputs().items()) for example in job.trainset]
        self.name = f"k={k}, {'own' if vectorizer is None else 'given'} vectors, {max_bootstrapped_demos} bootstrapped"
        self._knn = KNN(k, list(job.trainset), vectorizer or TextVectors(texts))
        self._n_traced, self._n_labeled = max_bootstrapped_demos, k if max_labeled_demos is None else max_labeled_demos

    def compile(self, student: dspy.Module, **kwargs: Any) -> dspy.Module:
        """The student with demonstrations chosen per input."""
        program = student.deepcopy()
        program._copa_neighbours = _Neighbours(
            self._knn,
            traces=self._traces(self._teacher or student) if self._n_traced else {},
            n_traced=self._n_traced,
            n_labeled=self._n_labeled,
            shows=self._job.shows,
        )
        program.forward = types.MethodType(_forward, program)
        return program

    def _traces(self, program: dspy.Module) -> dict[int, dict[str, dspy.Example]]:
        """By identity of a training example the demonstrations of a run that passed."""
        job = self._job
        runs = run_examples(
            program,
            job.trainset,
            metric=job.scored,
            split="train",
            phase=Phase.BOOTSTRAP,
            threads=job.threads,
        )
        found: dict[int, dict[str, dspy.Example]] = {}
        for example, run in zip(job.trainset, runs, strict=True):
            traced = traced_demos(program, [example], [run], min_score=job.min_score)
            found[id(example)] = {name: demos[0][0] for name, demos in traced.items() if demos}
        return found
