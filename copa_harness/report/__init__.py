"""The report: run records, the tables made of them, the page, and the files they are written to.

Names are loaded on first use; tabulate is imported only to draw a table.
"""

from __future__ import annotations

from copa_harness.lazy_imports import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "provenance": ["environment"],
        "examples": ["RunDetails", "Told"],
        "files": ["ReportPaths", "gates_to_read", "write_reports"],
        "records": ["RunRecord", "as_reported"],
        "summary": ["summary_table", "totals", "verdict_counts"],
        "tables": ["all_tables", "compare_table", "copa_table", "failure_table", "phase_table"],
    },
)
