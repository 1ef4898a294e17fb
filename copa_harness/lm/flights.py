"""What the threads of one process share on their way through the door: answers seen lately, and who asks for what now.

Knows nothing of requests, stores, budgets or engines.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dspy.lm15 import Response

RECENT_ANSWERS = 4096
"""Answers a door keeps decoded in memory."""


class RecentAnswers:
    """The answers this process read or bought last, already checked and decoded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._responses: dict[str, Response] = {}

    def get(self, key: str) -> Response | None:
        """The answer, with empty usage, or None."""
        return self._responses.get(key)

    def put(self, key: str, response: Response) -> None:
        """Remember an answer, and forget the one remembered longest."""
        with self._lock:
            self._responses[key] = response
            if len(self._responses) > RECENT_ANSWERS:
                del self._responses[next(iter(self._responses))]


class Flights:
    """One lock per key in use, within this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """While the block runs, no other thread is in a block for `key`."""
        with self._lock:
            lock, n_users = self._locks.get(key, (threading.Lock(), 0))
            self._locks[key] = (lock, n_users + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, n_users = self._locks[key]
                if n_users == 1:
                    del self._locks[key]
                else:
                    self._locks[key] = (lock, n_users - 1)
