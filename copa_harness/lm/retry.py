"""How a provider is treated: how many calls at once, when to try again, and when to give up.

The number of calls at once follows additive increase, multiplicative decrease (Jacobson 1988, as in TCP): it starts
low, doubles per round until the first refusal, then grows by one per round, and is halved when the provider asks to
slow down. Pauses between tries grow exponentially with jitter and are never shorter than Retry-After.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from copa_harness.errors import ProviderError, RateLimitError
from copa_harness.lm.provider_errors import TRANSIENT

PATIENCE_S = 120.0
"""Seconds a call bears being put off, and a provider may refuse all calls before they stop asking again."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a failed call is tried again.

    Attributes:
        n_retries: Tries after the first one; 0 for none. Being asked to slow down is no failed try.
        first_pause_s: Pause before the second try, doubled for each further one; chance shortens each by up to half.
        longest_pause_s: Ceiling of one pause that the provider did not ask for.
        patience_s: Ceiling of the time from a call's first failure to its last try (its pauses and its waits for a
            place), and of a pause a provider may ask for.
    """

    n_retries: int = 0
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    patience_s: float = PATIENCE_S

    def pause_s(self, error: Exception, *, n_failed: int, n_slowed: int, waited_s: float) -> float | None:
        """Seconds to wait before the next try, or None to give up.

        Args:
            error: Why the last try failed.
            n_failed: Failed tries of this call so far, without those that were asked to slow down.
            n_slowed: How often this call was asked to slow down.
            waited_s: Seconds since this call failed first.
        """
        if self.n_retries == 0 or not isinstance(error, TRANSIENT) or n_failed > self.n_retries:
            return None
        asked_s = getattr(error, "retry_after", None)
        grown_s = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(n_failed + n_slowed - 1, 30))
        jittered_s = grown_s * random.uniform(0.5, 1.0)
        pause_s = jittered_s if asked_s is None else asked_s + random.uniform(0.0, 0.1) * grown_s
        return pause_s if waited_s + pause_s <= self.patience_s else None


class Pace:
    """How many calls may be under way at once; adapts to what the provider bears. Thread-safe.

    Args:
        start: Calls at once in the beginning.
        most: Never more than this.
        longest_wait_s: A provider that asks for a longer pause is not waited for: each call is refused on its own.
    """

    def __init__(self, *, start: int = 8, most: int = 1024, longest_wait_s: float = PATIENCE_S) -> None:
        self._longest_wait_s = longest_wait_s
        self._refused_since_s: float | None = None
        self._changed = threading.Condition()
        self._limit = float(start)
        self._most = float(most)
        self._n_under_way = 0
        self._slow_start = True
        self._not_before_s = 0.0
        self._last_halved_s = float("-inf")

    @property
    def limit(self) -> int:
        """Calls at once allowed now."""
        with self._changed:
            return int(self._limit)

    @property
    def refused_s(self) -> float:
        """Seconds for which the provider has refused every call; 0 when it answered the last one."""
        with self._changed:
            return 0.0 if self._refused_since_s is None else time.monotonic() - self._refused_since_s

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a place, and hold it during the block. The block's outcome moves the limit."""
        with self._changed:
            while True:
                wait_s = self._not_before_s - time.monotonic()
                if wait_s > 0:
                    self._changed.wait(wait_s)
                elif self._n_under_way < int(self._limit):
                    break
                else:
                    self._changed.wait()
            self._n_under_way += 1
            started_s = time.monotonic()
        outcome: Exception | None = None
        try:
            yield
        except Exception as error:
            outcome = error
            raise
        finally:
            with self._changed:
                self._n_under_way -= 1
                if outcome is None:
                    self._grow()
                elif isinstance(outcome, RateLimitError):
                    self._shrink(outcome, started_s)
                self._changed.notify(max(1, int(self._limit) - self._n_under_way))

    def _grow(self) -> None:
        self._refused_since_s = None
        if self._slow_start:
            self._limit = min(self._most, self._limit + 1)
        else:
            self._limit = min(self._most, self._limit + 1 / self._limit)

    def _shrink(self, error: ProviderError, started_s: float) -> None:
        if self._refused_since_s is None:
            self._refused_since_s = time.monotonic()
        asked_s = getattr(error, "retry_after", None)
        if asked_s is not None and asked_s <= self._longest_wait_s:
            self._not_before_s = max(self._not_before_s, time.monotonic() + asked_s)
        if started_s <= self._last_halved_s:
            return  # it was sent before the last halving: the same congestion, not a new one
        self._slow_start = False
        self._last_halved_s = time.monotonic()
        self._limit = max(1.0, self._limit / 2)


@dataclass(frozen=True, slots=True)
class Patience:
    """How the gateway treats an engine: pace and retries. Shared by all calls of the engine."""

    retries: RetryPolicy
    pace: Pace | None = None

    def pause_s(self, error: Exception, *, n_failed: int, n_slowed: int, waited_s: float) -> float | None:
        """As `RetryPolicy.pause_s`; None as well when the provider has refused everybody for as long as one bears.

        Without that, each of many calls would wait its full time in turn: a suite would take hours to fail.
        """
        refused_s = 0.0 if self.pace is None else self.pace.refused_s
        if isinstance(error, RateLimitError) and refused_s > self.retries.patience_s:
            return None
        return self.retries.pause_s(error, n_failed=n_failed, n_slowed=n_slowed, waited_s=waited_s)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A place among the calls under way."""
        if self.pace is None:
            yield
        else:
            with self.pace.turn():
                yield


IMPATIENT = Patience(RetryPolicy(0))
"""One try, any number at once: for engines in this process, which fail again if they fail once."""


@runtime_checkable
class PatientEngine(Protocol):
    """An engine whose failures may mend, or that must not be asked too much at once."""

    @property
    def patience(self) -> Patience:
        """How to treat it."""
        ...


def patience_of(engine: object) -> Patience:
    """How to treat an engine: as it says, else with one try."""
    found: Patience = getattr(engine, "patience", IMPATIENT)
    return found
