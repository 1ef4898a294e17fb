"""How many calls a step of a strategy may use, and which strategy `auto` stands for.

A step gets its share of what the run's budget still allows. The search asks *before* it starts work it might not be
able to finish, so which calls are refused never depends on the order of threads. DSPy's optimizers cannot ask; they run
inside a `step_scope`, which refuses what is too much.

| labelled examples | `auto` takes | reason |
|---|---|---|
| 1-2 | MIPROv2, zero-shot | too few to show: only the instruction can be improved |
| 3-19 | BootstrapFewShot | enough to show, too few to choose between sets of them |
| 20 and more | BootstrapFewShotWithRandomSearch | enough to choose by validation |
| 20 and more, tunable model, calls to spare | COPA, ``p -> w -> p`` | weights can be trained as well |

The first three rows are DSPy's own advice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from copa_harness.lm.budget.scope import Scope
from copa_harness.lm.call_context import in_context
from copa_harness.optimize.options import SearchOptions
from copa_harness.optimize.search.candidate import Candidate, is_tunable
from copa_harness.strategy import Step, StepKind, parse_strategy


@dataclass(frozen=True, slots=True)
class CallBudget:
    """A ceiling on the distinct calls of `scope`, counted from the scope's beginning."""

    scope: Scope
    ceiling: float

    @property
    def remaining(self) -> float:
        """Calls left to this step."""
        return max(0.0, min(self.scope.remaining_calls, self.ceiling - self.scope.charged_calls))

    def can_afford(self, n_calls: float) -> bool:
        """Whether `n_calls` more distinct calls fit."""
        return n_calls <= self.remaining


class Replays(CallBudget):
    """For work whose requests the scope has counted already, and which is free therefore.

    It asks for no estimate: what is new after all is refused by the scope when it is one too many.
    """

    def can_afford(self, n_calls: float) -> bool:
        """True: it costs nothing."""
        return True


class OutOfCalls(Exception):
    """A step's allowance does not suffice for the work it was about to begin. Caught by the step itself."""


def share_of(scope: Scope, weight: float, total_weight: float, *, reserved: float = 0.0) -> CallBudget:
    """The allowance of the next step: `weight / total_weight` of what is left after `reserved` calls are set aside."""
    if math.isinf(scope.remaining_calls):
        return CallBudget(scope, math.inf)
    free = max(0.0, scope.remaining_calls - reserved)
    return CallBudget(scope, scope.charged_calls + math.floor(free * weight / total_weight) if total_weight else 0.0)


@contextmanager
def step_scope(allowance: CallBudget, *, name: str) -> Iterator[Scope]:
    """Run the block with every model call of this context held to the allowance."""
    step = allowance.scope.step(allowance.ceiling, name=name)
    try:
        with in_context(scope=step):
            yield step
    finally:
        step.close()


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
    settings: SearchOptions,
    student: Candidate,
    *,
    n_train: int,
    n_validation: int,
    calls: float,
    has_prompt_lm: bool,
) -> tuple[tuple[Step, ...], SearchOptions, Choice | None]:
    """Steps and settings, with `auto` and `advise` replaced by what they stand for here, and the choice of `auto`.

    Args:
        steps: As parsed.
        settings: As given; what is given for an optimizer goes before what `auto` wants of it.
        student: How many calls it takes, and whether its models can be tuned.
        n_train: Training examples.
        n_validation: Validation examples.
        calls: Calls the budget allows.
        has_prompt_lm: Whether a model is there to write instructions.
    """
    if steps[0].kind is StepKind.ADVISE:
        return parse_strategy("p -> w" if all(is_tunable(lm) for lm in student.lms) else "p"), settings, None
    if steps[0].kind is not StepKind.AUTO:
        return steps, settings, None
    choice = choose_strategy(
        n_train=n_train,
        n_validation=n_validation,
        calls=calls,
        calls_per_example=len(student.parts),
        tunable=all(is_tunable(lm) for lm in student.lms),
        has_prompt_lm=has_prompt_lm,
    )
    kwargs = {**choice.optimizer_kwargs, **settings.optimizer_kwargs}
    return parse_strategy(choice.strategy), replace(settings, optimizer_kwargs=kwargs), choice
