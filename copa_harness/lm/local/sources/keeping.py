"""A model folder rewritten from another format: made once, by one process, whole or not at all.

It is written under a hidden name and renamed when it is complete. What a killed process left behind is removed by the
next one.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from copa_harness.errors import ConfigurationError
from copa_harness.formatting import size

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def keep_folder(target: Path, write: Callable[[Path], None], *, n_bytes: int = 0) -> bool:
    """Make the folder `target` unless it is there.

    Args:
        target: where the folder belongs.
        write: writes it under the path it is given.
        n_bytes: about what it takes on disk.

    Returns:
        Whether it was made now.

    Raises:
        ConfigurationError: the disk does not take it.
    """
    if target.is_dir():
        return False
    remedy = "remedy: free some space, or name another folder with --copa-cache-dir"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            if target.is_dir():
                return False
            partial = target.parent / f".{target.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            free = shutil.disk_usage(target.parent).free
            if n_bytes > free:
                raise ConfigurationError(
                    f"a copy of the model in safetensors takes about {size(n_bytes)} in {target.parent}, where "
                    f"{size(free)} are free; {remedy}"
                )
            try:
                write(partial)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except Exception as error:
        if not _refuses(error):
            raise
        raise ConfigurationError(
            f"{target.parent} took no whole copy of the model in safetensors ({error}); {remedy}"
        ) from error
    return True


def _refuses(error: BaseException) -> bool:
    """Whether the disk is full or closed; safetensors has only words for it."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    said = str(error)
    return type(error).__name__ == "SafetensorError" and ("No space left" in said or "File too large" in said)
