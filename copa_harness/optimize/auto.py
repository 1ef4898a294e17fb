"""The strategy `auto`: which optimizer suits so many labelled examples, this model and this budget, and why.

| labelled examples | optimizer | reason |
|---|---|---|
| 1-2 | MIPROv2, zero-shot | too few to show: only the instruction can be improved |
| 3-19 | BootstrapFewShot | enough to show, too few to choose between sets of them |
| 20 and more | BootstrapFewShotWithRandomSearch | enough to choose by validation |
| 20 and more, tunable model, calls to spare | COPA, ``p -> w -> p`` | weights can be trained as well |

The first three rows are DSPy's own advice. Knows numbers, names and candidates; runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from copa_harness.optimize.candidate import Candidate
from copa_harness.optimize.settings import RunSettings
from copa_harness.optimize.strategy import Step, StepKind, parse_strategy
from copa_harness.optimize.weights import is_tunable

FEW, MANY = 3, 20
"""From so many labelled examples on demonstrations are worth showing, and worth choosing between."""

FULL_PASSES = 8
"""Passes over the validation examples a budget must hold for training and two prompt steps to be worth beginning."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What `auto` stands for here.

    Attributes:
        strategy: Text for `parse_strategy`.
        reason: Half a sentence: why this one.
        optimizer_kwargs: Arguments it needs, by optimizer.
    """

    strategy: str
    reason: str
    optimizer_kwargs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"auto: {self.strategy}, because {self.reason}"


def choose_strategy(
    *, n_train: int, n_validation: int, calls: float, calls_per_example: int, tunable: bool, has_prompt_lm: bool
) -> Choice:
    """What suits.

    Args:
        n_train: Training examples.
        n_validation: Validation examples.
        calls: Calls the budget allows.
        calls_per_example: Calls of one program run.
        tunable: Whether the models can be fine-tuned.
        has_prompt_lm: Whether a model is there to write instructions.
    """
    n = n_train + n_validation
    said = f"{n} labelled example{'' if n == 1 else 's'}"
    if n < FEW:
        if not has_prompt_lm:
            return Choice("p", f"{said} are too few to show, and without a prompt LM MIPROv2 has no writer")
        zero_shot = {"max_bootstrapped_demos": 0, "max_labeled_demos": 0}
        return Choice("miprov2", f"{said} are too few to show: zero-shot", {"miprov2": zero_shot})
    if n < MANY:
        return Choice("bootstrap_fewshot", f"{said} are enough to show and too few to choose between sets of them")
    wanted = FULL_PASSES * n_validation * calls_per_example
    if tunable and calls >= wanted:
        return Choice("p -> w -> p", f"{said}, a model that can be tuned, and a budget of at least {wanted} calls")
    why = f"the budget is below {wanted} calls" if tunable else "the model cannot be tuned"
    return Choice("bootstrap_fewshot_random_search", f"{said} are enough to choose by validation, and {why}")


def resolved(
    steps: tuple[Step, ...],
    settings: RunSettings,
    student: Candidate,
    *,
    n_train: int,
    n_validation: int,
    calls: float,
    has_prompt_lm: bool,
) -> tuple[tuple[Step, ...], RunSettings, Choice | None]:
    """Steps and settings, with `auto` replaced by what it stands for here; the choice, None where nothing was chosen.

    Args:
        steps: As parsed.
        settings: As given; what is given for an optimizer goes before what `auto` wants of it.
        student: How many calls it takes, and whether its models can be tuned.
        n_train: Training examples.
        n_validation: Validation examples.
        calls: Calls the budget allows.
        has_prompt_lm: Whether a model is there to write instructions.
    """
    if steps[0].kind is not StepKind.AUTO:
        return steps, settings, None
    choice = choose_strategy(
        n_train=n_train, n_validation=n_validation, calls=calls, calls_per_example=len(student.parts),
        tunable=all(is_tunable(lm) for lm in student.lms), has_prompt_lm=has_prompt_lm,
    )  # fmt: skip
    kwargs = {**choice.optimizer_kwargs, **settings.optimizer_kwargs}
    return parse_strategy(choice.strategy), replace(settings, optimizer_kwargs=kwargs), choice
