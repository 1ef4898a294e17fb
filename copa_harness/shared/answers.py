"""Answers in the shared database: the store of the gateway (`lm/cache/answers.py`) for several machines.

A paid answer that the database does not take is kept in this machine's cache directory, and so is found what was paid
before the database was used: an answer that only this machine has is given to the others when it is asked for.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

from copa_harness.errors import CacheError
from copa_harness.lm.cache.answers import decode_answer, encode_answer
from copa_harness.lm.cache.store import CacheWarning, ResponseCache
from copa_harness.shared.database import SharedDatabase

_KIND = "answer"


class SharedAnswers:
    """An `AnswerStore` in a database.

    Args:
        database: Which.
        local: This machine's answers.
    """

    def __init__(self, database: SharedDatabase, *, local: ResponseCache) -> None:
        self._database, self._local = database, local

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer, or None; a damaged one is removed with a warning and counts as absent.

        Raises:
            CacheError: The database is away.
        """
        row = self._database.get(_KIND, key)
        if row is not None:
            try:
                return decode_answer(key, row)
            except ValueError as error:
                self._database.drop(_KIND, key, row)
                told = f"an answer in {self._database} is damaged and was refused ({error}); it is paid for again"
                warnings.warn(told, CacheWarning, stacklevel=2)
        ours = self._local.get(key)
        return None if ours is None else self.set(key, ours) or ours

    def set(self, key: str, value: dict[str, Any]) -> dict[str, Any] | None:
        """Store an answer, unless another process, which took this one for dead, was faster: then give that back.

        Raises:
            CacheError: The database is away; the answer is in this machine's cache directory.
        """
        row = encode_answer(key, value)
        try:
            standing = self._database.offer(_KIND, key, row)
        except CacheError:
            self._local.set(key, value)
            raise
        return None if standing == row else decode_answer(key, standing)

    def locked(self, key: str) -> AbstractContextManager[None]:
        """While it is held, no other process of any machine pays for `key`."""
        return self._database.claimed(_KIND, key)

    def close(self) -> None:
        """Close this machine's answers; the database belongs to whoever opened it."""
        self._local.close()
