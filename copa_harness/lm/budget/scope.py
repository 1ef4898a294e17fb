"""A scope: the budget and the meter of one run, shared by every thread that works for it.

    with scope.charge(key, worst=worst) as charge:      refused here, before anything is paid, if it may be too much
        answer = ask()
        charge.settle(*actual_cost(answer, ...))        the worst case is replaced by what it came to

`Charge` is all the bookkeeping of one request: its key counts against the ceiling on calls, its worst case is reserved
in the account of the scope and in the ledger of the whole run if one is open, and what it came to is booked in the
phase it began in. Counted are *distinct* requests, bought or replayed (see `Budget`); asking the same
thing again in the same scope is free. What was spent is kept per phase, and the phase belongs to the scope, not to a
thread: DSPy's worker threads do not inherit context variables.

A *step* of a scope (`Scope.step`) is the same run with the same books and a lower ceiling on calls: what a part of a
strategy may use. Refusing a call there says nothing about the run's budget: the run's `exhausted` stays as it is.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from copa_harness.errors import BudgetExhausted
from copa_harness.lm.budget.cost import (
    Account,
    Bounds,
    Ceilings,
    Cost,
    OverBudget,
    Reservation,
    lost_cost,
)
from copa_harness.lm.budget.ledger import Ledger, current_ledger
from copa_harness.results import Budget, Phase, Usage


@dataclass(slots=True)
class _Books:
    """What a run has asked for and spent; shared by a scope and its steps, and only touched under `lock`."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    phases: list[Phase] = field(default_factory=list)
    segment_start_s: float = 0.0
    usages: dict[Phase, Usage] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    first_failures: dict[str, str] = field(default_factory=dict)
    pending: dict[str, int] = field(default_factory=dict)  # keys charged and not yet settled -> number of charges
    settled: set[str] = field(default_factory=set)
    n_counted: int = 0
    doors: dict[object, Exception | None] = field(default_factory=dict)  # provider -> why it lets nobody in, None if so

    def add(self, phase: Phase, usage: Usage) -> None:
        self.usages[phase] = self.usages.get(phase, Usage()) + usage

    def close_segment(self) -> None:
        """Book the seconds since the last phase began or ended."""
        now_s = time.monotonic()
        if self.phases:
            self.add(self.phases[-1], Usage(wall_s=now_s - self.segment_start_s))
        self.segment_start_s = now_s


class Charge:
    """One request on the books of a scope, from before it is answered until it is known what that cost.

    Settled, lost or refunded exactly once. As a context manager it does that itself if the block did not: an exception
    gives everything back and counts a failed call; an interruption (Ctrl-C) leaves the worst case spent, since nobody
    will know whether the call is billed.

    Attributes:
        key: The request's cache key.
        again: Whether the key was settled in this scope before and has to be bought a second time (its stored answer
            was lost); such a purchase counts against the budget like a new request.
        first: Whether it was counted: the request is new to the scope, or bought again.
    """

    __slots__ = ("_books", "_is_open", "_phase", "_reservation", "again", "first", "key")

    def __init__(self, books: _Books, key: str, *, phase: Phase, again: bool, first: bool) -> None:
        self.key, self.again, self.first = key, again, first
        self._books, self._phase = books, phase
        self._reservation: Reservation | None = None
        self._is_open = True

    def reserved(self, reservation: Reservation) -> None:
        """Take what was reserved for it; settled or released with the charge."""
        self._reservation = reservation

    def settle(self, cost: Cost, usage: Usage) -> None:
        """Make it final.

        Args:
            cost: What it came to, in place of what was reserved.
            usage: What is booked for it (`paid_calls=1` or `cached_calls=1`).
        """
        if self._reservation is not None:
            self._reservation.settle(cost)
        self._is_open, books = False, self._books
        with books.lock:
            if not self.again:
                self._close_key()
                books.settled.add(self.key)
            books.add(self._phase, usage)

    def lose(self) -> None:
        """Book the worst case as paid for nothing: no answer came, and the call may have been billed."""
        worst = Cost() if self._reservation is None else self._reservation.cost
        self.settle(worst, lost_cost(worst))

    def refund(self, *, failed: bool = True) -> None:
        """Give everything back: there is no answer, and nothing was paid. `failed` counts it as a failed call."""
        if self._reservation is not None:
            self._reservation.release()
        self._uncount(failed=failed)

    def _uncount(self, *, failed: bool) -> None:
        self._is_open, books = False, self._books
        with books.lock:
            if self.again:
                books.n_counted -= 1
            else:
                self._close_key()
                if self.key not in books.pending and self.key not in books.settled:
                    books.n_counted -= 1
            books.add(self._phase, Usage(failed_calls=1 if failed else 0))

    def _close_key(self) -> None:
        others = self._books.pending[self.key] - 1
        if others:
            self._books.pending[self.key] = others
        else:
            del self._books.pending[self.key]

    def __enter__(self) -> Charge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._is_open:
            return
        if error is None or isinstance(error, Exception):
            self.refund(failed=error is not None)
            return
        if self._reservation is not None:
            self._reservation.settle(self._reservation.cost)
        self._uncount(failed=False)


class Scope:
    """Budget and meter of one run. All methods may be called from any thread.

    Args:
        name: Shown in messages, e.g. the test's node id.
        budget: The ceilings; unlimited by default.
    """

    def __init__(self, name: str, *, budget: Budget | None = None) -> None:
        self.name = name
        self.budget = Budget() if budget is None else budget
        self._books = _Books()
        self._account = Account(Ceilings.of(self.budget, calls=False))
        self._began_s = time.monotonic()
        self._run = self  # a step's is the whole it is a part of
        self._steps: tuple[Scope, ...] = ()  # this one and those around it, outermost first, if it is a step
        self._refused = False
        self._closed = False

    def __deepcopy__(self, memo: dict[int, object]) -> Scope:
        return self

    def __repr__(self) -> str:
        return f"Scope({self.name!r}, {self.charged_calls} of {self.budget.calls} calls)"

    def step(self, ceiling: float, *, name: str) -> Scope:
        """A part of the same run, with the same books, that may count up to `ceiling` distinct requests.

        Args:
            ceiling: On the distinct requests of the whole run, counted from its beginning.
            name: Shown in messages, behind the run's.
        """
        step = Scope(f"{self.name} [{name}]", budget=Budget(ceiling, self.budget.name))
        step._books, step._run, step._steps = self._books, self._run, (*self._steps, step)
        return step

    # -- the meter

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Stamp every call made inside the block, from whatever thread, with `phase`.

        The previous phase is restored afterwards. Wall time is charged to the innermost phase only, so the
        phases of a scope never count a second twice. Phases nest; two threads must not open phases of one
        scope side by side.
        """
        books = self._books
        with books.lock:
            books.close_segment()
            books.phases.append(phase)
            books.add(phase, Usage())
        try:
            yield
        finally:
            with books.lock:
                books.close_segment()
                books.phases.pop()

    @property
    def current_phase(self) -> Phase:
        """The phase calls are stamped with now; `Phase.EVALUATE` outside every `phase` block."""
        phases = self._books.phases
        return phases[-1] if phases else Phase.EVALUATE

    def usage(self) -> Usage:
        """Everything spent so far, all phases together, the running one included."""
        return sum(self.phase_usages().values(), Usage())

    def phase_usages(self) -> dict[str, Usage]:
        """What each phase spent, in the order the phases were first used."""
        with self._books.lock:
            self._books.close_segment()
            return {phase.value: usage for phase, usage in self._books.usages.items()}

    def add_train_steps(self, n: int, wall_s: float) -> None:
        """Book `n` optimizer steps of training that took `wall_s` seconds in the current phase.

        Inside a `phase` block the seconds are already measured by the block and are not added again.
        """
        with self._books.lock:
            measured = bool(self._books.phases)
            self._books.add(self.current_phase, Usage(train_steps=n, wall_s=0.0 if measured else wall_s))

    @property
    def failures(self) -> dict[str, int]:
        """How many attempts failed, by kind (`rate limit`, `timeout`, ...), those that a retry mended included."""
        with self._books.lock:
            return dict(self._books.failures)

    @property
    def first_failures(self) -> dict[str, str]:
        """The traceback of the first failure of each kind."""
        with self._books.lock:
            return dict(self._books.first_failures)

    def note_failure(self, kind: str, traceback: str) -> None:
        """Count a failed attempt, keeping the first traceback of its kind."""
        books = self._books
        with books.lock:
            books.failures[kind] = books.failures.get(kind, 0) + 1
            books.first_failures.setdefault(kind, traceback)

    def let_in(self, provider: object, failure: Exception | None = None) -> None:
        """Note that a provider answered, or, if it has not yet, that it lets nobody in."""
        with self._books.lock:
            if failure is None:
                self._books.doors[provider] = None
            else:
                self._books.doors.setdefault(provider, failure)

    def shut_out(self, provider: object) -> Any:
        """Why a provider lets nobody in, if it has answered nothing in this scope and said so."""
        return self._books.doors.get(provider)

    # -- distinct requests

    @property
    def charged_calls(self) -> int:
        """Distinct requests so far, bought, replayed or in flight: what `budget.calls` bounds."""
        return self._books.n_counted

    @property
    def remaining_calls(self) -> float:
        """Distinct requests still allowed; `math.inf` without a ceiling."""
        ceiling = min(scope.budget.calls for scope in (self._run, *self._steps))
        return max(0.0, ceiling - self.charged_calls) if math.isfinite(ceiling) else math.inf

    @property
    def exhausted(self) -> bool:
        """Whether a request was refused because the budget was spent."""
        return self._refused

    def charge(self, key: str, *, worst: Cost | None = None, paying: bool = True, phase: Phase | None = None) -> Charge:
        """Put one request on the books before it is answered.

        Args:
            key: The request's cache key. A key this scope has already charged is free.
            worst: The most its answer can cost.
            paying: True when the answer will be bought. A key settled earlier is then counted once more, so that calls
                really paid can never pass the ceiling even if stored answers are lost; and `worst` is reserved.
            phase: What it is billed to; the phase current now by default.

        Raises:
            BudgetExhausted: A ceiling would be passed, or the scope has ended.
        """
        books = self._books
        with books.lock:
            for step in reversed(self._steps):
                if step._closed:
                    raise BudgetExhausted(
                        f"step {step.name!r} has ended; a thread left over from it asked for another call"
                    )
            again = paying and key in books.settled
            first = again or not (key in books.settled or key in books.pending)
            if first:
                self._count_one()
            if not again:
                books.pending[key] = books.pending.get(key, 0) + 1
            charge = Charge(books, key, phase=phase or self.current_phase, again=again, first=first)
        if paying:
            try:
                charge.reserved(self.reserve(Cost() if worst is None else worst))
            except BaseException:
                charge.refund(failed=False)
                raise
        return charge

    def replay(
        self, key: str, *, cost: Callable[[], Cost], phase: Phase | None = None, truncated: bool = False
    ) -> None:
        """Count a request whose answer is stored already.

        Args:
            key: The request's cache key.
            cost: What the answer cost when it was bought, calls left out. It is charged to the scopes as it was then,
                so that a resumed run stops where an uninterrupted one does; asked for only if the request is new here
                and a ceiling needs to know.
            phase: As in `charge`.
            truncated: Whether the answer was cut off at the most tokens it may have.

        Raises:
            BudgetExhausted: A ceiling would be passed, or the scope has ended.
            ConfigurationError: A ceiling needs to know what nobody does.
        """
        charge = self.charge(key, paying=False, phase=phase)
        usage = Usage(cached_calls=1, truncated_calls=int(truncated))
        try:
            if charge.first and self.bounds.asked:
                charge.reserved(self.reserve(spent := cost(), replayed=True))
                charge.settle(spent, usage)
                return
        except BaseException:
            charge.refund(failed=False)
            raise
        charge.settle(Cost(), usage)

    def close(self) -> None:
        """End the scope: threads left over from it may still replay what it charged, and buy nothing more."""
        with self._books.lock:
            self._closed = True

    def _count_one(self) -> None:
        run, n_counted = self._run, self._books.n_counted
        if run._closed:
            raise BudgetExhausted(
                f"scope {run.name!r} has ended; a thread left over from it asked for another model call"
            )
        if n_counted + 1 > run.budget.calls:
            run._refused = True
            raise BudgetExhausted(
                f"budget {run.budget.name!r} of {run.name!r} is spent: {n_counted} distinct requests of "
                f"{run.budget.calls:g} allowed; raise --copa-budget to go further"
            )
        for step in self._steps:
            if n_counted + 1 > step.budget.calls:
                step._refused = True
                raise BudgetExhausted(
                    f"step {step.name!r} used its share of the budget ({step.budget.calls:g} distinct requests counted "
                    "from the beginning of the run)"
                )
        self._books.n_counted += 1

    # -- what calls cost

    @property
    def bounds(self) -> Bounds:
        """Which amounts must be known from above before a call is paid, here and in the whole session."""
        ceilings = [(self._run._account.ceilings, self._run.budget.name)]
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
        left_s = self._run.budget.seconds - (time.monotonic() - self._run._began_s)
        return max(0.0, min(left_s, math.inf if ledger is None else ledger.remaining_s))

    def reserve(self, cost: Cost, *, replayed: bool = False) -> Reservation:
        """Reserve what something may cost, in this scope and in the ledger of the whole session.

        Waits while only calls in flight stand in the way.

        Args:
            cost: The most it can cost.
            replayed: What it pays for is on disk already: it is charged to the scope, as it was when it was bought;
                the ledger counts real payments only, and time does not matter.

        Raises:
            BudgetExhausted: It does not fit under a ceiling.
        """
        ledger, run = None if replayed else current_ledger(), self._run
        places: list[tuple[Account | Ledger, int]] = []
        name, budget, option = run.name, run.budget.name, "--copa-budget"
        try:
            elapsed_s = time.monotonic() - run._began_s
            if elapsed_s >= run.budget.seconds and not replayed:
                raise OverBudget("seconds", spent=elapsed_s, asked=0, ceiling=run.budget.seconds)
            if run._account.ceilings != _NO_CEILINGS:
                places.append((run._account, run._account.reserve(cost)))
            if ledger is not None:
                name, budget, option = "the whole run", ledger.budget.name, "--copa-total-budget"
                places.append((ledger, ledger.reserve(cost)))
        except BaseException as error:
            Reservation(cost, tuple(places)).release()
            if not isinstance(error, OverBudget):
                raise
            run._refused = True
            raise BudgetExhausted(
                f"budget {budget!r} of {name!r} is spent: {error}; raise {option} to go further"
            ) from None
        return Reservation(cost, tuple(places))


_NO_CEILINGS = Ceilings()
