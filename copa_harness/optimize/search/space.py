"""The search space: one categorical dimension for the weights, and two for every predictor.

A point is a mapping from dimension to the *name* of an option, so a stored study and its dashboard read well. The
incumbent's own settings are always among the options, so every space contains the program that has to be beaten.

**Checkpoint choices.** A training keeps one servable LoRA adapter per epoch. The last one fits the training rows best,
an earlier one may keep more of what the base model could do with demonstrations or an instruction; what each is good
for, the study finds out. So a few of the others, spread evenly over the epochs, are offered beside the one that was
kept. Few, because every choice multiplies the space.

Measured with `joint`, a light budget and the embedded model on the tasks of `pretrain.development_tasks` (24 draws of
data; 50 training, 25 validation, 75 test rows; mean test score, difference to n = 1 paired, with a 95 % interval):

    n = 0  .911  -.009 [-.021, +.001]       n = 2  .917  -.003 [-.011, +.004]
    n = 1  .920                             n = 4  .919  -.001 [-.008, +.007]

None differs from another beyond the noise; the default is 1, the highest mean and the smallest space after none at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from copa_harness.optimize.search.candidate import Candidate, model_name


@dataclass(frozen=True, slots=True)
class DemoSet:
    """Demonstrations for one predictor, and the name they go by in the study."""

    name: str
    demos: tuple[Any, ...]


NO_DEMOS = DemoSet("none", ())
"""The empty set: always a candidate."""


@dataclass(frozen=True, slots=True)
class InstructionOption:
    """An instruction for one predictor, and the name it goes by in the study."""

    name: str
    text: str


Point = dict[str, str]
"""Option name by dimension."""

WEIGHTS = "weights"


@dataclass(frozen=True, slots=True)
class WeightsChoice:
    """One option of the weights dimension: a name, and the model of each predictor in the program's order."""

    name: str
    lms: tuple[Any, ...]


def weights_choice(candidate: Candidate) -> WeightsChoice:
    """The weights a candidate runs on."""
    return WeightsChoice("+".join(dict.fromkeys(model_name(lm) for lm in candidate.lms)), candidate.lms)


@dataclass(frozen=True)
class Space:
    """All combinations of the options; build one with `Space.around`."""

    incumbent: Candidate
    weights: tuple[WeightsChoice, ...]
    instructions: Mapping[str, tuple[InstructionOption, ...]]
    demos: Mapping[str, tuple[DemoSet, ...]]

    @classmethod
    def around(
        cls,
        incumbent: Candidate,
        *,
        weights: Sequence[WeightsChoice] = (),
        instructions: Mapping[str, Sequence[InstructionOption]] | None = None,
        demos: Mapping[str, Sequence[DemoSet]] | None = None,
    ) -> Space:
        """The space of the given options and the incumbent's own settings.

        Dimensions without options hold the incumbent's setting alone. Options of equal content are kept once.
        """
        own = weights_choice(incumbent)
        choices = {choice.name: choice for choice in (own, *weights)}
        texts, sets = {}, {}
        for part in incumbent.parts:
            offered = list((instructions or {}).get(part.predictor, ()))
            if all(option.text != part.instruction for option in offered):
                offered.insert(0, InstructionOption("incumbent", part.instruction))
            texts[part.predictor] = _distinct_instructions(offered)
            offered_sets = list((demos or {}).get(part.predictor, ()))
            if all(option.demos != part.demos for option in offered_sets):
                offered_sets.insert(0, DemoSet("incumbent", part.demos) if part.demos else NO_DEMOS)
            sets[part.predictor] = _distinct_sets(offered_sets)
        return cls(incumbent, tuple(choices.values()), texts, sets)

    def with_instructions(self, change: Callable[[str], str]) -> Space:
        """The same space with every instruction but the incumbent's own passed through `change`."""
        own = {part.predictor: part.instruction for part in self.incumbent.parts}
        changed = {
            name: _distinct_instructions(
                [o if o.text == own[name] else InstructionOption(o.name, change(o.text)) for o in options]
            )
            for name, options in self.instructions.items()
        }
        return Space(self.incumbent, self.weights, changed, self.demos)

    @cached_property
    def dimensions(self) -> dict[str, tuple[str, ...]]:
        """Names of the options by dimension, dimensions with a single option left out."""
        found = {WEIGHTS: tuple(choice.name for choice in self.weights)}
        for predictor, options in self.instructions.items():
            found[f"{predictor}.instruction"] = tuple(option.name for option in options)
        for predictor, sets in self.demos.items():
            found[f"{predictor}.demos"] = tuple(option.name for option in sets)
        return {name: options for name, options in found.items() if len(options) > 1}

    @property
    def texts(self) -> dict[str, str]:
        """What the instructions say, by dimension and name: a stored study shows the names only."""
        return {
            f"{predictor}.instruction = {option.name}": option.text
            for predictor, options in self.instructions.items()
            for option in options
        }

    @property
    def size(self) -> int:
        """Number of points."""
        return math.prod(len(options) for options in self.dimensions.values())

    def point_of_incumbent(self) -> Point:
        """The point whose candidate is the incumbent."""
        point = {WEIGHTS: weights_choice(self.incumbent).name}
        for part in self.incumbent.parts:
            texts, sets = self.instructions[part.predictor], self.demos[part.predictor]
            point[f"{part.predictor}.instruction"] = next(o.name for o in texts if o.text == part.instruction)
            point[f"{part.predictor}.demos"] = next(o.name for o in sets if o.demos == part.demos)
        return {name: option for name, option in point.items() if name in self.dimensions}

    def candidate(self, point: Mapping[str, str]) -> Candidate:
        """The candidate at a point; dimensions not mentioned keep the incumbent's setting."""
        chosen = {**self.point_of_incumbent(), **point}
        candidate = self.incumbent
        if WEIGHTS in self.dimensions:
            weights = next(choice for choice in self.weights if choice.name == chosen[WEIGHTS])
            candidate = candidate.with_lms(weights.lms)
        instructions = {
            predictor: next(o.text for o in options if o.name == chosen[f"{predictor}.instruction"])
            for predictor, options in self.instructions.items()
            if f"{predictor}.instruction" in self.dimensions
        }
        demos = {
            predictor: next(o.demos for o in sets if o.name == chosen[f"{predictor}.demos"])
            for predictor, sets in self.demos.items()
            if f"{predictor}.demos" in self.dimensions
        }
        return candidate.with_instructions(instructions).with_demos(demos)

    def unseen(self, seen: set[tuple[str, ...]], generator: np.random.Generator) -> Point | None:
        """A random point not in `seen` (as given by `signature`), or None when there is none left."""
        names = list(self.dimensions)
        if len(seen) >= self.size:
            return None
        for _ in range(200):
            point = {name: self.dimensions[name][int(generator.integers(len(self.dimensions[name])))] for name in names}
            if self.signature(point) not in seen:
                return point
        for number in range(self.size):
            point = {}
            for name in names:
                number, i = divmod(number, len(self.dimensions[name]))
                point[name] = self.dimensions[name][i]
            if self.signature(point) not in seen:
                return point
        return None

    def signature(self, point: Mapping[str, str]) -> tuple[str, ...]:
        """The point's option names in the order of the dimensions."""
        chosen = {**self.point_of_incumbent(), **point}
        return tuple(chosen[name] for name in self.dimensions)


def _distinct_instructions(options: Sequence[InstructionOption]) -> tuple[InstructionOption, ...]:
    kept: list[InstructionOption] = []
    for option in options:
        if all(option.text != other.text for other in kept):
            kept.append(InstructionOption(_free(option.name, [o.name for o in kept]), option.text))
    return tuple(kept)


def _distinct_sets(sets: Sequence[DemoSet]) -> tuple[DemoSet, ...]:
    kept: list[DemoSet] = []
    for option in sets:
        if all(option.demos != other.demos for other in kept):
            kept.append(DemoSet(_free(option.name, [o.name for o in kept]), option.demos))
    return tuple(kept)


def _free(name: str, taken: Sequence[str]) -> str:
    if name not in taken:
        return name
    return next(f"{name} ({i})" for i in range(2, len(taken) + 3) if f"{name} ({i})" not in taken)
