"""A scope: the budget and the meter of one run, shared by every thread that works for it.

The gateway reserves a request's key here before anything is paid and settles or refunds it afterwards. Counted are
*distinct* requests, bought or replayed (see `Budget`); asking the same thing again in the same scope is free. What was
spent is kept per phase, and the phase belongs to the scope, not to a thread: DSPy's worker threads do not inherit
context variables. Tokens, dollars and training steps are held in their worst case before they are paid, here and in the
ledger of the whole run if one is open.

The meter of one run: what was spent and what failed, phase by phase.

The phase belongs to the meter, not to a thread: DSPy's worker threads do not inherit context variables.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from copa_harness.errors import BudgetExhausted
from copa_harness.lm.budget.cost import Account, Bounds, Ceilings, Cost, Hold, MemoryAccount, OverBudget, Reservation
from copa_harness.lm.budget.ledger import current_ledger
from copa_harness.results import Budget, Phase, Usage

_booked_as: ContextVar[Phase | None] = ContextVar("copa_booked_as", default=None)


@contextmanager
def booked_as(phase: Phase) -> Iterator[None]:
    """Stamp every call of this thread (and task) inside the block with `phase`, whatever phase the scope is in.

    For calls that hide in something else: what a metric asks a judge model is booked as `Phase.METRIC`.
    """
    token = _booked_as.set(phase)
    try:
        yield
    finally:
        _booked_as.reset(token)


class Meter:
    """Usage per phase and failures per kind. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._phases: list[Phase] = []
        self._segment_start_s = 0.0
        self._usages: dict[Phase, Usage] = {}
        self._failures: dict[str, int] = {}
        self._first_failures: dict[str, str] = {}

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
        if (override := _booked_as.get()) is not None:
            return override
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

    @property
    def failures(self) -> dict[str, int]:
        """How many attempts failed, by kind (`rate limit`, `timeout`, ...), those that a retry mended included."""
        with self._lock:
            return dict(self._failures)

    @property
    def first_failures(self) -> dict[str, str]:
        """The traceback of the first failure of each kind."""
        with self._lock:
            return dict(self._first_failures)

    def note_failure(self, kind: str, traceback: str) -> None:
        """Count a failed attempt, keeping the first traceback of its kind."""
        with self._lock:
            self._failures[kind] = self._failures.get(kind, 0) + 1
            self._first_failures.setdefault(kind, traceback)


SETTING = "copa_scope"
"""Name under which `open_scope` puts the scope into DSPy's settings; DSPy carries those into its worker threads."""


class Scope(Meter):
    """Budget and meter of one run. All methods may be called from any thread.

    Args:
        name: Shown in messages, e.g. the test's node id.
        budget: The ceilings; unlimited by default.
        parent: The scope around, to whose ceilings on tokens, dollars, seconds and training steps everything is held
            too. (Its count of distinct requests is its own.)
    """

    def __init__(
        self,
        name: str,
        *,
        budget: Budget | None = None,
        parent: Scope | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.budget = Budget() if budget is None else budget
        self._holders: dict[str, int] = {}  # keys reserved and not yet settled -> number of reservations
        self._settled: set[str] = set()
        self._n_again = 0
        self._n_counted = 0
        self._refused = False
        self._closed = False
        self._account = MemoryAccount(Ceilings.of(self.budget, calls=False))
        self._began_s = time.monotonic()
        self._around = parent

    def __deepcopy__(self, memo: dict[int, object]) -> Scope:
        return self

    def __repr__(self) -> str:
        return f"Scope({self.name!r}, {self.charged_calls} of {self.budget.calls} calls)"

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
            first = again or not (key in self._settled or key in self._holders)
            if first:
                self._count_one()
            if again:
                self._n_again += 1
            else:
                self._holders[key] = self._holders.get(key, 0) + 1
            return Reservation(key, self.current_phase, again, first)

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

    # -- what calls cost

    @property
    def bounds(self) -> Bounds:
        """Which amounts must be known from above before a call is paid, here, in scopes around and in the run."""
        ceilings = [(scope._account.ceilings, scope.budget.name) for scope in self._lineage()]
        if (ledger := current_ledger()) is not None:
            ceilings.append((ledger.ceilings, ledger.budget.name))
        asking = [(one, name) for one, name in ceilings if one.bound_tokens or one.bound_usd]
        return Bounds(
            tokens=any(one.bound_tokens for one, _ in asking),
            usd=any(one.bound_usd for one, _ in asking),
            budget=asking[0][1] if asking else "unlimited",
        )

    @property
    def remaining_s(self) -> float:
        """Seconds in which something may still be bought; `math.inf` without a ceiling."""
        ledger = current_ledger()
        left = [scope.budget.seconds - (time.monotonic() - scope._began_s) for scope in self._lineage()]
        return max(0.0, min([*left, math.inf if ledger is None else ledger.remaining_s]))

    def hold(self, cost: Cost, *, replayed: bool = False) -> Hold:
        """Hold what something may cost, in this scope, in those around it and in the ledger of the run.

        Waits while only calls in flight stand in the way.

        Args:
            cost: The most it can cost.
            replayed: The answer is on disk already: it is charged to the scopes, as it was when it was bought, so that
                a resumed run stops where an uninterrupted one does; the run's ledger counts real payments only, and
                time does not matter.

        Raises:
            BudgetExhausted: It does not fit under a ceiling.
        """
        lineage, ledger = self._lineage(), None if replayed else current_ledger()
        places: list[tuple[Account, int]] = []
        name = budget = ""
        option = "--copa-budget"
        try:
            for scope in lineage:
                name, budget = scope.name, scope.budget.name
                elapsed_s = time.monotonic() - scope._began_s
                if elapsed_s >= scope.budget.seconds and not replayed:
                    raise OverBudget("seconds", spent=elapsed_s, asked=0, ceiling=scope.budget.seconds)
                if scope._account.ceilings != _NO_CEILINGS:
                    places.append((scope._account, scope._account.hold(cost)))
            if ledger is not None:
                name, budget, option = "the whole run", ledger.budget.name, "--copa-total-budget"
                places.append((ledger, ledger.hold(cost)))
        except BaseException as error:
            Hold(cost, tuple(places)).release()
            if not isinstance(error, OverBudget):
                raise
            for scope in lineage:
                scope._refused = True
            raise BudgetExhausted(
                f"budget {budget!r} of {name!r} is spent: {error}; raise {option} to go further"
            ) from None
        return Hold(cost, tuple(places))

    def note_failure(self, kind: str, traceback: str) -> None:
        """Count a failed attempt here and in the scopes around, keeping the first traceback of its kind."""
        for scope in self._lineage():
            Meter.note_failure(scope, kind, traceback)

    def _lineage(self) -> tuple[Scope, ...]:
        found: list[Scope] = []
        scope: Scope | None = self
        while scope is not None:
            found.append(scope)
            scope = scope._around
        return tuple(found)

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


_NO_CEILINGS = Ceilings()

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
def open_scope(
    name: str,
    *,
    budget: Budget | None = None,
    parent: Scope | None = None,
) -> Iterator[Scope]:
    """Open a scope for the duration of the block, and end it afterwards.

    Args:
        name: Shown in messages.
        budget: The ceilings; unlimited by default.
        parent: See `Scope`.

    Yields:
        The scope; its usage stays readable after the block.
    """
    import dspy

    scope = Scope(name, budget=budget, parent=parent)
    with _stack_lock:
        _stack.append(scope)
    try:
        with dspy.context(**{SETTING: scope}):
            yield scope
    finally:
        with _stack_lock:
            _stack.remove(scope)
        scope.close()
