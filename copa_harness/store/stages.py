"""Results of finished stages, under a key that names everything they depend on: the same work is never done twice.

`StageStore(directory).put(key, result)` keeps a JSON mapping with its checksum; `get` gives it back, or None when it is
absent or damaged (with one warning). Nothing is created before the first `put`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copa_harness.atomic_files import write_atomic
from copa_harness.credentials import find_credential
from copa_harness.documents import from_json, hash_json, parse_json, to_json, to_jsonable
from copa_harness.results import SCHEMA


@dataclass(frozen=True, slots=True)
class StoredStage:
    """What the file of a stage holds."""

    schema: int
    key: str
    sha256: str
    value: dict[str, Any]


class StageStore:
    """Finished results by key. Safe to share between threads and processes: a file is replaced as a whole."""

    def __init__(self, directory: Path) -> None:
        """Use `directory`, which is created by the first `put`."""
        self.directory = Path(directory)
        self._warned: set[Path] = set()

    def path(self, key: str) -> Path:
        """Where the result of `key` lives."""
        name = hashlib.sha256(key.encode("utf-8")).hexdigest()
        return self.directory / name[:2] / f"{name}.json"

    def get(self, key: str) -> dict[str, Any] | None:
        """The result put under `key`, or None when there is none or it is damaged (one warning per file)."""
        path = self.path(key)
        try:
            text = self._read(key)
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            return self._ignore(path, f"cannot be read ({error})")
        try:
            document = parse_json(text)
            if isinstance(document, dict) and document.get("schema") != SCHEMA:
                return None  # written by another version: not damaged, only of no use
            stage = from_json(StoredStage, document)
            if stage.key != key or stage.sha256 != hash_json(stage.value):
                return self._ignore(path, "does not match its checksum")
        except (ValueError, RecursionError) as error:
            return self._ignore(path, f"is not a stage result ({error})")
        return stage.value

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Keep a result; an earlier one under the same key is replaced.

        NaN and infinities become None. A result with what looks like a credential in it is not kept, with a warning:
        masking it would give back something else than was put in.

        Raises:
            TypeError: for a value without JSON form: what comes back would not be what was put in.
            OSError: the directory cannot be written or the disk is full; the earlier result is intact.
        """
        plain = to_jsonable(value, fallback=None)
        if trail := find_credential(plain):
            warnings.warn(
                f"stage not stored: {trail} looks like a credential; the stage is done again next time (keep "
                f"credentials in the environment, out of programs and settings)",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        document = to_json(StoredStage(SCHEMA, key, hash_json(plain), plain))
        self._write(key, json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1) + "\n")

    def exclusive(self, key: str) -> AbstractContextManager[Any]:
        """While it is held nobody else holds one with the same key; the lock lapses when its owner is killed."""
        from filelock import FileLock

        locks = self.directory / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / f"{key[:32]}.lock")

    def _read(self, key: str) -> str:
        return self.path(key).read_text(encoding="utf-8")

    def _write(self, key: str, text: str) -> None:
        write_atomic(self.path(key), text)

    def _ignore(self, path: Path, what: str) -> dict[str, Any] | None:
        if path not in self._warned:
            self._warned.add(path)
            warnings.warn(
                f"stored stage {path} {what}; it is ignored and the stage is done again, which replaces it",
                RuntimeWarning,
                stacklevel=3,
            )
        return None
