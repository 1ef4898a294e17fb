"""A prompt adapter that survives writers who cannot write: for proposals made inside DSPy's optimizers.

MIPROv2, COPRO and InferRules die of the first proposal that does not parse or whose prompt does not fit the model, GEPA
asks again and again and says nothing, and a small model is seldom understood and soon full. Under this adapter such a
proposal becomes the instruction it was to improve (no proposal), its other fields become empty, and it is counted.
Answers of the user's own program stay as strict as ever. Knows signatures; knows nothing of optimizers.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

import dspy
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError

_CURRENT = ("basic_instruction", "current_instruction", "instruction")
"""Input fields under which DSPy's proposers state the instruction to be improved."""


class ProposalCount:
    """How many answers to proposal prompts there were, and how many were unusable. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.n_asked = 0
        self.n_unusable = 0

    def add(self, *, usable: bool) -> None:
        """Count one answer."""
        with self._lock:
            self.n_asked += 1
            self.n_unusable += not usable


def forgiving(adapter: Any, *, program: dspy.Module, count: ProposalCount) -> Any:
    """A copy of `adapter` that never fails on signatures the program does not have.

    Args:
        adapter: The prompt adapter in use.
        program: Its predictors' signatures keep failing loudly.
        count: Told of every answer to another signature.
    """
    own = {_shape(predictor.signature) for _, predictor in program.named_predictors()}
    fallback = next((predictor.signature.instructions for _, predictor in program.named_predictors()), "")
    kind: Any = type(adapter)

    class Forgiving(kind):
        """`adapter`'s class, with unusable proposals replaced."""

        def __call__(
            self, lm: Any, lm_kwargs: dict[str, Any], signature: Any, demos: list[Any], inputs: dict[str, Any]
        ) -> list[dict[str, Any]]:
            if _shape(signature) in own:
                answers: list[dict[str, Any]] = super().__call__(lm, lm_kwargs, signature, demos, inputs)
                return answers
            try:
                answers = super().__call__(lm, lm_kwargs, signature, demos, inputs)
            except (AdapterParseError, ContextWindowExceededError):
                count.add(usable=False)
                current = _current(inputs) or fallback
                return [{name: current if "instruction" in name else "" for name in signature.output_fields}]
            count.add(usable=True)
            return answers

    clone = copy.copy(adapter)
    clone.__class__ = Forgiving
    return clone


def _shape(signature: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(signature.input_fields), tuple(signature.output_fields)


def _current(inputs: Mapping[str, Any]) -> str:
    return next((str(inputs[name]) for name in _CURRENT if inputs.get(name)), "")
