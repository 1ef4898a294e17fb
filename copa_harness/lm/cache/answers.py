"""What a store of answers is, how an answer is written down, and the store that is memory alone.

An answer is written as JSON behind a checksum that covers its key too, so a truncated, altered or misplaced entry is
recognized.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class AnswerStore(Protocol):
    """What the gateway needs of a store."""

    def get(self, key: str) -> dict[str, Any] | None:
        """The stored answer, or None."""
        ...

    def set(self, key: str, value: dict[str, Any]) -> dict[str, Any] | None:
        """Store an answer; another one that is everybody's already is given back, and is to be used in its place."""
        ...

    def locked(self, key: str) -> Any:
        """Context manager: while it is held, no other process pays for `key`."""
        ...


def encode_answer(key: str, value: dict[str, Any]) -> bytes:
    """`value` as checksummed JSON, bound to its key: 64 hexadecimal digits, a line feed, UTF-8 JSON."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).encode("utf-8")
    return _checksum(key, text) + b"\n" + text


def decode_answer(key: str, data: object) -> dict[str, Any]:
    """The answer encoded in `data`.

    Raises:
        ValueError: Truncated, altered, stored under another key, or not JSON of an object.
    """
    if not isinstance(data, bytes):
        raise ValueError(f"got a row of type {type(data).__qualname__}, expected bytes")
    checksum, separator, text = data.partition(b"\n")
    if not separator or checksum != _checksum(key, text):
        raise ValueError("checksum does not match")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"got JSON of type {type(value).__name__}, expected an object")
    return value


def _checksum(key: str, text: bytes) -> bytes:
    return hashlib.sha256(key.encode("ascii") + b"\n" + text).hexdigest().encode("ascii")


class MemoryCache:
    """Answers of this process only, in the same encoded form as on disk."""

    def __init__(self) -> None:
        self._rows: dict[str, bytes] = {}

    def get(self, key: str) -> dict[str, Any] | None:
        """The stored answer, or None."""
        row = self._rows.get(key)
        return None if row is None else decode_answer(key, row)

    def set(self, key: str, value: dict[str, Any]) -> None:
        """Store an answer."""
        self._rows[key] = encode_answer(key, value)

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """No other process can see this store: nothing to lock."""
        yield

    def close(self) -> None:
        """Nothing to release."""
