"""The report: run records, the tables made of them, and the files they are written to.

Names are loaded on first use; tabulate is imported only to draw a table.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "RunRecord": "records",
    "copa_table": "tables",
    "phase_table": "tables",
    "compare_table": "tables",
    "failure_table": "tables",
    "all_tables": "tables",
    "verdict_counts": "verdicts",
    "gates_to_read": "verdicts",
    "write_reports": "files",
    "read_report": "files",
    "ReportPaths": "files",
    "environment": "surroundings",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
