"""What programs answered on training rows during a run: training rows for the weights that cost no further call.

Bootstrapping, reflection and the probing of instructions run candidates on training examples; every such run is kept
here with its score and the calls of its predictors. Where examples lack an output of a predictor, weights learn from
those that passed: one run for each row, the whole of it, so that the stages of a program learn what led to a right
answer together. Of several that passed on a row the higher score goes first, then the program with the better
validation score, then the later run.

Runs on validation rows are among them for the last training alone (`weights.refit`): any weights that learned from
these before would be judged by what they know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dspy

from copa_harness.evaluate.runner import ExampleRun

if TYPE_CHECKING:
    from copa_harness.optimize.search.candidate import Candidate
    from copa_harness.tune.rows import PredictorCall


@dataclass(frozen=True, slots=True)
class Rollout:
    """One run of a program on a training row.

    Attributes:
        row: The row's place in the training set.
        candidate: The program; None for a teacher.
        score: What the metric gave, 0..1.
        trace: The steps of the predictors that have a name, in order: name, predictor, inputs, outputs.
    """

    row: int
    candidate: Candidate | None
    score: float
    trace: tuple[tuple[str, Any, Any, Any], ...]

    def calls(self, predictor: str) -> list[PredictorCall]:
        """One predictor's calls, as rows are rendered from them."""
        from copa_harness.tune.traces import call_of

        return [call_of(*step) for name, *step in self.trace if name == predictor]


class Rollouts:
    """All runs of one optimization on training rows."""

    def __init__(self) -> None:
        self._found: list[Rollout] = []
        self._rows: set[int] = set()

    @property
    def rows(self) -> frozenset[int]:
        """Rows that any program was run on."""
        return frozenset(self._rows)

    def note(
        self, program: dspy.Module, candidate: Candidate | None, rows: Sequence[int], runs: Iterable[ExampleRun]
    ) -> None:
        """Keep runs.

        Args:
            program: The very program object that was run.
            candidate: What it was made of; None for a teacher.
            rows: Places of the examples in the training set.
            runs: What came out, in the same order.
        """
        names = {id(predictor): name for name, predictor in program.named_predictors()}
        for row, run in zip(rows, runs, strict=True):
            self._rows.add(row)
            if run.result.score is not None and run.prediction is not None:
                # What a program makes on the fly has no name, and there is nothing to fine-tune it by.
                trace = tuple((names[id(step[0])], *step) for step in run.trace if id(step[0]) in names)
                self._found.append(Rollout(row, candidate, run.result.score, trace))

    def passing(self, pass_score: float, *, worth: Callable[[Candidate], float]) -> tuple[Rollout, ...]:
        """The best run of every row that has one with at least `pass_score`, by row.

        Args:
            pass_score: 0..1.
            worth: A program's mean validation score so far, nan without any. A teacher's runs go before all others.
        """
        best: dict[int, tuple[tuple[float, float, int], Rollout]] = {}
        for i, one in enumerate(self._found):
            if one.score < pass_score or not one.trace:
                continue
            value = 2.0 if one.candidate is None else worth(one.candidate)
            order = (one.score, -1.0 if math.isnan(value) else value, i)
            if one.row not in best or order > best[one.row][0]:
                best[one.row] = (order, one)
        return tuple(best[row][1] for row in sorted(best))
