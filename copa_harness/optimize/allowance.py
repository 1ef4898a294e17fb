"""How many calls a step of a strategy may use: its share of what the run's budget still allows.

The search asks *before* it starts work it might not be able to finish, so which calls are refused never depends on
the order of threads. DSPy's optimizers cannot ask; they run inside a `StepScope`, which refuses what is too much.
Knows scopes and numbers; knows nothing of programs or scores.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import dspy

from copa_harness.errors import BudgetExhausted
from copa_harness.lm.meter import Meter
from copa_harness.lm.scope import SETTING, Reservation, Scope
from copa_harness.results import Budget, Phase, Usage


@dataclass(frozen=True, slots=True)
class Allowance:
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


class Replays(Allowance):
    """For work whose requests the scope has counted already, and which is free therefore.

    It asks for no estimate: what is new after all is refused by the scope when it is one too many.
    """

    def can_afford(self, n_calls: float) -> bool:
        """True: it costs nothing."""
        return True


class OutOfCalls(Exception):
    """A step's allowance does not suffice for the work it was about to begin. Caught by the step itself."""


def share_of(scope: Scope, weight: float, total_weight: float, *, reserved: float = 0.0) -> Allowance:
    """The allowance of the next step: `weight / total_weight` of what is left after `reserved` calls are set aside."""
    if math.isinf(scope.remaining_calls):
        return Allowance(scope, math.inf)
    free = max(0.0, scope.remaining_calls - reserved)
    return Allowance(scope, scope.charged_calls + math.floor(free * weight / total_weight) if total_weight else 0.0)


class StepScope(Scope):
    """A scope whose calls are charged to `parent`, with a lower ceiling of its own.

    Refusing a call here says nothing about the parent's budget: `parent.exhausted` stays as it is.
    """

    def __init__(self, parent: Scope, *, ceiling: float, name: str) -> None:
        super().__init__(f"{parent.name} [{name}]", budget=Budget(ceiling, parent.budget.name), parent=parent)
        self._run = parent
        self._parent = parent  # so that what holds for the run (tokens, dollars, seconds) holds here
        self._step_lock = threading.RLock()
        self._step_refused = False

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """As the parent's."""
        with self._run.phase(phase):
            yield

    @property
    def current_phase(self) -> Phase:
        """The parent's."""
        return self._run.current_phase

    def usage(self) -> Usage:
        """The parent's, the whole run."""
        return self._run.usage()

    def phase_usages(self) -> dict[str, Usage]:
        """The parent's, the whole run."""
        return self._run.phase_usages()

    def add_train_steps(self, n: int, wall_s: float) -> None:
        """Booked with the parent."""
        self._run.add_train_steps(n, wall_s)

    def add_payments(self, other: Meter) -> None:
        """Booked with the parent."""
        self._run.add_payments(other)

    @property
    def charged_calls(self) -> int:
        """The parent's, the whole run."""
        return self._run.charged_calls

    @property
    def remaining_calls(self) -> float:
        """Left to this step, and to the run."""
        return max(0.0, min(self._run.remaining_calls, self.budget.calls - self._run.charged_calls))

    @property
    def exhausted(self) -> bool:
        """Whether this step's ceiling refused a call."""
        return self._step_refused

    def reserve(self, key: str, *, paying: bool = False) -> Reservation:
        """As the parent's, within this step's ceiling."""
        with self._step_lock:
            if self._closed:
                raise BudgetExhausted(
                    f"step {self.name!r} has ended; a thread left over from it asked for another call"
                )
            before = self._run.charged_calls
            reservation = self._run.reserve(key, paying=paying)
            if before < self._run.charged_calls and self._run.charged_calls > self.budget.calls:
                self._run.refund(reservation, failed=False)
                self._step_refused = True
                raise BudgetExhausted(
                    f"step {self.name!r} used its share of the budget ({self.budget.calls:g} distinct requests counted "
                    "from the beginning of the run)"
                )
            return reservation

    def settle(self, reservation: Reservation, usage: Usage) -> None:
        """Settled with the parent."""
        self._run.settle(reservation, usage)

    def refund(self, reservation: Reservation, *, failed: bool = True) -> None:
        """Refunded with the parent."""
        self._run.refund(reservation, failed=failed)


@contextmanager
def step_scope(allowance: Allowance, *, name: str) -> Iterator[StepScope]:
    """Run the block with every model call of this context held to the allowance."""
    scope = StepScope(allowance.scope, ceiling=allowance.ceiling, name=name)
    try:
        with dspy.context(**{SETTING: scope}):
            yield scope
    finally:
        scope.close()
