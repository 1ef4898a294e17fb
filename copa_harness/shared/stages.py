"""Finished stages in the shared database: the same checksummed JSON as in files (`store/stages.py`), the same key."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from copa_harness.shared.database import SharedDatabase
from copa_harness.store.stages import StageStore


class SharedStages(StageStore):
    """A `StageStore` in a database.

    Args:
        database: Which.
    """

    def __init__(self, database: SharedDatabase) -> None:
        super().__init__(Path(str(database)))
        self._database = database

    def path(self, key: str) -> Path:
        """What a message calls the place of a stage."""
        return self.directory / key

    def exclusive(self, key: str) -> AbstractContextManager[Any]:
        """While the block runs nobody else is in one with the same key; a killed process's claim lapses."""
        return self._database.claimed("making", key)

    def _read(self, key: str) -> str:
        row = self._database.get("stage", key)
        if row is None:
            raise FileNotFoundError(key)
        return row.decode("utf-8")

    def _write(self, key: str, text: str) -> None:
        self._database.put("stage", key, text.encode("utf-8"))
