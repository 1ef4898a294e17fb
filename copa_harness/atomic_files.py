"""Files written whole or not at all, and the removal of what a killed process left half-written.

What is being written lies under a hidden temporary name that says which process of which machine writes it, and is
renamed when it is finished: a file that exists is complete. The next write to a folder removes what dead ones left.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from pathlib import Path

_TEMPORARY = re.compile(
    r"\.(?P<name>.*)\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d{1,10})\.[0-9a-f]{12}\.tmp(?P<aside>\.old)?"
)


_LEFTOVER_AFTER_S = 3600.0


def temporary_name(path: Path) -> Path:
    """A new name beside `path` for what is not finished: hidden, and it says which process of which machine writes.

    What a killed process leaves under such a name is removed by `remove_leftovers`.
    """
    return path.parent / f".{path.name[:80]}.{_machine()}-{os.getpid()}.{secrets.token_hex(6)}.tmp"


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left under temporary names in `folder`: files and folders.

    A name of this machine is deleted when its process no longer lives; of another machine (a shared disk), when it is
    more than an hour old. A predecessor that stepped aside (`.old` behind the name) goes only when its successor is
    there. What is not named by `temporary_name` is left alone.
    """
    try:
        found = [(entry, match) for entry in os.scandir(folder) if (match := _TEMPORARY.fullmatch(entry.name))]
    except OSError:
        return  # no folder, or it cannot be listed: whoever writes to it next will say so
    for entry, match in found:
        try:
            if match["aside"] and not (Path(folder) / match["name"]).exists():
                continue  # it stepped aside for a successor that never came: the only copy
            if _is_abandoned(match["machine"], int(match["pid"]), entry.stat(follow_symlinks=False).st_mtime):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
        except OSError:
            continue  # removed by another process at this moment, or not ours to remove: harmless where it is


def _is_abandoned(machine: str, pid: int, written_s: float) -> bool:
    if pid == os.getpid() and machine == _machine():
        return False
    # Signal 0 asks whether a process lives; on Windows it would end it.
    if machine == _machine() and os.name == "posix":
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:
            pass  # another user's, alive
    return time.time() - written_s > _LEFTOVER_AFTER_S  # even a living one's: numbers are given out again


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def write_atomic(path: Path, data: str | bytes) -> Path:
    """Write a file under a temporary name beside `path`, then rename: who sees the name sees the whole content.

    What killed processes left half-written in the folder is removed on the way.

    Raises:
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary = temporary_name(path)
    try:
        # os.open rather than tempfile: a report is meant to be read by others, so the umask decides its mode.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            # Half a character (a lone surrogate) has no UTF-8; its escape is what JSON has for it.
            file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
