"""The table of how searches ended: why, and after how many candidates and calls.

Numbers come from the records as the optimizer made them. Knows nothing of files or pytest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from copa_harness.report.grouping import told_once
from copa_harness.report.records import RunRecord
from copa_harness.report.tables_drawing import Style, draw


def ending_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """Why every optimization ended; "" without one."""
    rows = []
    for run in told_once(runs, "search"):
        search = run.search
        ceiling = "" if math.isinf(run.budget.calls) else f" of {run.budget.calls:,.0f}"
        rows.append(
            [run.task, run.strategy, f"{search['n_trials']:,}", f"{search['calls']:,}{ceiling}", search["reason"]]
        )
    headers = ["task", "strategy", "candidates", "calls", "ended by"]
    return draw(rows, headers, style=style, n_text=2, last_text=True) if rows else ""
