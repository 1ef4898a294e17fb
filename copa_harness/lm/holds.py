"""A cost held in several accounts at once, and which amounts the ceilings in force ask to know beforehand.

Knows nothing of scopes, requests or engines.
"""

from __future__ import annotations

from dataclasses import dataclass

from copa_harness.lm.accounts import Account, Cost
from copa_harness.results import Phase


@dataclass(frozen=True, slots=True)
class Hold:
    """A cost held in several accounts at once, to be settled or released exactly once.

    Attributes:
        cost: What is held.
    """

    cost: Cost
    places: tuple[tuple[Account, int], ...]

    def settle(self, cost: Cost) -> None:
        """Replace what is held by what it turned out to cost."""
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


@dataclass(frozen=True, slots=True)
class Reservation:
    """A promise of one request, to be settled or refunded exactly once.

    Attributes:
        key: The request's cache key.
        phase: The phase the request is billed to: the one current when it was reserved.
        again: True when the key was already settled in this scope and has to be bought a second time (its
            stored answer was lost); such a purchase counts against the budget like a new request.
        first: True when this reservation was counted: the request is new to the scope.
    """

    key: str
    phase: Phase
    again: bool = False
    first: bool = False
