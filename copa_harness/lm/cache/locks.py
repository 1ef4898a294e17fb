"""Locks on keys across processes: whoever holds one is the only one, anywhere on this machine, to pay for that key.

Each key is locked by one byte of one file, the byte the key's hash names, so any number of keys can be locked at once
and the system releases a lock the moment its owner dies, however it dies. Where the system cannot lock bytes, keys
share a limited number of lock files.

`fork_count` says which fork of the process this is, without a system call: locks and connections must not cross a fork.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

N_BUCKETS = 256
"""Lock files where bytes cannot be locked; two keys in one of them wait for each other."""

_POLL_S = (0.001, 0.02)

_fork_count = 0


def fork_count() -> int:
    """A number that changes in a forked child."""
    return _fork_count


def _forked() -> None:
    global _fork_count
    _fork_count += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class KeyLocks:
    """The locks of one cache directory.

    Args:
        directory: An existing folder for the lock file.
    """

    def __init__(self, directory: Path) -> None:
        self.path = Path(directory) / "keys.lock"
        self._file = _shared_file(self.path)
        weakref.finalize(self, self._file.close)

    def close(self) -> None:
        """Close the file unless somebody holds a lock; it may be used again."""
        self._file.close()

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """While the block runs, no other thread or process holds the lock on `key`.

        Raises:
            OSError: The system cannot lock the file.
        """
        if fcntl is None:
            with FileLock(self.path.with_name(f"{int(key[:15], 16) % N_BUCKETS:03d}.lock"), poll_interval=_POLL_S[1]):
                yield
            return
        with self._file.locked(int(key[:15], 16)):
            yield


class _LockFile:
    """One open file for all threads of the process: POSIX locks belong to the process and end with any `close`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mutex = threading.Lock()
        self._threads: dict[int, tuple[threading.Lock, int]] = {}  # byte -> (lock among threads, threads interested)
        self._descriptor = -1
        self._owner = -1

    @contextmanager
    def locked(self, byte: int) -> Iterator[None]:
        descriptor, lock = self._enter(byte)
        try:
            with lock:
                self._acquire(descriptor, byte)
                try:
                    yield
                finally:
                    fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, byte)
        finally:
            self._leave(byte)

    def _enter(self, byte: int) -> tuple[int, threading.Lock]:
        with self._mutex:
            if self._descriptor < 0 or self._owner != fork_count():  # a fork does not inherit its parent's locks
                self._threads.clear()
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                self._owner = fork_count()
            lock, n_interested = self._threads.get(byte, (threading.Lock(), 0))
            self._threads[byte] = (lock, n_interested + 1)
            return self._descriptor, lock

    def _leave(self, byte: int) -> None:
        with self._mutex:
            lock, n_interested = self._threads[byte]
            if n_interested > 1:
                self._threads[byte] = (lock, n_interested - 1)
                return
            del self._threads[byte]

    def close(self) -> None:
        """Close the file unless somebody holds a lock; the next lock opens it again."""
        with self._mutex:
            if not self._threads and self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def _acquire(self, descriptor: int, byte: int) -> None:
        # Asking again instead of sleeping in the kernel: it takes two processes that wait for each other's different
        # keys for a deadlock, since it does not see that other threads hold them.
        pause_s = _POLL_S[0]
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
                return
            except (BlockingIOError, PermissionError):
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _POLL_S[1])


_files_lock = threading.Lock()

_files: dict[str, _LockFile] = {}


def _shared_file(path: Path) -> _LockFile:
    """The lock file at `path`, the same object for everybody in the process."""
    name = os.path.realpath(path)
    with _files_lock:
        return _files.setdefault(name, _LockFile(path))
