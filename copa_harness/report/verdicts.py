"""What the gates of all runs said: counts, the ones that need attention, and the whole list for latest.md.

Text from run records; knows nothing of tables, files or pytest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from copa_harness.documents import mask_text
from copa_harness.judge.messages import format_gates
from copa_harness.report.records import RunRecord
from copa_harness.results import Verdict


def verdict_counts(runs: Sequence[RunRecord]) -> str:
    """`3 pass, 1 fail, 2 undecided`."""
    counts = {verdict: sum(run.verdict is verdict for run in runs) for verdict in Verdict}
    return ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items() if count)


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


def markdown_gates(runs: Sequence[RunRecord]) -> list[str]:
    """Every gate of every run as nested Markdown list items."""
    lines = []
    for run in runs:
        if not run.gates:
            continue
        where = f" (`{run.test}`)" if run.test else ""
        lines.append(f"- **{run.verdict.value}** {run.task}, {run.strategy}{where}")
        for gate in run.gates:
            verdict = gate.verdict.value if gate.verdict is Verdict.PASS else f"**{gate.verdict.value}**"
            lines.append(f"  - {verdict} `{gate.gate}`: {mask_text(plain_markdown(gate.message))}")
    return lines


def plain_markdown(text: str) -> str:
    """Text on one line, with what Markdown would read as markup escaped."""
    return re.sub(r"([<*`\[\]\\]|\b_|_\b)", r"\\\1", " ".join(text.split()))
