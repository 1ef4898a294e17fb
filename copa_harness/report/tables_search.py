"""Tables of what an optimization did, and of the choice it had between score and cost.

Each function returns text without a final newline, or "" when no run has anything to say. Numbers come from the
records as the optimizer made them, on its validation examples. Knows nothing of files or pytest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from copa_harness.judge.messages import number
from copa_harness.report.grouping import told_once
from copa_harness.report.records import RunRecord
from copa_harness.report.tables_drawing import Style, draw, with_notes

_COSTS = (
    ("prompt tokens", "prompt_tokens_per_answer", "{:,.0f}"),
    ("output tokens", "output_tokens_per_answer", "{:,.1f}"),
    ("USD", "usd_per_answer", "{:.6f}"),
    ("seconds", "seconds_per_answer", "{:.3f}"),
    ("longest prompt", "longest_prompt", "{:,}"),
)


def front_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """The programs between which the preference chose: none is better and cheaper than another."""
    rows: list[list[str]] = []
    for run in told_once(runs, "front"):
        for index, entry in enumerate(run.front):
            where = [run.task, run.strategy] if index == 0 else ["", ""]
            costs = [_cost(entry, key, form) for _, key, form in _COSTS]
            chosen = "returned" if entry["returned"] else ""
            rows.append([*where, number(entry["score"]), *costs, str(entry["n_demos"]), chosen])
    if not rows:
        return ""
    headers = ["task", "strategy", "score", *(name for name, _, _ in _COSTS), "demos", ""]
    costliest = "on validation; per answer, all calls of it together, as they were when they were bought"
    notes = [f"programs of which none is both better and cheaper than another, cheapest first; {costliest}"]
    return with_notes(draw(rows, headers, style=style, n_text=2, last_text=True), notes, style=style)


def story_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """What every optimization did, in its own words; in the terminal nothing, since it was told while it ran."""
    if style == "terminal":
        return ""
    rows = [
        [run.task if index == 0 else "", run.strategy if index == 0 else "", note]
        for run in told_once(runs, "notes")
        for index, note in enumerate(run.notes)
    ]
    return draw(rows, ["task", "strategy", "what it did"], style=style, n_text=3) if rows else ""


def _cost(entry: Mapping[str, Any], key: str, form: str) -> str:
    value = entry.get(key)
    return "-" if value is None else form.format(value)
