"""Looking after a response cache from outside a run: what it holds, dropping a part of it, emptying it.

Opens the store as `ResponseCache` does, so a damaged one is quarantined here too, and touches nothing that is not its
own.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from copa_harness.errors import CacheError
from copa_harness.lm.cache.store import ResponseCache

RESPONSES_FOLDER = "responses"
"""Folder of the response cache inside the cache directory."""

_CHUNK = 500


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a response cache holds.

    Attributes:
        directory: Where it lies.
        n_answers: Stored answers.
        n_bytes: Bytes of the store on disk.
        oldest_s: When the oldest answer was stored, in seconds since 1970; None when there is none.
        newest_s: When the newest one was.
        damaged: Stores that were moved aside as unusable, with their bytes.
    """

    directory: Path
    n_answers: int
    n_bytes: int
    oldest_s: float | None
    newest_s: float | None
    damaged: tuple[tuple[Path, int], ...]


def cache_stats(directory: Path) -> CacheStats:
    """What the response cache in `directory` holds.

    Raises:
        CacheError: There is none, or it cannot be read.
    """
    cache = _opened(directory)
    try:
        oldest_s, newest_s = next(iter(cache._store._sql("SELECT MIN(store_time), MAX(store_time) FROM Cache")))
    except sqlite3.Error as error:
        raise CacheError(f"cannot read the response cache in {cache.directory}: {error}") from error
    stats = CacheStats(
        directory=cache.directory,
        n_answers=len(cache),
        n_bytes=_size(cache.directory / "answers"),
        oldest_s=oldest_s,
        newest_s=newest_s,
        damaged=tuple((path, _size(path)) for path in _damaged(cache.directory)),
    )
    cache.close()
    return stats


def prune_cache(directory: Path, *, older_than_s: float | None = None, max_bytes: int | None = None) -> tuple[int, int]:
    """Drop answers stored longer ago than `older_than_s` seconds, then the oldest until `max_bytes` are left.

    Stores that were moved aside as damaged are removed too.

    Returns:
        Answers dropped, and bytes freed.

    Raises:
        CacheError: There is no cache, or it cannot be written.
    """
    before = cache_stats(directory)
    cache = _opened(directory)
    n_dropped = 0
    try:
        if older_than_s is not None:
            limit_s = time.time() - older_than_s
            while n_now := cache._store.drop("WHERE store_time < ?", (limit_s,), most=_CHUNK):
                n_dropped += n_now
        while max_bytes is not None and cache._store.volume() > max_bytes:
            n_now = cache._store.drop(most=50)
            if n_now == 0:
                break
            n_dropped += n_now
        cache._store._sql("PRAGMA wal_checkpoint(TRUNCATE)")  # what was dropped really leaves the disk
    except (sqlite3.Error, OSError) as error:
        raise CacheError(f"cannot change the response cache in {cache.directory}: {error}") from error
    finally:
        cache.close()
    for path, _ in before.damaged:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return n_dropped, max(0, _total(before) - _total(cache_stats(directory)))


def clear_cache(directory: Path) -> tuple[int, int]:
    """Drop every answer, and stores that were moved aside as damaged.

    Returns:
        Answers dropped, and bytes freed.

    Raises:
        CacheError: There is no cache, or it cannot be written.
    """
    return prune_cache(directory, older_than_s=float("-inf"))


def _opened(directory: Path) -> ResponseCache:
    place = Path(directory)
    # Both the cache directory of a run and the folder of the responses in it may be named.
    if not (place / "answers").exists() and (place / RESPONSES_FOLDER).is_dir():
        place = place / RESPONSES_FOLDER
    if not (place / "answers").exists() and not _damaged(place):
        raise CacheError(
            f"no response cache in {directory}: expected the cache directory of a run (with a folder "
            f"'{RESPONSES_FOLDER}'); name it with --cache-dir"
        )
    return ResponseCache(place, size_limit=None)


def _damaged(directory: Path) -> list[Path]:
    return sorted(directory.glob("answers.damaged-*"))


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue  # a run that works on it at this moment removed it
    return total


def _total(stats: CacheStats) -> int:
    return stats.n_bytes + sum(n_bytes for _, n_bytes in stats.damaged)
