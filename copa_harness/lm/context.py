"""What the answers to a block of calls cost: tokens, dollars and seconds, the same whether bought now or replayed.

    with observing() as observer:
        program(question=...)
    observer.seen      # one Observed per call, in any order

The meter of a scope books what is *paid*, and a replay costs nothing; a search that prefers cheap programs must see
what an answer costs when it is bought. So the gateway notes here, beside its bookkeeping, the usage, the price and the
seconds that were stored with the answer when it was.

A plan before paying: the program runs against the cache alone, and what is missing is counted instead of bought.

    with planning() as plan:
        evaluate(program, examples, ...)
    print(plan.summary())

Every call whose answer is not stored is counted with the most it can cost, and refused with `NotCachedError`. What a
program or an optimizer would ask *because of* the missing answers cannot be known, so a plan is a lower bound for the
calls of an optimization and exact for an evaluation with one call per example.

Repeats of a whole run: the same program on the same examples several times, each time with answers of its own.

    for index in range(5):
        with repeated(index):
            evaluate(program, examples, ...)

Every call inside is stored and sampled under its repeat, so repeats are independent, and each is cached: running the
five again asks nothing. Repeat 0 is the plain run and shares its answers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from copa_harness.errors import ConfigurationError
from copa_harness.lm.budget.cost import Cost
from copa_harness.lm.provider_errors import EngineError
from copa_harness.results import Usage

OBSERVER_SETTING = "copa_observer"
"""Name under which the observer stands in DSPy's settings, which DSPy carries into its worker threads."""


@dataclass(frozen=True, slots=True)
class Observed:
    """One call: tokens in and out, dollars, seconds; None for what nobody knows."""

    input_tokens: int | None
    output_tokens: int | None
    usd: float | None
    seconds: float | None


class Observer:
    """Collects what calls cost. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: list[Observed] = []

    def add(self, observed: Observed) -> None:
        """Note one call."""
        with self._lock:
            self._seen.append(observed)

    @property
    def seen(self) -> tuple[Observed, ...]:
        """The calls so far."""
        with self._lock:
            return tuple(self._seen)


@contextmanager
def observing() -> Iterator[Observer]:
    """Note every call inside the block, in whatever thread DSPy runs it."""
    import dspy

    observer = Observer()
    with dspy.context(**{OBSERVER_SETTING: observer}):
        yield observer


def current_observer() -> Observer | None:
    """Who is told of calls here and now."""
    import dspy

    found: Any = dspy.settings.get(OBSERVER_SETTING)
    return found if isinstance(found, Observer) else None


PLAN_SETTING = "copa_plan"
"""Name under which the plan stands in DSPy's settings, which DSPy carries into its worker threads."""


class NotCachedError(EngineError):
    """Only a plan is being made: the answer is not stored, and nothing is paid for it now."""

    kind = "not cached"


class Plan:
    """What a run would ask and pay. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._missing: dict[str, Cost] = {}
        self._known: dict[str, Cost | None] = {}
        self._n_unbounded = 0

    def add_known(self, key: str, worst: Cost | None = None) -> None:
        """Count a distinct call whose answer is stored, with the most it could have cost, None when nobody knows."""
        with self._lock:
            self._known[key] = worst

    def add_missing(self, key: str, worst: Cost | None) -> None:
        """Count a distinct call that would be paid, with the most it can cost, None when nobody knows."""
        with self._lock:
            if key not in self._missing:
                self._missing[key] = Cost(calls=1) if worst is None else worst
                self._n_unbounded += worst is None

    @property
    def n_cached(self) -> int:
        """Distinct calls whose answers are stored."""
        with self._lock:
            return len(self._known)

    @property
    def usage(self) -> Usage:
        """What would be paid at most: calls, tokens, dollars; `estimated_calls` are those nobody can bound."""
        with self._lock:
            total = sum(self._missing.values(), Cost())
            return Usage(
                paid_calls=total.calls,
                cached_calls=len(self._known),
                input_tokens=total.input_tokens,
                output_tokens=total.output_tokens,
                usd=total.usd,
                estimated_calls=self._n_unbounded,
            )

    @property
    def each(self) -> Cost | None:
        """What a call of this kind can cost at most, the mean over those counted; None when nobody knows."""
        with self._lock:
            bounds = [*self._missing.values(), *self._known.values()]
            if not bounds or self._n_unbounded or None in bounds:
                return None
            total = sum((bound for bound in bounds if bound is not None), Cost())
            n = len(bounds)
            return Cost(1, total.input_tokens // n, total.output_tokens // n, total.picodollars // n)

    def summary(self) -> str:
        """One line for a person."""
        usage = self.usage
        text = (
            f"{usage.paid_calls:,} calls to pay, {usage.cached_calls:,} cached; at most {usage.input_tokens:,} input "
            f"and {usage.output_tokens:,} output tokens, ${usage.usd:,.4f}"
        )
        if usage.estimated_calls:
            text += f", beside {usage.estimated_calls:,} calls without max_tokens or without a known price"
        return text


@contextmanager
def planning() -> Iterator[Plan]:
    """Pay for nothing inside the block, in whatever thread DSPy runs it, and count what would have been paid."""
    import dspy

    plan = Plan()
    with dspy.context(**{PLAN_SETTING: plan}):
        yield plan


def current_plan() -> Plan | None:
    """The plan being made here and now."""
    import dspy

    found = dspy.settings.get(PLAN_SETTING)
    return found if isinstance(found, Plan) else None


REPEAT_SETTING = "copa_repeat"
"""Name under which the index stands in DSPy's settings, which DSPy carries into its worker threads."""


@contextmanager
def repeated(index: int) -> Iterator[None]:
    """Make every call inside the block, in whatever thread DSPy runs it, belong to repeat `index`.

    Args:
        index: From 0; 0 is the plain run.

    Raises:
        ConfigurationError: Not a whole number of at least 0.
    """
    import dspy

    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ConfigurationError(f"got the repeat {index!r}, expected a whole number from 0 up")
    with dspy.context(**{REPEAT_SETTING: index}):
        yield


def current_repeat() -> int:
    """The repeat calls belong to here and now; 0 outside every `repeated` block."""
    import dspy

    return int(dspy.settings.get(REPEAT_SETTING) or 0)
