"""The curve of a run: after how many distinct calls which program had been scored on all validation rows, and how.

Two sources, one per kind of search: COPA scores block by block in `Validation.advance`; DSPy's optimizers score with
`dspy.Evaluate`, which tells callbacks. Only programs that beat everything before are kept, as the incumbents they are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from copa_harness.lm.call_context import current_scope
from copa_harness.optimize.result import to_state
from copa_harness.optimize.search.scoring import Validation


@dataclass
class Curve:
    """Incumbents in order: (calls, validation score, program state), and what scoring cost."""

    points: list[dict[str, Any]] = field(default_factory=list)
    candidates: dict[str, int] = field(default_factory=dict)
    """Examples scored by candidate, of COPA's own searches."""
    n_full: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def scored(self, calls: int, score: float, program: Any) -> None:
        """A program was scored on the whole split."""
        with self._lock:
            self.n_full += 1
            if not self.points or score > self.points[-1]["score"] + 1e-9:
                self.points.append({"calls": calls, "score": score, "state": to_state(program)})


class _Evaluations(BaseCallback):
    """Complete evaluations of DSPy's own evaluator on as many rows as validation has."""

    def __init__(self, curve: Curve, n: int) -> None:
        self._curve, self._n = curve, n
        self._running: dict[str, dspy.Module] = {}

    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        program, devset = inputs.get("program"), inputs.get("devset") or instance.devset
        if isinstance(program, dspy.Module) and len(devset) == self._n:
            self._running[call_id] = program.deepcopy()
            for _, predictor in self._running[call_id].named_predictors():
                predictor.lm = predictor.lm or dspy.settings.lm

    def on_evaluate_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        program = self._running.pop(call_id, None)
        if program is not None and outputs is not None and exception is None:
            self._curve.scored(current_scope().charged_calls, float(outputs.score) / 100.0, program)


@contextmanager
def watched(*, n_validation: int) -> Iterator[Curve]:
    """Record the curve of whatever is optimized inside."""
    curve = Curve()
    advance = Validation.advance

    def advance_and_tell(self: Validation, candidate: Any, **kwargs: Any) -> Any:
        was_complete = self.is_complete(candidate)
        scores = advance(self, candidate, **kwargs)
        curve.candidates[candidate.key] = self.n_seen(candidate)
        if not was_complete and self.is_complete(candidate) and self.n == n_validation:
            curve.scored(kwargs["allowance"].scope.charged_calls, self.mean(candidate), candidate.program())
        return scores

    Validation.advance = advance_and_tell  # type: ignore[method-assign]
    try:
        with dspy.context(callbacks=[*(dspy.settings.callbacks or []), _Evaluations(curve, n_validation)]):
            yield curve
    finally:
        Validation.advance = advance  # type: ignore[method-assign]
