"""What calls cost: the most, known before a call; what it did, known afterwards; and an account that keeps sums.

A cost is reserved in its worst case before anything is paid, and settled at what it turned out to be. Spent plus
reserved never exceeds a ceiling. A cost that would fit if only the calls in flight turned out cheaper waits for them;
one that cannot fit is refused. Amounts are integers (dollars as 10^-12 dollars), so no rounding adds up.

A token of every byte-level tokenizer covers at least one byte, so a prompt's UTF-8 bytes plus an allowance for the chat
template bound its tokens from above; `max_tokens` bounds the answer. What a provider does not report, or reports
impossibly, counts as that bound.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dspy.lm15 import (
    DataPart,
    RefusalPart,
    Request,
    Response,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolResultPart,
)

from copa_harness.errors import ConfigurationError
from copa_harness.formatting import amount
from copa_harness.lm.dspy_internals import request_to_dict
from copa_harness.results import Budget, Usage

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
            f"{unit}{amount(self.spent)} of {unit}{amount(self.ceiling)} {name} spent, the next call may cost up to "
            f"{unit}{amount(self.asked)}"
        )


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


class Account:
    """Keeps what one scope spent plus reserved under ceilings; shared by the threads of this process."""

    def __init__(self, ceilings: Ceilings) -> None:
        self.ceilings = ceilings
        self._changed = threading.Condition()
        self._spent = Cost()
        self._reserved = Cost()
        self._open: dict[int, Cost] = {}
        self._n_reservations = 0

    @property
    def spent(self) -> Cost:
        """What is settled."""
        with self._changed:
            return self._spent

    def totals(self) -> Mapping[str, Cost]:
        """`spent` and `reserved`, read at one moment."""
        with self._changed:
            return {"spent": self._spent, "reserved": self._reserved}

    def reserve(self, cost: Cost) -> int:
        """Reserve `cost` and return the reservation's number; waits while only calls in flight stand in the way.

        Raises:
            OverBudget: It cannot fit.
        """
        with self._changed:
            while True:
                self.ceilings.check(self._spent + cost, spent=self._spent, asked=cost)
                try:
                    self.ceilings.check(self._spent + self._reserved + cost, spent=self._spent, asked=cost)
                except OverBudget:
                    self._changed.wait()
                    continue
                self._n_reservations += 1
                self._open[self._n_reservations] = cost
                self._reserved += cost
                return self._n_reservations

    def settle(self, number: int, cost: Cost) -> None:
        """Replace what was reserved by what it turned out to cost."""
        with self._changed:
            self._reserved -= self._open.pop(number)
            self._spent += cost
            self._changed.notify_all()

    def release(self, number: int) -> None:
        """Give a reservation back: nothing was paid."""
        self.settle(number, Cost())


@dataclass(frozen=True, slots=True)
class Reservation:
    """A cost reserved in several places at once, to be settled or released exactly once.

    Attributes:
        cost: What is reserved.
        places: An account and the ledger, with the reservation's number in each.
    """

    cost: Cost
    places: tuple[tuple[Any, int], ...]

    def settle(self, cost: Cost) -> None:
        """Replace what is reserved by what it turned out to cost."""
        for account, number in self.places:
            account.settle(number, cost)

    def release(self) -> None:
        """Give it back: nothing was paid."""
        for account, number in self.places:
            account.release(number)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Which amounts of a call have to be bounded before it is paid.

    Attributes:
        tokens: A ceiling on tokens is in force.
        usd: A ceiling on dollars is in force.
        budget: Name of the budget that asks, for messages.
    """

    tokens: bool
    usd: bool
    budget: str

    @property
    def asked(self) -> bool:
        """Whether there is any."""
        return self.tokens or self.usd


TEMPLATE_TOKENS = 128
"""Allowance for what a chat template adds once: a default system message, the date, the opening of the answer."""

TEMPLATE_TOKENS_PER_MESSAGE = 16
"""Allowance for what a chat template adds around each message."""

_COUNTABLE = (TextPart, DataPart, ToolCallPart, ToolResultPart, ThinkingPart, RefusalPart)


@dataclass(frozen=True, slots=True)
class Limits:
    """What is known of a model's costs before a call.

    Attributes:
        max_output_tokens: The most the model can answer, None if unknown.
        input_usd: The highest price of a prompt token in dollars, None if unknown.
        output_usd: The highest price of a completion token in dollars, None if unknown.
        thinks: Whether it may think before it answers, in tokens that count as its answer's.
    """

    max_output_tokens: int | None = None
    input_usd: float | None = 0.0
    output_usd: float | None = 0.0
    thinks: bool = False


def prompt_tokens_from_above(request: Request) -> int:
    """A number of tokens the prompt cannot exceed.

    Raises:
        ConfigurationError: It holds images, audio or files, whose tokens nobody can bound from here.
    """
    parts = [part for message in request.messages for part in message.parts]
    if isinstance(request.system, tuple):
        parts += request.system
    parts += [inner for part in parts if isinstance(part, ToolResultPart) for inner in part.content]
    alien = sorted({type(part).__name__ for part in parts if not isinstance(part, _COUNTABLE)})
    if alien:
        raise ConfigurationError(
            f"a ceiling on tokens or dollars cannot be kept for a prompt with {alien}: expected text only, since the "
            "tokens of media cannot be bounded beforehand; use a budget of calls for it"
        )
    document = request_to_dict(request)
    pieces = {name: document[name] for name in ("system", "messages", "tools") if name in document}
    if request.config.response_format:
        pieces["response_format"] = request.config.response_format
    n_bytes = len(json.dumps(pieces, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return n_bytes + TEMPLATE_TOKENS + TEMPLATE_TOKENS_PER_MESSAGE * (len(request.messages) + 1)


def worst_case(request: Request, limits: Limits, bounds: Bounds) -> Cost:
    """The most one completion of `request` can cost.

    Args:
        request: What will be asked.
        limits: What is known of the model.
        bounds: Which amounts have to be known; the price stays open where only tokens do and nobody knows it.

    Raises:
        ConfigurationError: There is no bound: no `max_tokens` and no limit known of the model, or no price.
    """
    budget = bounds.budget
    what = "dollars" if bounds.usd else "tokens"
    output_tokens = request.config.max_tokens or limits.max_output_tokens
    if output_tokens is None:
        raise ConfigurationError(
            f"the budget {budget!r} caps {what}, but calls to {request.model!r} set no max_tokens, so nobody knows "
            "what one may cost; set max_tokens on the LM (dspy.LM(..., max_tokens=512)), or cap calls instead"
        )
    input_tokens = prompt_tokens_from_above(request)
    cost = Cost(calls=1, input_tokens=input_tokens, output_tokens=output_tokens)
    if limits.input_usd is None or limits.output_usd is None:
        if bounds.usd:
            raise ConfigurationError(
                f"the budget {budget!r} caps dollars, but no price is known for {request.model!r}; expected a model of "
                "the price list DSPy ships: cap calls or tokens instead"
            )
        return cost
    price = input_tokens * limits.input_usd + output_tokens * limits.output_usd
    return Cost(1, input_tokens, output_tokens, Cost.picodollars_of(price))


def is_truncated(response: Response) -> bool:
    """Whether an answer was cut off because it reached the most tokens it may have."""
    return bool(response.finish_reason == "length")


MOST_TOKENS = 10**8
"""More than any call can have; a provider that reports more does not count."""


def actual_cost(response: Response, usd: float | None, *, worst: Cost) -> tuple[Cost, Usage]:
    """What an answer cost, as an amount to settle and as usage to report.

    Args:
        response: The answer.
        usd: Its price in dollars, None when nobody knows.
        worst: What was reserved for it. Tokens or a price that are unknown count as reserved.
    """
    given = response.usage
    input_tokens, output_tokens = given.input_tokens, given.output_tokens
    # Zero prompt tokens, or zero tokens for a text, is how servers that do not count fill the field.
    known_input = input_tokens is not None and 0 < input_tokens <= MOST_TOKENS
    known_output = output_tokens is not None and 0 <= output_tokens <= MOST_TOKENS
    known_output = known_output and (output_tokens != 0 or not response.message.text)
    if max(input_tokens or 0, output_tokens or 0) > MOST_TOKENS:
        usd = None  # it was made of these numbers
    booked = Cost(
        1,
        input_tokens if known_input and input_tokens is not None else worst.input_tokens,
        output_tokens if known_output and output_tokens is not None else worst.output_tokens,
        worst.picodollars if usd is None else Cost.picodollars_of(usd),
    )
    usage = Usage(
        paid_calls=1,
        input_tokens=booked.input_tokens,
        output_tokens=booked.output_tokens,
        usd=booked.usd if usd is None else usd,
        estimated_calls=int(not (known_input and known_output)),
        unpriced_calls=int(usd is None and worst.picodollars == 0),
        truncated_calls=int(is_truncated(response)),
    )
    return booked, usage


def lost_cost(worst: Cost) -> Usage:
    """The usage to report for a call that may have been billed but brought no answer: all that was reserved for it."""
    return Usage(
        paid_calls=1,
        failed_calls=1,
        input_tokens=worst.input_tokens,
        output_tokens=worst.output_tokens,
        usd=worst.usd,
        estimated_calls=1,
    )
