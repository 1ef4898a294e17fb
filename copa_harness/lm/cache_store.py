"""diskcache as the door needs it: bytes only, never a pickle, and a few connections for all threads of a process.

A connection per thread, as diskcache has it, costs milliseconds for each of a hundred threads and makes them wait for
one another inside SQLite. Here a read borrows a bare one, and all writes share one. Knows nothing of answers or keys.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import diskcache
from diskcache.core import DBNAME, MODE_PICKLE, MODE_RAW

from copa_harness.lm.forks import generation


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
