"""Looking after a response cache from outside a run: what it holds, dropping a part of it, emptying it.

Opens the store as `ResponseCache` does, so a damaged one is quarantined here too, and touches nothing that is not its
own. When an answer was stored is not in diskcache's interface: it is read, and only read, from the database.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diskcache

from copa_harness.errors import CacheError
from copa_harness.lm.cache.store import ResponseCache

RESPONSES_FOLDER = "responses"
"""Folder of the response cache inside the cache directory."""


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
        ((oldest_s, newest_s),) = _query(cache, "SELECT MIN(store_time), MAX(store_time) FROM Cache")
        n_answers = len(cache)
    except sqlite3.Error as error:
        raise CacheError(f"cannot read the response cache in {cache.directory}: {error}") from error
    finally:
        cache.close()
    return CacheStats(
        directory=cache.directory,
        n_answers=n_answers,
        n_bytes=_size(cache.directory / "answers"),
        oldest_s=oldest_s,
        newest_s=newest_s,
        damaged=tuple((path, _size(path)) for path in _damaged(cache.directory)),
    )


def prune_cache(directory: Path, *, older_than_s: float | None = None, max_bytes: int | None = None) -> tuple[int, int]:
    """Drop answers stored longer ago than `older_than_s` seconds, then the oldest until `max_bytes` are left.

    Stores that were moved aside as damaged are removed too.

    Returns:
        Answers dropped, and bytes freed.

    Raises:
        CacheError: There is no cache, or it cannot be written.
    """

    def drop(cache: ResponseCache) -> int:
        n_dropped = 0
        if older_than_s is not None:
            limit_s = time.time() - older_than_s
            rows = _query(cache, "SELECT key FROM Cache WHERE raw = 1 AND store_time < ?", limit_s)
            n_dropped += cache.drop([key for (key,) in rows])
        if max_bytes is not None:
            n_dropped += cache.shrink(max_bytes)
        return n_dropped

    return _changed(directory, drop)


def clear_cache(directory: Path) -> tuple[int, int]:
    """Drop every answer, and stores that were moved aside as damaged.

    Returns:
        Answers dropped, and bytes freed.

    Raises:
        CacheError: There is no cache, or it cannot be written.
    """
    return _changed(directory, ResponseCache.clear)


def _changed(directory: Path, drop: Callable[[ResponseCache], int]) -> tuple[int, int]:
    """Answers that `drop` dropped, and the bytes freed by that and by removing damaged stores."""
    before = cache_stats(directory)
    cache = _opened(directory)
    try:
        n_dropped = drop(cache)
        _query(cache, "PRAGMA wal_checkpoint(TRUNCATE)")  # what was dropped really leaves the disk
    except (sqlite3.Error, OSError, diskcache.Timeout) as error:
        raise CacheError(f"cannot change the response cache in {cache.directory}: {error}") from error
    finally:
        cache.close()
    for path, _ in before.damaged:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return n_dropped, max(0, _total(before) - _total(cache_stats(directory)))


def _query(cache: ResponseCache, statement: str, *values: float) -> list[Any]:
    with closing(sqlite3.connect(cache.database)) as sql:
        return sql.execute(statement, values).fetchall()


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
