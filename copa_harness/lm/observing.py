"""What the answers to a block of calls cost: tokens, dollars and seconds, the same whether bought now or replayed.

    with observing() as observer:
        program(question=...)
    observer.seen      # one Observed per call, in any order

The meter of a scope books what is *paid*, and a replay costs nothing; a search that prefers cheap programs must see
what an answer costs when it is bought. So the door notes here, beside its bookkeeping, the usage, the price and the
seconds that were stored with the answer when it was. Knows nothing of engines, budgets or programs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SETTING = "copa_observer"
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
    with dspy.context(**{SETTING: observer}):
        yield observer


def current_observer() -> Observer | None:
    """Who is told of calls here and now."""
    import dspy

    found: Any = dspy.settings.get(SETTING)
    return found if isinstance(found, Observer) else None
