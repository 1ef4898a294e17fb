"""The report on disk: latest.html for people, latest.json for tools, a numbered copy to compare with, comment.md.

`latest.*` are replaced as a whole; the numbered copy (0001.json, 0002.json, ...) takes the next free number even when
several processes write at once. A folder that cannot be written is one `CopaError`; whoever called still has the
records and prints them, with the gates that need attention (`gates_to_read`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from copa_harness.atomic_files import temporary_name, write_atomic
from copa_harness.credentials import mask_secrets
from copa_harness.documents import pretty_json, to_jsonable
from copa_harness.errors import CopaError
from copa_harness.judge.explanations import format_gates
from copa_harness.report.examples import NOTHING_TOLD, Told
from copa_harness.report.page import page_html
from copa_harness.report.pull_request import comment_text
from copa_harness.report.records import RunRecord, as_reported
from copa_harness.results import SCHEMA, Verdict


def gates_to_read(runs: Sequence[RunRecord], *, width: int = 0) -> str:
    """Gates that did not pass, under the run they belong to, for the terminal; "" when all passed.

    Args:
        runs: all runs.
        width: columns to wrap at; 0 asks the terminal.
    """
    blocks = []
    for run in runs:
        open_gates = [gate for gate in run.gates if gate.verdict is not Verdict.PASS]
        if open_gates:
            where = f"  ({run.test})" if run.test else ""
            blocks.append(f"{run.task}, {run.strategy}{where}\n{format_gates(open_gates, width=width)}")
    return "\n".join(blocks)


NUMBERED = re.compile(r"(\d{4,})\.json")

_MAX_TRIES = 1000


@dataclass(frozen=True, slots=True)
class ReportPaths:
    """Where a report was written."""

    latest_json: Path
    numbered_json: Path
    page: Path
    comment: Path


def write_reports(
    directory: Path,
    runs: Sequence[RunRecord],
    *,
    environment: Mapping[str, Any] | None = None,
    told: Told = NOTHING_TOLD,
) -> ReportPaths:
    """Write latest.json, its numbered copy, latest.html and comment.md.

    Absolute artifact paths are written relative to `directory`, which is created when missing.

    Raises:
        CopaError: the folder cannot be written or the disk is full. Earlier reports are intact.
    """
    folder = Path(directory)
    placed = [replace(run, artifact=_relative(run.artifact, folder)) for run in runs]
    made_in = mask_secrets(to_jsonable(environment or {}))
    document = {
        "schema": SCHEMA,
        "environment": made_in,
        "runs": [as_reported(run) for run in placed],
    }
    text = pretty_json(document)
    try:
        numbered = _write_numbered(folder, text)
        latest = write_atomic(folder / "latest.json", text)
        page = write_atomic(folder / "latest.html", page_html(placed, environment=made_in, told=told))
        comment = write_atomic(folder / "comment.md", comment_text(placed, environment=made_in, told=told))
    except OSError as error:
        raise CopaError(
            f"the report could not be written to {folder} ({error.strerror or error}); the results stand as "
            f"printed. Next: free some space or choose a writable folder with --copa-report-dir, then run again "
            f"(answers are cached)."
        ) from error
    return ReportPaths(latest, numbered, page, comment)


def remove_latest(directory: Path) -> bool:
    """Remove what `write_reports` left under fixed names; whether there was anything.

    Raises:
        CopaError: It cannot be removed.
    """
    folder, found = Path(directory), False
    for name in ("latest.json", "latest.html", "comment.md"):
        try:
            (folder / name).unlink()
            found = True
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CopaError(
                f"{folder / name} is of an earlier run and could not be removed ({error.strerror or error}). Next: "
                "remove it, so that nobody takes it for this run's."
            ) from error
    return found


def _relative(artifact: str, folder: Path) -> str:
    if not artifact or not Path(artifact).is_absolute():
        return artifact
    try:
        return Path(os.path.relpath(artifact, folder.absolute())).as_posix()
    except ValueError:  # another drive
        return Path(artifact).as_posix()


def _write_numbered(folder: Path, text: str) -> Path:
    """Write under the next free number; linking a finished file to a name fails if another process has taken it."""
    temporary = write_atomic(temporary_name(folder / "numbered.json"), text)
    try:
        number = 1 + max(
            (int(match[1]) for name in os.listdir(folder) if (match := NUMBERED.fullmatch(name))), default=0
        )
        for candidate in range(number, number + _MAX_TRIES):
            path = folder / f"{candidate:04d}.json"
            try:
                os.link(temporary, path)
            except FileExistsError:
                continue
            except OSError:
                return _claim(path, text)  # a file system without hard links
            return path
    finally:
        temporary.unlink(missing_ok=True)
    raise OSError(f"no free number from {number:04d} on")


def _claim(path: Path, text: str) -> Path:
    """Take the name first, then write: the next best thing where files cannot be linked."""
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            path = path.with_name(f"{int(path.stem) + 1:04d}.json")
            continue
        os.close(descriptor)
        return write_atomic(path, text)
