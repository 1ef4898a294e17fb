"""A cost held in several accounts at once, and which amounts the ceilings in force ask to know beforehand.

Knows nothing of scopes, requests or engines.
"""

from __future__ import annotations

from dataclasses import dataclass

from copa_harness.lm.accounts import Account, Cost


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
