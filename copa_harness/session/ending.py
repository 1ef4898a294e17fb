"""The end of a session: records of all processes become report files, tables and remarks.

Rows are what processes hand one another: `{"order": position of the test, "record": RunRecord as JSON, "unchecked":
its gates failed and the test never asked}`. Knows nothing of pytest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from copa_harness.errors import CopaError
from copa_harness.session.settings import Settings


@dataclass(frozen=True, slots=True)
class Report:
    """What the terminal shows.

    Attributes:
        tables: (title, text) of every table that has something to say.
        gates: Gates that did not pass, under their runs; empty when all passed.
        verdicts: How many runs passed, failed, are undecided.
        remarks: What a person should know and could overlook.
        written: Path of the report file for people, relative to the root if it lies below; empty when not written.
    """

    tables: tuple[tuple[str, str], ...]
    gates: str
    verdicts: str
    remarks: tuple[str, ...]
    written: str


def finish(rows: Sequence[Mapping[str, Any]], *, settings: Settings) -> Report:
    """Writes the report files and draws the tables.

    Args:
        rows: From every process of the session, in any order.
        settings: Where to write, and what to say about seed and budget.
    """
    from copa_harness.report.files import write_reports
    from copa_harness.report.records import RunRecord
    from copa_harness.report.surroundings import environment
    from copa_harness.report.tables import all_tables
    from copa_harness.report.verdicts import gates_to_read, verdict_counts

    ordered = sorted(rows, key=lambda row: row["order"])
    records = [RunRecord.from_json(row["record"]) for row in ordered]
    remarks = [
        f"{row['record']['test']}: a gate failed, but the test passed it by; call copa_run.check() in it"
        for row in ordered
        if row["unchecked"]
    ]
    surroundings = environment(root=settings.root, seed=settings.seed, budget=settings.budget.name, lm=settings.lm)
    written = ""
    try:
        path = write_reports(settings.report_dir, records, environment=surroundings).latest_markdown
        written = str(path.relative_to(settings.root) if path.is_relative_to(settings.root) else path)
    except CopaError as error:
        remarks.append(str(error))
    return Report(all_tables(records), gates_to_read(records), verdict_counts(records), tuple(remarks), written)
