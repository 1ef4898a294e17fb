"""Answers on disk, shared by threads and processes.

The store is a `diskcache.Cache` in the folder `answers/`, whose disk class holds text keys and bytes, reads no pickle,
and touches no file but its own. An answer is JSON with a checksum over key and text. A damaged or planted row is a miss
and one warning; a store that cannot be opened or read is moved aside, kept for inspection, and rebuilt, with one
warning.

diskcache gives every thread a connection of its own. SQLite lets go of the interpreter in each of the dozen statements
that open one, or in each of those that store a row, and a hundred threads that do so at once mostly wait for one
another: opened one after the other, 64 connections take 30 ms instead of 110. So threads take turns at their first use
of the store and at writing; reading needs no turn.
"""

from __future__ import annotations

import os
import re
import sqlite3
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import diskcache
from diskcache.core import DBNAME, MODE_BINARY, MODE_PICKLE, MODE_RAW
from filelock import FileLock

from copa_harness.errors import CacheError
from copa_harness.lm.cache.answers import decode_answer, encode_answer
from copa_harness.lm.cache.locks import KeyLocks, fork_count

DEFAULT_SIZE_LIMIT = 8 * 2**30
"""Bytes a store may take before the oldest answers are dropped."""

_NO_LIMIT = 2**62

_CHECK_SIZE_EVERY = 200

_DROPPED_AT_ONCE = 500

_SQLITE_TIMEOUT_S = 30.0

_WAL_PAGES = 8000
"""Checkpoints wait for the disk: 32 MB between them instead of 4 are as safe and an eighth as many."""

_NOT_DAMAGE = ("locked", "readonly", "is full", "disk I/O")
"""Complaints of sqlite that rebuilding the database would not cure."""

_UNUSABLE = (sqlite3.DatabaseError, OSError, ValueError, KeyError, TypeError, AttributeError)
"""What diskcache raises on a file that is no database, or one with alien settings."""

_OWN_FILE = re.compile(r"[0-9a-f]{2}[/\\][0-9a-f]{2}[/\\][0-9a-f]{28}\.val")
"""The names diskcache gives to files of large values."""


T = TypeVar("T")


class RefusedRowError(Exception):
    """A row in the store is none of ours; it was not read."""


class AnswerDisk(diskcache.Disk):
    """What lies in the store: text keys, and bytes in the database or, when they are many, in a file of their own.

    A row is never taken at its word: somebody else may have written it (a cache that is carried between machines). One
    that holds a pickle is not read, one that names a file outside the store's own is neither read nor is that file
    removed with it.

    Args:
        directory: The folder of the store.
        settings: As in `diskcache.Disk`.
    """

    def __init__(self, directory: str, **settings: Any) -> None:
        super().__init__(directory, **settings)
        self._folder = directory

    def put(self, key: Any) -> Any:
        """The key as a column: text as it is."""
        if type(key) is not str:
            raise TypeError(f"got a key of type {type(key).__qualname__}, expected str")
        return key, True

    def get(self, key: Any, raw: Any) -> Any:
        """The key of a row."""
        if not raw:
            raise RefusedRowError("the key of a row is a pickle")
        return key

    def store(self, value: Any, read: Any, key: Any = diskcache.UNKNOWN) -> Any:
        """The value as columns: bytes as they are."""
        if type(value) is not bytes:
            raise TypeError(f"got a value of type {type(value).__qualname__}, expected bytes")
        return super().store(value, read, key=key)

    def fetch(self, mode: Any, filename: Any, value: Any, read: Any) -> Any:
        """The value of a row."""
        if mode == MODE_PICKLE:
            raise RefusedRowError("the value of a row is a pickle")
        if mode == MODE_RAW and filename is None:
            return value
        if mode != MODE_BINARY or value is not None or not self._is_own(filename):
            raise RefusedRowError(f"a row of mode {mode!r} names the file {filename!r}, which is none of the store's")
        if not os.path.isfile(path := os.path.join(self._folder, filename)):
            raise FileNotFoundError(path)  # diskcache takes it for a row that has just gone
        return super().fetch(mode, filename, value, read)

    def filename(self, key: Any = diskcache.UNKNOWN, value: Any = diskcache.UNKNOWN) -> Any:
        """A new name for a large value, and its whole path."""
        name, path = super().filename(key, value)
        if not self._is_own(name):
            raise OSError(f"{path} leads out of the store")
        return name, path

    def remove(self, file_path: Any) -> None:
        """Remove the file of a row that goes, if it is one of the store's."""
        if self._is_own(file_path):
            super().remove(file_path)

    def _is_own(self, filename: object) -> bool:
        """Whether a name is one the store gives, and no link leads from there to another place."""
        if not isinstance(filename, str) or not _OWN_FILE.fullmatch(filename):
            return False
        path = os.path.join(os.path.realpath(self._folder), filename)
        return os.path.realpath(path) == path


class ReadOnlyStore:
    """What of a `diskcache.Cache` its readers need, in a folder that cannot be written (diskcache writes as it opens).

    Args:
        database: The SQLite file of the store.

    Raises:
        sqlite3.Error: It cannot be read.
    """

    def __init__(self, database: Path) -> None:
        self._disk = AnswerDisk(str(database.parent))
        # Without a log nobody has it open to write, and SQLite needs no file beside it to read it.
        how = "mode=ro" if Path(f"{database}-wal").exists() else "mode=ro&immutable=1"
        self._turn = threading.Lock()
        self._sql = sqlite3.connect(f"{database.resolve().as_uri()}?{how}", uri=True, check_same_thread=False)
        len(self)

    def __len__(self) -> int:
        with self._turn:
            return int(self._sql.execute("SELECT COUNT(*) FROM Cache").fetchone()[0])

    def __contains__(self, key: str) -> bool:
        with self._turn:
            return self._sql.execute("SELECT 1 FROM Cache WHERE key = ? AND raw", (key,)).fetchone() is not None

    def get(self, key: str) -> object:
        """The value under a key, or None."""
        with self._turn:
            row = self._sql.execute("SELECT mode, filename, value FROM Cache WHERE key = ? AND raw", (key,)).fetchone()
        mode, filename, value = row or (MODE_RAW, None, None)
        try:
            return self._disk.fetch(mode, filename, value, False)
        except FileNotFoundError:
            return None

    def set(self, *_: Any, **__: Any) -> Any:
        """Refused, like everything that writes."""
        raise sqlite3.OperationalError("attempt to write a readonly database")

    delete = clear = transact = reset = cull = set

    def close(self) -> None:
        """The connection stays for the next reader: it holds no lock."""


class CacheWarning(UserWarning):
    """Part of the cache directory is damaged or cannot be written; answers stay right, some are paid for again."""


class ResponseCache:
    """Answers on disk, shared by threads and processes.

    Args:
        directory: Created if missing; one that cannot be written replays what it holds. Holds `answers/` (the store),
            `claims/` (lock files) and, after damage, `answers.damaged-*`. Foreign files in it are left alone.
        size_limit: Bytes the store may take; beyond them the answers stored first are dropped, with one warning. None
            for no limit.

    Raises:
        CacheError: The directory cannot be created or written, or the store cannot be opened even after rebuilding.
    """

    def __init__(self, directory: Path, *, size_limit: int | None = DEFAULT_SIZE_LIMIT) -> None:
        self.directory = Path(directory)
        self._warned: set[str] = set()
        self._unwritten: dict[str, bytes] = {}  # paid answers the disk would not take: kept for this process
        self._size_limit = size_limit
        self._n_set = 0
        self._thread = threading.local()
        self._renew_turns()
        _caches.add(self)
        try:
            (self.directory / "claims").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if not self.database.is_file():
                raise CacheError(
                    f"cannot create the response cache in {self.directory}: {error}; "
                    "expected a folder that can be written, choose one with --copa-cache-dir"
                ) from error
        self._locks = KeyLocks(self.directory / "claims")
        self._store = self._open_or_rebuild()

    def __deepcopy__(self, memo: dict[int, object]) -> ResponseCache:
        return self

    def __len__(self) -> int:
        return len(self._store)

    @property
    def database(self) -> Path:
        """The SQLite file of the store."""
        return self.directory / "answers" / str(DBNAME)

    # -- answers

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer stored under `key`, or None. A damaged row is removed and counts as absent."""
        row: object = self._unwritten.get(key)
        if row is None:
            try:
                row = self._healed(lambda store: store.get(key))
            except RefusedRowError as error:
                self._refuse(key, error)
                return None
            except (sqlite3.Error, OSError, diskcache.Timeout) as error:
                self._warn("read", f"the response cache in {self.directory} cannot be read ({error}); going on without")
                return None
            if row is None:
                return None
        try:
            return decode_answer(key, row)
        except ValueError as error:
            self._refuse(key, error)
            return None

    def set(self, key: str, value: dict[str, Any]) -> None:
        """Store an answer. If the disk refuses, the answer is kept in memory and a warning says so once."""
        row = encode_answer(key, value)
        try:
            self._healed(lambda store: self._written(store, key, row))
            self._stay_below_limit()
        except (sqlite3.Error, OSError, diskcache.Timeout) as error:
            self._unwritten[key] = row
            self._warn(
                "write",
                f"the response cache in {self.directory} cannot be written ({error}); answers of this run are kept "
                "in memory only and will be paid for again next time",
            )

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """While the block runs, no other process pays for `key`; a killed owner's lock ends with it."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._locks.locked(key))
            except OSError as error:
                self._warn(
                    "lock",
                    f"cannot lock {self._locks.path} ({error}); other processes may pay for the same answers",
                )
            yield

    def close(self) -> None:
        """Close this thread's connection and the lock file; the cache may be used again afterwards."""
        self._store.close()
        self._locks.close()

    # -- dropping

    def clear(self) -> int:
        """Drop every answer; how many it were.

        Raises:
            sqlite3.Error: The store cannot be written.
        """
        return self._healed(lambda store: int(store.clear()))

    def drop(self, keys: list[str]) -> int:
        """Drop these answers; how many were there.

        Raises:
            sqlite3.Error: The store cannot be written.
        """
        return self._healed(lambda store: _deleted(store, keys))

    def shrink(self, n_bytes: int) -> int:
        """Drop the answers stored first until the store takes `n_bytes` at most; how many it were.

        Raises:
            sqlite3.Error: The store cannot be written.
        """
        return self._healed(lambda store: _culled(store, n_bytes))

    def _stay_below_limit(self) -> None:
        self._n_set += 1
        if self._size_limit is None or self._n_set % _CHECK_SIZE_EVERY != 1:
            return
        with self._writing:
            if self._store.volume() < self._size_limit:
                return
            try:
                self._store.cull()
            except diskcache.Timeout:
                return  # others write all the time; the next check comes soon
        self._warn(
            "size",
            f"the response cache in {self.directory} has reached its limit of {self._size_limit:,} bytes; the answers "
            "stored first are dropped and would be paid for again. `copa cache stats` shows what it holds",
        )

    # -- turns of threads

    def _renew_turns(self) -> None:
        """New locks: those a fork inherits may be held by a thread it does not have."""
        self._opening, self._writing, self._rebuilding = threading.Lock(), threading.Lock(), threading.RLock()

    def _connected(self) -> diskcache.Cache:
        """The store, with this thread's connection to it open."""
        store, forks = self._store, fork_count()
        if getattr(self._thread, "connected", None) != (id(store), forks):
            with self._opening:
                _ = "" in store  # any use opens it; this one reads no row, for one may be planted under any key
            self._thread.connected = (id(store), forks)
        return store

    def _written(self, store: diskcache.Cache, key: str, row: bytes) -> None:
        with self._writing:
            store.set(key, row)
            if key not in store:
                raise sqlite3.DatabaseError("an answer that was stored is not there")

    # -- damage

    def _healed(self, action: Callable[[diskcache.Cache], T]) -> T:
        """`action` on the store; again on a rebuilt store if the database turns out to be damaged.

        SQLite's own check sees neither a name nor a trigger that changed: a store that passes it and fails again goes.
        """
        for is_certain in (False, True):
            store = self._store
            try:
                return action(self._connected())
            except (sqlite3.DatabaseError, diskcache.Timeout, UnicodeDecodeError) as failure:
                error: BaseException | None = failure
                if isinstance(failure, UnicodeDecodeError):  # so sqlite3 quotes a schema that is damaged
                    error = sqlite3.DatabaseError(str(failure))
                while isinstance(error, diskcache.Timeout):  # so diskcache calls whatever keeps a transaction waiting
                    error = error.__context__
                if not isinstance(error, sqlite3.DatabaseError):
                    raise
                if any(sign in str(error) for sign in _NOT_DAMAGE) or (is_certain and "unable to open" in str(error)):
                    raise error from None
                self._rebuild(store, error, is_certain=is_certain)
        return action(self._connected())

    def _open(self) -> diskcache.Cache:
        for path in (self.database, *self.database.parent.glob(f"{DBNAME}-*")):
            if path.is_symlink():
                raise ValueError(f"{path.name} is a link to another place")
        return diskcache.Cache(
            str(self.directory / "answers"),
            disk=AnswerDisk,
            timeout=_SQLITE_TIMEOUT_S,
            eviction_policy="least-recently-stored",
            size_limit=_NO_LIMIT if self._size_limit is None else int(0.9 * self._size_limit),  # what `cull` leaves
            cull_limit=0,  # not while an answer is stored: see _stay_below_limit
            statistics=0,
            sqlite_wal_autocheckpoint=_WAL_PAGES,
        )

    @property
    def _is_writable(self) -> bool:
        return all(os.access(path, os.W_OK) for path in (self.database.parent, self.database))

    def _open_or_rebuild(self) -> Any:
        # Many processes creating one sqlite file at once run into "database is locked": one at a time.
        try:
            with FileLock(self.directory / "claims" / "open.lock"):
                try:
                    return self._open()
                except _UNUSABLE as error:
                    is_format = "readonly" in str(error) and self._is_writable  # so SQLite calls a newer format, too
                    if any(sign in str(error) for sign in _NOT_DAMAGE) and not is_format:
                        raise
                    self._move_aside(error)
                    return self._open()
        except (OSError, sqlite3.Error) as error:
            if self.database.is_file() and not self._is_writable:
                with suppress(sqlite3.Error):  # then the first error says what is wrong
                    return ReadOnlyStore(self.database)
            raise CacheError(
                f"cannot open the response cache in {self.directory}: {error}; "
                "expected a folder that can be read and written, choose another with --copa-cache-dir"
            ) from error

    def _rebuild(self, damaged: diskcache.Cache, error: Exception, *, is_certain: bool) -> None:
        with self._rebuilding:
            if self._store is not damaged:
                return  # another thread has done it
            damaged.close()
            with FileLock(self.directory / "claims" / "open.lock"):
                try:
                    healthy = self._open()  # another process may have rebuilt it meanwhile
                    with closing(sqlite3.connect(self.database, timeout=_SQLITE_TIMEOUT_S)) as sql:
                        if is_certain or sql.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
                            raise sqlite3.DatabaseError("integrity_check failed")
                except _UNUSABLE:
                    self._move_aside(error)
                    healthy = self._open()
            self._store = healthy

    def _move_aside(self, error: Exception) -> None:
        named = f"answers.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        target = self.directory / f"{named}-{len(list(self.directory.glob('answers.damaged-*')))}"
        try:
            os.replace(self.directory / "answers", target)
        except OSError as failure:
            raise CacheError(
                f"the response cache in {self.directory} is damaged ({error}) and cannot be moved aside ({failure}); "
                "delete it, or choose another folder with --copa-cache-dir"
            ) from failure
        self._warn(
            "rebuild",
            f"the response cache in {self.directory} was unusable ({error}); it was moved to {target.name} and "
            "rebuilt empty, so its answers will be paid for again",
        )

    def _refuse(self, key: str, error: Exception) -> None:
        self._warn(
            "row",
            f"an entry of the response cache in {self.directory} is damaged and was refused ({error}); it counts as "
            "absent and will be paid for again (further damaged entries are not reported)",
        )
        self._unwritten.pop(key, None)
        try:
            with self._writing:
                self._store.delete(key)
        except (sqlite3.Error, OSError, diskcache.Timeout):
            return  # it stays refused; overwriting it later is enough

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            try:
                warnings.warn(message, CacheWarning, stacklevel=4)
            except CacheWarning:
                # Warnings are errors here: one that ends the run, not one that a program takes for a bad answer.
                raise CacheError(message) from None


def _deleted(store: diskcache.Cache, keys: list[str]) -> int:
    n_deleted = 0
    for start in range(0, len(keys), _DROPPED_AT_ONCE):
        with store.transact():
            n_deleted += sum(store.delete(key) for key in keys[start : start + _DROPPED_AT_ONCE])
    return n_deleted


def _culled(store: diskcache.Cache, n_bytes: int) -> int:
    store.reset("size_limit", n_bytes)
    return int(store.cull())


_caches: weakref.WeakSet[ResponseCache] = weakref.WeakSet()


def _after_fork() -> None:
    for cache in _caches:
        cache._renew_turns()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
