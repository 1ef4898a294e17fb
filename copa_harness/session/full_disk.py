"""Work on the disk: by one process at a time, and what a run says when the disk takes no more.

That is one clear error, or a warning where only repetition is lost. Knows nothing of what is written.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copa_harness.errors import CacheError

if TYPE_CHECKING:
    from copa_harness.store.stages import StageStore

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextmanager
def told_if_full(directory: Path, task: str) -> Iterator[None]:
    """The block writes below `directory` for the optimization of `task`.

    Raises:
        CacheError: The disk is full or cannot be written. Other errors of the system pass as they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise CacheError(
            f"the optimization of {task} cannot go on: the cache directory {directory} takes no more "
            f"({error.strerror}). Next: free some space or name another folder with --copa-cache-dir, then run again "
            f"(answers it has taken are not paid for again)."
        ) from error


@contextmanager
def alone(locks: Path, key: str) -> Iterator[None]:
    """While the block runs no other process is in one with the same key; the lock lapses when its owner is killed."""
    from filelock import FileLock

    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{key[:32]}.lock"):
        yield


def keep(stages: StageStore, key: str, value: Mapping[str, Any], *, task: str) -> None:
    """Keep the result of a finished optimization; where the disk takes no more, warn and go on with the result."""
    try:
        stages.put(key, value)
    except OSError as error:
        warnings.warn(
            f"the finished optimization of {task} could not be kept in {stages.directory} "
            f"({error.strerror or error}); its result stands, and the search is made again next time. Free some space, "
            f"or name another folder with --copa-cache-dir",
            RuntimeWarning,
            stacklevel=2,
        )
