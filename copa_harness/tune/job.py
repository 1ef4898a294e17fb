"""One training as a file: what the processes that share it are told.

Plain JSON of numbers, names and paths, written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copa_harness.documents import write_atomic
from copa_harness.tune.rows import EncodedRow
from copa_harness.tune.settings import LoraSettings

JOB_SCHEMA = 1
JOB_FILE = "job.json"


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """One training, encoded.

    Attributes:
        directory: of the LoRA adapters (absolute).
        recipe: the training's content address.
        base: folder of the base model (absolute).
        base_fingerprint: of the base model.
        dtype: of its weights, e.g. `float32`.
        device: `cpu` or `cuda`.
        pad_id: token id to pad with.
        n_processes: how many share the training.
        resumes: whether there is a state to go on from.
        settings: of the training.
        rows: to train on.
        held_out: for early stopping.
        details: for the manifests.
    """

    directory: Path
    recipe: str
    base: Path
    base_fingerprint: str
    dtype: str
    device: str
    pad_id: int
    n_processes: int
    resumes: bool
    settings: LoraSettings
    rows: Sequence[EncodedRow]
    held_out: Sequence[EncodedRow]
    details: Mapping[str, Any]


def write_job(folder: Path, job: TrainingJob) -> None:
    """Write a job into a folder that exists."""
    given = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    given.update(
        schema=JOB_SCHEMA,
        directory=str(job.directory),
        base=str(job.base),
        settings=dataclasses.asdict(job.settings),
        rows=[dataclasses.astuple(row) for row in job.rows],
        held_out=[dataclasses.astuple(row) for row in job.held_out],
        details=dict(job.details),
    )
    write_atomic(folder / JOB_FILE, json.dumps(given))


def read_job(folder: Path) -> TrainingJob:
    """Read what `write_job` wrote.

    Raises:
        ValueError: it was written by another version.
    """
    given = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    if (schema := given.pop("schema")) != JOB_SCHEMA:
        raise ValueError(f"got a training job of schema {schema}; expected {JOB_SCHEMA}")
    given.update(
        directory=Path(given["directory"]),
        base=Path(given["base"]),
        settings=LoraSettings(**given["settings"]),
        rows=_rows(given["rows"]),
        held_out=_rows(given["held_out"]),
    )
    return TrainingJob(**given)


def _rows(given: Sequence[Sequence[Any]]) -> list[EncodedRow]:
    return [EncodedRow(tuple(ids), n_prompt, variant, tuple(also)) for ids, n_prompt, variant, also in given]
