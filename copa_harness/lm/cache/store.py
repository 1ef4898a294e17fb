"""Answers on disk, shared by threads and processes.

An answer is stored as JSON with a checksum over key and text, in a diskcache folder whose disk class refuses every
pickle row, so a planted file can at worst be a miss. A damaged row is a miss and one warning; a store that cannot be
opened or read is moved aside, kept for inspection, and rebuilt, with one warning.

diskcache as the gateway needs it: bytes only, never a pickle, and a few connections for all threads of a process.

A connection per thread, as diskcache has it, costs milliseconds for each of a hundred threads and makes them wait for
one another inside SQLite. Here a read borrows a bare one, and all writes share one.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diskcache
from diskcache.core import DBNAME, MODE_PICKLE, MODE_RAW
from filelock import FileLock

from copa_harness.errors import CacheError
from copa_harness.lm.cache.answers import decode_answer, encode_answer
from copa_harness.lm.cache.locks import Claims, generation


class RefusedRowError(Exception):
    """A row in the store is a pickle; it was not read."""


class JSONDisk(diskcache.Disk):
    """Stores bytes only, and never unpickles: neither keys nor values."""

    def put(self, key: Any) -> Any:
        """The key as a column: text as it is."""
        if type(key) is not str:
            raise TypeError(f"got a key of type {type(key).__qualname__}, expected str")
        return key, True

    def get(self, key: Any, raw: Any) -> Any:
        """The key of a row."""
        if not raw:
            raise RefusedRowError("the key of a row is a pickle")
        return super().get(key, raw)

    def store(self, value: Any, read: Any, key: Any = diskcache.UNKNOWN) -> Any:
        """The value as columns: bytes as they are."""
        if type(value) is not bytes:
            raise TypeError(f"got a value of type {type(value).__qualname__}, expected bytes")
        return super().store(value, read, key=key)

    def fetch(self, mode: Any, filename: Any, value: Any, read: Any) -> Any:
        """The value of a row."""
        if mode == MODE_PICKLE:
            raise RefusedRowError("the value of a row is a pickle")
        return super().fetch(mode, filename, value, read)


class SharedStore(diskcache.Cache):
    """A `diskcache.Cache` whose connections are shared by the threads of the process.

    `row` and `add` may be called by any thread at any time; around everything else the caller holds `lock`.
    """

    _shared: sqlite3.Connection | None = None
    _owner = -1
    _quicker: sqlite3.Connection | None = None
    _quick_owner = -1

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.lock = threading.RLock()
        self._readers: deque[sqlite3.Connection] = deque()  # those nobody reads with now
        self._readers_owner = generation()
        super().__init__(*arguments, **settings)

    def row(self, key: str) -> Any:
        """The value stored under `key` now, or None. Takes no lock for the usual row, one that is no file."""
        readers, reader = self._borrowed()
        try:
            found = reader.execute(
                "SELECT mode, filename, value FROM Cache WHERE key = ? AND raw = 1", (key,)
            ).fetchall()
        except BaseException:
            reader.close()
            raise
        if readers is self._readers:
            readers.append(reader)
        else:
            reader.close()  # the store was closed meanwhile
        if not found:
            return None
        mode, filename, value = found[0]
        if mode == MODE_RAW and filename is None:
            return value
        with self.lock:
            return self.get(key)

    def add(self, key: str, row: bytes) -> None:
        """Store a row; the usual one, small and new, with one statement and no lock instead of diskcache's nine."""
        if len(row) < self.disk_min_file_size:
            now_s = time.time()
            try:
                self._quick().execute(
                    "INSERT INTO Cache(key, raw, store_time, expire_time, access_time, access_count, tag, size, mode,"
                    " filename, value) VALUES (?, 1, ?, NULL, ?, 0, NULL, 0, ?, NULL, ?)",
                    (key, now_s, now_s, MODE_RAW, sqlite3.Binary(row)),
                )
                return
            except sqlite3.IntegrityError:
                pass  # there is a row already: to be replaced with all that belongs to it
        with self.lock:
            self.set(key, row)

    def _quick(self) -> sqlite3.Connection:
        """A connection for single insertions of any thread at once.

        SQLite itself makes threads that share a connection take turns, for microseconds. A lock of Python's around it
        would be held while its owner waits for the interpreter, milliseconds when many threads compute.
        """
        if self._quicker is None or self._quick_owner != generation():
            with self.lock:
                if self._quicker is None or self._quick_owner != generation():
                    self._quicker, self._quick_owner = self._connected(), generation()
        return self._quicker

    def _borrowed(self) -> tuple[deque[sqlite3.Connection], sqlite3.Connection]:
        """A connection to read with alone, and where to put it back.

        On a connection that several read with at once, the reads of others would keep an old state alive.
        """
        if self._readers_owner != generation():
            self._readers, self._readers_owner = deque(), generation()
        readers = self._readers
        try:
            return readers, readers.pop()
        except IndexError:
            return readers, self._connected()

    def _connected(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            os.path.join(self._directory, DBNAME),
            timeout=self._timeout,
            isolation_level=None,
            check_same_thread=False,
        )
        # Checkpoints wait for the disk; 32 MB between them instead of 4 are as safe and an eighth as many.
        connection.execute("PRAGMA wal_autocheckpoint = 8000")
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    @property
    def _con(self) -> sqlite3.Connection:
        if self._shared is None or self._owner != generation():  # a forked child must not use its parent's connection
            self._shared, self._owner = None, generation()
            connection = self._connected()
            self._shared = connection
            # As diskcache does: some pragmas hold for a connection only. The table may not exist yet.
            try:
                settings = connection.execute("SELECT key, value FROM Settings").fetchall()
            except sqlite3.OperationalError:
                settings = []
            for key, value in settings:
                if key.startswith("sqlite_"):
                    self.reset(key, value, update=False)
        return self._shared

    def drop(self, where: str = "", arguments: tuple[float, ...] = (), *, most: int) -> int:
        """Remove up to `most` rows, those stored first, and their files; how many it were.

        Args:
            where: SQL condition on the rows, with `arguments` for its question marks.
            arguments: See `where`.
            most: Rows at once: one transaction.
        """
        with self._transact(retry=True) as (sql, cleanup):
            rows = sql(f"SELECT rowid, filename FROM Cache {where} ORDER BY rowid LIMIT {most}", arguments).fetchall()
            for row, filename in rows:
                sql("DELETE FROM Cache WHERE rowid = ?", (row,))
                # A planted row may name any file; only the store's own are removed.
                if filename and not Path(filename).is_absolute() and ".." not in Path(filename).parts:
                    cleanup(filename)
        return len(rows)

    def close(self) -> None:
        """Close the connection; the next use opens it again."""
        for connection, owner in ((self._shared, self._owner), (self._quicker, self._quick_owner)):
            if connection is not None and owner == generation():
                connection.close()
        self._shared = self._quicker = None
        readers, self._readers = self._readers, deque()
        if self._readers_owner == generation():
            while readers:
                readers.pop().close()


DEFAULT_SIZE_LIMIT = 8 * 2**30
"""Bytes a store may take before the oldest answers are dropped."""

_CHECK_SIZE_EVERY = 200

_DROPPED_AT_ONCE = 50

_SQLITE_TIMEOUT_S = 30.0

_NOT_DAMAGE = ("locked", "readonly", "is full", "disk I/O")
"""Complaints of sqlite that rebuilding the database would not cure."""

# What diskcache raises on a file that is no database, or one with alien settings.
_UNUSABLE = (sqlite3.DatabaseError, OSError, ValueError, KeyError, TypeError, AttributeError)


class CacheWarning(UserWarning):
    """Part of the cache directory is damaged or cannot be written; answers stay right, some are paid for again."""


class ResponseCache:
    """Answers on disk, shared by threads and processes.

    Args:
        directory: Created if missing. Holds `answers/` (the store), `claims/` (lock files) and, after damage,
            `answers.damaged-*`. Foreign files in it are left alone.
        size_limit: Bytes the store may take; beyond them the answers stored first are dropped, with one warning. None
            for no limit.

    Raises:
        CacheError: The directory cannot be created or written, or the store cannot be opened even after rebuilding.
    """

    def __init__(self, directory: Path, *, size_limit: int | None = DEFAULT_SIZE_LIMIT) -> None:
        self.directory = Path(directory)
        self._lock = threading.RLock()
        self._warned: set[str] = set()
        self._unwritten: dict[str, bytes] = {}  # paid answers the disk would not take: kept for this process
        self._size_limit = size_limit
        self._n_set = 0
        try:
            (self.directory / "claims").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                f"cannot create the response cache in {self.directory}: {error}; "
                "expected a folder that can be written, choose one with --copa-cache-dir"
            ) from error
        self._claims = Claims(self.directory / "claims")
        self._store = self._open_or_rebuild()

    def __deepcopy__(self, memo: dict[int, object]) -> ResponseCache:
        return self

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer stored under `key`, or None. A damaged row is removed and counts as absent."""
        row: object = self._unwritten.get(key)
        if row is None:
            try:
                row = self._healed(lambda store: store.row(key))
            except RefusedRowError as error:
                self._drop(key, error)
                return None
            except (sqlite3.Error, OSError, diskcache.Timeout) as error:
                self._warn("read", f"the response cache in {self.directory} cannot be read ({error}); going on without")
                return None
            if row is None:
                return None
        try:
            return decode_answer(key, row)
        except ValueError as error:
            self._drop(key, error)
            return None

    def set(self, key: str, value: dict[str, Any]) -> None:
        """Store an answer. If the disk refuses, the answer is kept in memory and a warning says so once."""
        row = encode_answer(key, value)
        try:
            self._healed(lambda store: store.add(key, row))
            self._stay_below_limit()
        except (sqlite3.Error, OSError, diskcache.Timeout) as error:
            self._unwritten[key] = row
            self._warn(
                "write",
                f"the response cache in {self.directory} cannot be written ({error}); answers of this run are kept "
                "in memory only and will be paid for again next time",
            )

    def _stay_below_limit(self) -> None:
        self._n_set += 1
        if self._size_limit is None or self._n_set % _CHECK_SIZE_EVERY != 1:
            return
        with self._store.lock:
            if self._store.volume() < self._size_limit:
                return
            while self._store.volume() > 0.9 * self._size_limit and self._store.drop(most=_DROPPED_AT_ONCE):
                pass
        self._warn(
            "size",
            f"the response cache in {self.directory} has reached its limit of {self._size_limit:,} bytes; the answers "
            "stored first are dropped and would be paid for again. `copa cache stats` shows what it holds",
        )

    @contextmanager
    def claimed(self, key: str) -> Iterator[None]:
        """While the block runs, no other process pays for `key`; a killed owner's claim ends with it."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._claims.claimed(key))
            except OSError as error:
                self._warn(
                    "claim",
                    f"cannot lock {self._claims.path} ({error}); other processes may pay for the same answers",
                )
            yield

    def close(self) -> None:
        """Close the database; the cache may be used again afterwards."""
        with self._store.lock:
            self._store.close()
        self._claims.close()

    def __len__(self) -> int:
        with self._store.lock:
            return len(self._store)

    # -- damage

    def _healed(self, action: Callable[[SharedStore], Any]) -> Any:
        """`action` on the store; once more on a rebuilt store if the database turns out to be damaged."""
        store = self._store
        try:
            return action(store)
        except sqlite3.DatabaseError as error:
            if any(sign in str(error) for sign in _NOT_DAMAGE):
                raise
            self._rebuild(store, error)
            return action(self._store)

    def _open(self) -> SharedStore:
        return SharedStore(
            str(self.directory / "answers"),
            disk=JSONDisk,
            timeout=_SQLITE_TIMEOUT_S,
            eviction_policy="none",
            size_limit=2**62 if self._size_limit is None else self._size_limit,
            cull_limit=0,  # not while an answer is stored: see _stay_below_limit
            statistics=0,
        )

    def _open_or_rebuild(self) -> SharedStore:
        # Many processes creating one sqlite file at once run into "database is locked": one at a time.
        try:
            with FileLock(self.directory / "claims" / "open.lock"):
                try:
                    return self._open()
                except _UNUSABLE as error:
                    if any(sign in str(error) for sign in _NOT_DAMAGE):
                        raise
                    self._move_aside(error)
                    return self._open()
        except (OSError, sqlite3.Error) as error:
            raise CacheError(
                f"cannot open the response cache in {self.directory}: {error}; "
                "expected a folder that can be read and written, choose another with --copa-cache-dir"
            ) from error

    def _rebuild(self, damaged: SharedStore, error: Exception) -> None:
        with self._lock:
            if self._store is not damaged:
                return  # another thread has done it
            damaged.close()
            with FileLock(self.directory / "claims" / "open.lock"):
                try:
                    healthy = self._open()  # another process may have rebuilt it meanwhile
                    if next(iter(healthy._sql("PRAGMA quick_check(1)")))[0] != "ok":
                        raise sqlite3.DatabaseError("quick_check failed")
                except _UNUSABLE:
                    self._move_aside(error)
                    healthy = self._open()
            self._store = healthy

    def _move_aside(self, error: Exception) -> None:
        target = self.directory / f"answers.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
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

    def _drop(self, key: str, error: Exception) -> None:
        self._warn(
            "row",
            f"an entry of the response cache in {self.directory} is damaged and was refused ({error}); it counts as "
            "absent and will be paid for again (further damaged entries are not reported)",
        )
        self._unwritten.pop(key, None)
        try:
            with self._store.lock:
                self._store.delete(key)
        except (RefusedRowError, sqlite3.Error, OSError, diskcache.Timeout):
            return  # it stays refused; overwriting it later is enough

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            try:
                warnings.warn(message, CacheWarning, stacklevel=4)
            except CacheWarning:
                # Warnings are errors here: one that ends the run, not one that a program takes for a bad answer.
                raise CacheError(message) from None
