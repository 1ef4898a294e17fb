"""A candidate: for every predictor an instruction, a list of demonstrations and the model (weights) it runs on.

Symbols: W = the models of the parts, P = their instructions and demonstrations; a candidate is one point (W, P) of the
search.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import dspy

from copa_harness.errors import ConfigurationError, TaskError
from copa_harness.evaluate.examples import plain
from copa_harness.lm.metered import MeteredLM


@dataclass(frozen=True, slots=True)
class Part:
    """One predictor's settings: its name in the program, instruction, demonstrations and model."""

    predictor: str
    instruction: str
    demos: tuple[Any, ...]
    lm: Any


@dataclass(frozen=True)
class Candidate:
    """A program with settings for each of its predictors.

    `template` is the program the settings are applied to; it is never changed. `structure` names what the settings
    cannot express (an optimizer that changed the program itself), and is empty for everything built here.
    """

    template: dspy.Module = field(repr=False)
    parts: tuple[Part, ...]
    structure: str = ""

    @classmethod
    def of(cls, program: dspy.Module, *, lm: Any, structure: str = "") -> Candidate:
        """The settings a program has now; `lm` is the model of predictors without one of their own.

        Raises:
            TaskError: The program has no predictors.
            ConfigurationError: A predictor has no model.
        """
        named = program.named_predictors()
        if not named:
            raise TaskError(
                f"got a program without predictors ({type(program).__name__}); expected at least one dspy.Predict that "
                "is not frozen (a submodule with _compiled=True hides its predictors)"
            )
        parts = []
        for name, predictor in named:
            own = predictor.lm or lm
            if own is None:
                raise ConfigurationError(f"got no language model for predictor {name!r}; pass lm=... to COPA")
            parts.append(Part(name, predictor.signature.instructions, tuple(predictor.demos), own))
        return cls(program, tuple(parts), structure)

    def program(self) -> dspy.Module:
        """A fresh program with these settings applied."""
        program = self.template.deepcopy()
        predictors = dict(program.named_predictors())
        for part in self.parts:
            predictor = predictors[part.predictor]
            predictor.signature = predictor.signature.with_instructions(part.instruction)
            predictor.demos = list(part.demos)
            predictor.lm = part.lm
        return program

    @cached_property
    def key(self) -> str:
        """Content hash: equal exactly when structure, instructions, demonstrations and model names are equal."""
        content = [
            self.structure,
            [[p.predictor, p.instruction, [_demo(d) for d in p.demos], model_name(p.lm)] for p in self.parts],
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:24]

    @cached_property
    def size(self) -> int:
        """Characters of all instructions and demonstrations: the yardstick of "simpler" when scores tie."""
        demos = sum(len(str(value)) + 2 for p in self.parts for d in p.demos for value in dict(d).values())
        return demos + sum(len(part.instruction) for part in self.parts)

    @property
    def n_demos(self) -> int:
        """The largest number of demonstrations any predictor has."""
        return max(len(part.demos) for part in self.parts)

    @property
    def lms(self) -> tuple[Any, ...]:
        """The model of each part."""
        return tuple(part.lm for part in self.parts)

    @property
    def model(self) -> str:
        """The distinct model names, joined by commas."""
        return ", ".join(dict.fromkeys(model_name(lm) for lm in self.lms))

    def changes(self, plain: Candidate) -> tuple[bool, bool]:
        """Whether it has other weights, and other prompts, than the program as written."""
        # What asks several programs together has other parts than the program as written.
        prompts = bool(self.structure) or any(
            new.instruction != old.instruction or new.demos not in ((), old.demos)
            for new, old in zip(self.parts, plain.parts, strict=True)
        )
        return self.model != plain.model, prompts

    def with_lms(self, lms: tuple[Any, ...]) -> Candidate:
        """The same prompts on other models, one per part."""
        return replace(self, parts=tuple(replace(p, lm=lm) for p, lm in zip(self.parts, lms, strict=True)))

    def with_instructions(self, instructions: Mapping[str, str]) -> Candidate:
        """The same candidate with the given predictors' instructions replaced."""
        return replace(
            self, parts=tuple(replace(p, instruction=instructions.get(p.predictor, p.instruction)) for p in self.parts)
        )

    def with_demos(self, demos: Mapping[str, tuple[Any, ...]]) -> Candidate:
        """The same candidate with the given predictors' demonstrations replaced."""
        return replace(self, parts=tuple(replace(p, demos=demos.get(p.predictor, p.demos)) for p in self.parts))


def model_name(lm: Any) -> str:
    """A model's name; for a fine-tuned one it contains the fingerprint of its weights."""
    return str(getattr(lm, "model", lm))


def takes_lora(lm: Any) -> bool:
    """Whether LoRA adapters for a model can be trained here."""
    return isinstance(lm, MeteredLM) and lm.engine.takes_lora


def is_tunable(lm: Any) -> bool:
    """Whether a model can be fine-tuned: by LoRA here, or by its DSPy provider."""
    return takes_lora(lm) or bool(getattr(getattr(lm, "provider", None), "finetunable", False))


def _demo(demo: Any) -> dict[str, Any]:
    return {str(key): plain(value) for key, value in dict(demo).items()}
