"""What calls cost, and an account that never lets the sum of costs pass its ceilings.

A cost is held before anything is paid, in its worst case, and settled at what it turned out to be. Spent plus held
never exceeds a ceiling. A cost that would fit if only the calls in flight turned out cheaper waits for them; one that
cannot fit is refused. Amounts are integers (dollars as 10^-12 dollars), so no rounding adds up. Knows nothing of
requests, engines, phases or processes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Protocol

from copa_harness.results import Budget

PICO = 10**12
"""Parts of a dollar an account counts in; the cheapest token price known is some 10^-9 dollars."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Amounts of one call, of training, or of a sum of them.

    Attributes:
        calls: Payments: calls that reached a model.
        input_tokens: Prompt tokens.
        output_tokens: Completion tokens.
        picodollars: Price in 10^-12 dollars; see `Cost.priced`.
        train_steps: Optimizer steps.
    """

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    picodollars: int = 0
    train_steps: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in COST_FIELDS))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) - getattr(other, name) for name in COST_FIELDS))

    @property
    def usd(self) -> float:
        """The price in dollars."""
        return self.picodollars / PICO

    @staticmethod
    def picodollars_of(usd: float) -> int:
        """Dollars as an integer amount, rounded up."""
        return math.ceil(round(usd * PICO, 3))


COST_FIELDS = tuple(entry.name for entry in fields(Cost))


class OverBudget(Exception):
    """A cost does not fit under a ceiling. Turned into `BudgetExhausted` by whoever asked.

    Attributes:
        what: The ceiling's name, as in `Budget`.
        spent: What is spent already.
        asked: What was asked for.
        ceiling: The ceiling.
    """

    def __init__(self, what: str, *, spent: float, asked: float, ceiling: float) -> None:
        super().__init__(what)
        self.what, self.spent, self.asked, self.ceiling = what, spent, asked, ceiling

    def __str__(self) -> str:
        if self.what == "seconds":
            return f"its {self.ceiling:g} seconds are over"
        unit = {"usd": "$"}.get(self.what, "")
        name = {"calls": "paid calls", "usd": "dollars"}.get(self.what, self.what.replace("_", " "))
        return (
            f"{unit}{_number(self.spent)} of {unit}{_number(self.ceiling)} {name} spent, the next call may cost up to "
            f"{unit}{_number(self.asked)}"
        )


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.6g}"


@dataclass(frozen=True, slots=True)
class Ceilings:
    """A budget's ceilings on what calls cost, in the integers of `Cost`; None where there is none."""

    calls: int | None = None
    tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    picodollars: int | None = None
    train_steps: int | None = None

    @classmethod
    def of(cls, budget: Budget, *, calls: bool) -> Ceilings:
        """The ceilings of `budget`, that on calls only with `calls`."""

        def whole(value: float) -> int | None:
            return math.floor(value) if math.isfinite(value) else None

        return cls(
            calls=whole(budget.calls) if calls else None,
            tokens=whole(budget.tokens),
            input_tokens=whole(budget.input_tokens),
            output_tokens=whole(budget.output_tokens),
            picodollars=whole(budget.usd * PICO),
            train_steps=whole(budget.train_steps),
        )

    @property
    def bound_tokens(self) -> bool:
        """Whether any ceiling needs to know a call's tokens in advance."""
        return not (self.tokens is None and self.input_tokens is None and self.output_tokens is None)

    @property
    def bound_usd(self) -> bool:
        """Whether a ceiling needs to know a call's price in advance."""
        return self.picodollars is not None

    def check(self, total: Cost, *, spent: Cost, asked: Cost) -> None:
        """Check that `total` is under every ceiling that `asked` adds to.

        Raises:
            OverBudget: It is not; `spent` and `asked` are for the message.
        """
        for name in ("calls", "tokens", "input_tokens", "output_tokens", "picodollars", "train_steps"):
            ceiling = getattr(self, name)
            if ceiling is None or amount_of(asked, name) == 0:
                continue
            if amount_of(total, name) > ceiling:
                usd = name == "picodollars"
                scale = PICO if usd else 1
                raise OverBudget(
                    "usd" if usd else name,
                    spent=amount_of(spent, name) / scale,
                    asked=amount_of(asked, name) / scale,
                    ceiling=ceiling / scale,
                )


def amount_of(cost: Cost, name: str) -> int:
    """One amount of a cost by the name of its ceiling."""
    if name == "tokens":
        return cost.input_tokens + cost.output_tokens
    value: int = getattr(cost, name)
    return value


class Account(Protocol):
    """Keeps spent plus held under ceilings."""

    @property
    def ceilings(self) -> Ceilings:
        """What it enforces."""
        ...

    def hold(self, cost: Cost) -> int:
        """Hold `cost` and return the number of the hold; waits while only calls in flight stand in the way.

        Raises:
            OverBudget: It cannot fit.
        """
        ...

    def settle(self, number: int, cost: Cost) -> None:
        """Replace a hold by what it turned out to cost."""
        ...

    def release(self, number: int) -> None:
        """Give a hold back: nothing was paid."""
        ...


class MemoryAccount:
    """The account of one scope, shared by the threads of this process."""

    def __init__(self, ceilings: Ceilings) -> None:
        self.ceilings = ceilings
        self._changed = threading.Condition()
        self._spent = Cost()
        self._held = Cost()
        self._holds: dict[int, Cost] = {}
        self._n_holds = 0

    @property
    def spent(self) -> Cost:
        """What is settled."""
        with self._changed:
            return self._spent

    def totals(self) -> Mapping[str, Cost]:
        """`spent` and `held`, read at one moment."""
        with self._changed:
            return {"spent": self._spent, "held": self._held}

    def hold(self, cost: Cost) -> int:
        """As `Account.hold`."""
        with self._changed:
            while True:
                self.ceilings.check(self._spent + cost, spent=self._spent, asked=cost)
                try:
                    self.ceilings.check(self._spent + self._held + cost, spent=self._spent, asked=cost)
                except OverBudget:
                    self._changed.wait()
                    continue
                self._n_holds += 1
                self._holds[self._n_holds] = cost
                self._held += cost
                return self._n_holds

    def settle(self, number: int, cost: Cost) -> None:
        """As `Account.settle`."""
        with self._changed:
            self._held -= self._holds.pop(number)
            self._spent += cost
            self._changed.notify_all()

    def release(self, number: int) -> None:
        """As `Account.release`."""
        self.settle(number, Cost())
