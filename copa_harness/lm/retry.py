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

from copa_harness.errors import ProviderError, RateLimitError

GIVE_UP_AFTER_S = 120.0
"""Seconds a call bears being put off, and a provider may refuse all calls before they stop asking again."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a failed call is tried again.

    Attributes:
        n_retries: Tries after the first one; 0 for none. Being asked to slow down is no failed try.
        first_pause_s: Pause before the second try, doubled for each further one; chance shortens each by up to half.
        longest_pause_s: Ceiling of one pause that the provider did not ask for.
        give_up_after_s: Ceiling of the time from a call's first failure to its last try (its pauses and its waits for
            a place), of a pause a provider may ask for, and of the time it may refuse every call.
    """

    n_retries: int = 0
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    give_up_after_s: float = GIVE_UP_AFTER_S

    def pause_s(self, error: Exception, *, n_failed: int, n_slowed: int, waited_s: float) -> float | None:
        """Seconds to wait before the next try, or None to give up.

        Args:
            error: Why the last try failed.
            n_failed: Failed tries of this call so far, without those that were asked to slow down.
            n_slowed: How often this call was asked to slow down.
            waited_s: Seconds since this call failed first.
        """
        transient = isinstance(error, ProviderError) and error.transient
        if self.n_retries == 0 or not transient or n_failed > self.n_retries:
            return None
        asked_s = getattr(error, "retry_after", None)
        grown_s = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(n_failed + n_slowed - 1, 30))
        jittered_s = grown_s * random.uniform(0.5, 1.0)
        pause_s = jittered_s if asked_s is None else asked_s + random.uniform(0.0, 0.1) * grown_s
        return pause_s if waited_s + pause_s <= self.give_up_after_s else None

    def gives_up(self, error: Exception, *, refused_s: float) -> bool:
        """Whether nobody is put off again, since the provider has refused every call for as long as one bears.

        Without that, each of many calls would wait its full time in turn: a suite would take hours to fail.

        Args:
            error: Why the last try failed.
            refused_s: Seconds for which the provider has refused every call.
        """
        return isinstance(error, RateLimitError) and refused_s > self.give_up_after_s


class AdaptiveConcurrency:
    """How many calls may be under way at once; adapts to what the provider bears. Thread-safe.

    Args:
        start: Calls at once in the beginning.
        most: Never more than this.
        longest_wait_s: A provider that asks for a longer pause is not waited for: each call is refused on its own.
    """

    def __init__(self, *, start: int = 8, most: int = 1024, longest_wait_s: float = GIVE_UP_AFTER_S) -> None:
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
