"""A scope: the budget and the meter of one run, shared by every thread that works for it.

The door reserves a request's key here before anything is paid and settles or refunds it afterwards. Counted are
*distinct* requests, bought or replayed (see `Budget`); asking the same thing again in the same scope is free. What
was spent is kept per phase, and the phase belongs to the scope, not to a thread: DSPy's worker threads do not
inherit context variables. Knows nothing of engines, caches or DSPy programs.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from copa_harness.errors import BudgetExhausted
from copa_harness.results import Budget, Phase, Usage

SETTING = "copa_scope"
"""Name under which `open_scope` puts the scope into DSPy's settings; DSPy carries those into its worker threads."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A promise of one request, to be settled or refunded exactly once.

    Attributes:
        key: The request's cache key.
        phase: The phase the request is billed to: the one current when it was reserved.
        again: True when the key was already settled in this scope and has to be bought a second time (its
            stored answer was lost); such a purchase counts against the budget like a new request.
    """

    key: str
    phase: Phase
    again: bool = False


class Scope:
    """Budget and meter of one run. All methods may be called from any thread.

    Args:
        name: Shown in messages, e.g. the test's node id.
        budget: The ceilings; unlimited by default.
    """

    def __init__(self, name: str, *, budget: Budget | None = None) -> None:
        self.name = name
        self.budget = Budget() if budget is None else budget
        self._lock = threading.RLock()
        self._holders: dict[str, int] = {}  # keys reserved and not yet settled -> number of reservations
        self._settled: set[str] = set()
        self._n_again = 0
        self._n_counted = 0
        self._refused = False
        self._closed = False
        self._phases: list[Phase] = []
        self._segment_start_s = 0.0
        self._usages: dict[Phase, Usage] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Scope:
        return self

    def __repr__(self) -> str:
        return f"Scope({self.name!r}, {self.charged_calls} of {self.budget.calls} calls)"

    # -- the meter

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Stamp every call made inside the block, from whatever thread, with `phase`.

        The previous phase is restored afterwards. Wall time is charged to the innermost phase only, so the
        phases of a scope never count a second twice. Phases nest; two threads must not open phases of one
        scope side by side.
        """
        with self._lock:
            self._close_segment()
            self._phases.append(phase)
            self._add(phase, Usage())
        try:
            yield
        finally:
            with self._lock:
                self._close_segment()
                self._phases.pop()

    @property
    def current_phase(self) -> Phase:
        """The phase calls are stamped with now; `Phase.EVALUATE` outside every `phase` block."""
        with self._lock:
            return self._phases[-1] if self._phases else Phase.EVALUATE

    def usage(self) -> Usage:
        """Everything spent so far, all phases together, the running one included."""
        return sum(self.phase_usages().values(), Usage())

    def phase_usages(self) -> dict[str, Usage]:
        """What each phase spent, in the order the phases were first used."""
        with self._lock:
            self._close_segment()
            return {phase.value: usage for phase, usage in self._usages.items()}

    def add_train_steps(self, n: int, wall_s: float) -> None:
        """Book `n` optimizer steps of training that took `wall_s` seconds in the current phase.

        Inside a `phase` block the seconds are already measured by the block and are not added again.
        """
        with self._lock:
            self._add(self.current_phase, Usage(train_steps=n, wall_s=0.0 if self._phases else wall_s))

    def _close_segment(self) -> None:
        now_s = time.monotonic()
        if self._phases:
            self._add(self._phases[-1], Usage(wall_s=now_s - self._segment_start_s))
        self._segment_start_s = now_s

    def _add(self, phase: Phase, usage: Usage) -> None:
        self._usages[phase] = self._usages.get(phase, Usage()) + usage

    # -- the budget

    @property
    def charged_calls(self) -> int:
        """Distinct requests so far, bought, replayed or in flight: what `budget.calls` bounds."""
        with self._lock:
            return self._n_counted

    @property
    def remaining_calls(self) -> float:
        """Distinct requests still allowed; `math.inf` without a ceiling."""
        return max(0.0, self.budget.calls - self.charged_calls) if math.isfinite(self.budget.calls) else math.inf

    @property
    def exhausted(self) -> bool:
        """Whether a request was refused because the budget was spent."""
        with self._lock:
            return self._refused

    def reserve(self, key: str, *, paying: bool = False) -> Reservation:
        """Reserve one request before it is answered.

        Args:
            key: The request's cache key. A key this scope has already charged is free.
            paying: True when the answer will be bought. A key settled earlier is then charged once more, so that
                calls really paid can never pass the ceiling even if stored answers are lost.

        Raises:
            BudgetExhausted: The ceiling would be passed, or the scope has ended.
        """
        with self._lock:
            again = paying and key in self._settled
            if again or not (key in self._settled or key in self._holders):
                self._count_one()
            if again:
                self._n_again += 1
            else:
                self._holders[key] = self._holders.get(key, 0) + 1
            return Reservation(key, self.current_phase, again)

    def settle(self, reservation: Reservation, usage: Usage) -> None:
        """Make a reservation final and book what the answer cost (`paid_calls=1` or `cached_calls=1`)."""
        with self._lock:
            if not reservation.again:
                self._release(reservation.key)
                self._settled.add(reservation.key)
            self._add(reservation.phase, usage)

    def refund(self, reservation: Reservation, *, failed: bool = True) -> None:
        """Give a reservation back: the call brought no answer. `failed` counts it as a failed call."""
        with self._lock:
            if reservation.again:
                self._n_again -= 1
                self._n_counted -= 1
            else:
                self._release(reservation.key)
                if reservation.key not in self._holders and reservation.key not in self._settled:
                    self._n_counted -= 1
            self._add(reservation.phase, Usage(failed_calls=1 if failed else 0))

    def close(self) -> None:
        """End the scope: threads left over from it may still replay what it charged, and buy nothing more."""
        with self._lock:
            self._closed = True

    def _count_one(self) -> None:
        if self._closed:
            raise BudgetExhausted(
                f"scope {self.name!r} has ended; a thread left over from it asked for another model call"
            )
        if self._n_counted + 1 > self.budget.calls:
            self._refused = True
            raise BudgetExhausted(
                f"budget {self.budget.name!r} of {self.name!r} is spent: {self._n_counted} distinct requests of "
                f"{self.budget.calls:g} allowed; raise --copa-budget to go further"
            )
        self._n_counted += 1

    def _release(self, key: str) -> None:
        holders = self._holders[key] - 1
        if holders:
            self._holders[key] = holders
        else:
            del self._holders[key]


_stack_lock = threading.Lock()
_stack: list[Scope] = []
_default = Scope("process")


def current_scope() -> Scope:
    """The scope calls are charged to here and now.

    The one in DSPy's settings if this context has one (DSPy carries it into its worker threads), else the innermost
    scope open anywhere in the process (threads DSPy starts for fine-tuning inherit nothing), else an unlimited one.
    """
    import dspy

    found = dspy.settings.get(SETTING)
    if isinstance(found, Scope):
        return found
    with _stack_lock:
        return _stack[-1] if _stack else _default


@contextmanager
def open_scope(name: str, *, budget: Budget | None = None) -> Iterator[Scope]:
    """Open a scope for the duration of the block, and end it afterwards.

    Args:
        name: Shown in messages.
        budget: The ceilings; unlimited by default.

    Yields:
        The scope; its usage stays readable after the block.
    """
    import dspy

    scope = Scope(name, budget=budget)
    with _stack_lock:
        _stack.append(scope)
    try:
        with dspy.context(**{SETTING: scope}):
            yield scope
    finally:
        with _stack_lock:
            _stack.remove(scope)
        scope.close()
