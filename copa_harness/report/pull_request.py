"""What a reviewer sees where he already looks: a comment, the job's summary, annotations at the tests.

`comment.md` is the body of one comment that is updated from run to run (`MARK` finds it); it is plain Markdown, so
GitLab and others take it as well. Where GitHub's variables are set, the same text goes to the job's summary, and what
did not pass is annotated at the line of its test.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copa_harness.credentials import mask_text
from copa_harness.formatting import counted, number, probability, visible
from copa_harness.report.examples import Told
from copa_harness.report.records import RunRecord
from copa_harness.report.rendering import bounds, plain_markdown
from copa_harness.report.summary import (
    receipt,
    receipt_table,
    regression_of,
    spent_by,
    summary_rows,
    summary_table,
    totals,
    verdict_counts,
)
from copa_harness.results import Interval, Verdict

MARK = "<!-- copa-harness report -->"
"""The first line of the comment, by which the next run finds it."""

MAX_COMMENT = 60_000
"""GitHub takes 65,536 characters."""


def headline(runs: Sequence[RunRecord], *, told: Told) -> str:
    """What happened, in one line: what got worse, by how much, and whether it could be noise; else that nothing did."""
    than = f" than {told.against}" if told.against else " than the accepted result"
    failed = [row.run for row in summary_rows(runs) if row.run.verdict in (Verdict.FAIL, Verdict.ERROR)]
    if worse := [run for run in failed if _fell(run)]:
        said = "; ".join(_worse_text(run) for run in worse[:3])
        more = f"; and {len(worse) - 3} more" if len(worse) > 3 else ""
        return f"Worse{than}: {said}{more}."
    if failed:
        run = failed[0]
        gate = next(gate for gate in run.gates if gate.verdict in (Verdict.FAIL, Verdict.ERROR))
        more = f" (and {counted(len(failed) - 1, 'more run')})" if len(failed) > 1 else ""
        return f"Failed: {run.task}, {run.strategy}: {gate.gate}: {gate.message}{more}"
    if told.remarks:
        return told.remarks[0]
    unsure = [row.run for row in summary_rows(runs) if row.run.verdict is not Verdict.PASS]
    if unsure:
        return f"Nothing failed; {counted(len(unsure), 'run')} could not be decided: {_names(unsure)}."
    spent = spent_by(runs)
    where = f"No run is worse{than}" if any(map(regression_of, runs)) else "All gates passed"
    return f"{where}: {verdict_counts(runs)}, {counted(spent.paid_calls, 'call')} paid."


def _fell(run: RunRecord) -> bool:
    gate = regression_of(run)
    return gate is not None and gate.verdict is Verdict.FAIL


def _worse_text(run: RunRecord) -> str:
    """`iris, p: -0.240 [-.35, -.14] on 75 examples, 18 worse and 0 better, p = 8e-06 that this is noise`."""
    gate = regression_of(run)
    assert gate is not None
    told = gate.details
    interval = bounds(Interval(told["low"], told["high"]), signed=True) if "low" in told else ""
    counts = f", {told['n_worse']} worse and {told['n_better']} better" if "n_worse" in told else ""
    p_value = told.get("p_any_drop", told.get("p_worse", told.get("p_value")))
    noise = "" if p_value is None else f"; were nothing changed, chance would do this with {probability(p_value)}"
    on = f" on {told['n']} examples" if "n" in told else ""
    return f"{run.task}, {run.strategy}: {number(told['difference'], signed=True)}{interval}{on}{counts}{noise}"


def _names(runs: Sequence[RunRecord]) -> str:
    shown = "; ".join(f"{run.task}, {run.strategy}" for run in runs[:3])
    return shown + (f"; and {len(runs) - 3} more" if len(runs) > 3 else "")


def comment_text(runs: Sequence[RunRecord], *, environment: Mapping[str, Any], told: Told) -> str:
    """The comment as GitHub Markdown."""
    rows = summary_rows(runs)
    lines = [MARK, f"**{plain_markdown(headline(runs, told=told))}**", "", summary_table(runs, style="markdown")]
    open_gates = [
        f"- **{gate.verdict.value}** {plain_markdown(row.run.task)}, {plain_markdown(row.run.strategy)}: "
        f"`{gate.gate}`: {mask_text(plain_markdown(gate.message))}"
        for row in rows
        for gate in row.run.gates
        if gate.verdict is not Verdict.PASS
    ]
    if open_gates:
        lines += ["", "What did not pass:", "", *open_gates]
    lines += ["", *(f"- {mask_text(plain_markdown(remark))}" for remark in told.remarks)]
    lines += ["", plain_markdown(totals(runs)) + "."]
    table = receipt_table(receipt(runs, trials=told.trials, n_refused=told.n_refused), style="markdown")
    lines += ["", "<details><summary>Receipt and notes</summary>", "", table, ""]
    lines += [f"- {mask_text(plain_markdown(note))}" for note in told.notes]
    made = [
        f"{name} {environment[name]}" for name in ("created", "commit", "lm", "budget", "seed") if name in environment
    ]
    lines += ["", plain_markdown(", ".join(made)), "", "</details>"]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"
    if len(text) > MAX_COMMENT:
        text = text[:MAX_COMMENT].rsplit("\n", 1)[0] + "\n\nThe rest stands on the page, `latest.html`.\n"
    return text


def append_summary(comment: Path) -> None:
    """Put the comment into the job's summary, where GitHub asks for one.

    Raises:
        OSError: The file cannot be written.
    """
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(comment.read_text(encoding="utf-8"))


# -- annotations


@dataclass(frozen=True, slots=True)
class Annotation:
    """A message at the line of a test."""

    level: str
    path: str
    line: int
    title: str
    message: str

    def command(self) -> str:
        """What GitHub reads from the output: `::error file=suites/test_a.py,line=7,title=...::...`."""
        where = f"file={_property(self.path)},line={self.line},title={_property(self.title)}"
        return f"::{self.level} {where}::{_data(self.message)}"


def annotations_of(
    runs: Sequence[RunRecord], *, locations: Mapping[str, tuple[str, int]], failed: Mapping[str, str]
) -> list[Annotation]:
    """One per gate that did not pass, and one per test that failed for another reason.

    `locations` are path from the root and line, from 1, by test id; `failed` says why copa tests failed.
    """
    found = []
    for run in runs:
        for gate in run.gates:
            if gate.verdict is not Verdict.PASS:
                level = "error" if gate.verdict in (Verdict.FAIL, Verdict.ERROR) else "warning"
                path, line = locations.get(run.test, (run.test.split("::")[0], 1))
                title = f"{run.task}, {run.strategy}: {gate.verdict.value}"
                found.append(Annotation(level, path, line, title, f"{gate.gate}: {gate.message}"))
    said = {(one.path, one.line) for one in found if one.level == "error"}
    for test, why in failed.items():
        path, line = locations.get(test, (test.split("::")[0], 1))
        if (path, line) not in said:
            found.append(Annotation("error", path, line, test.split("::")[-1], why))
    return list(dict.fromkeys(found))


def _data(text: str) -> str:
    return visible(mask_text(text).replace("\r", "")).replace("%", "%25").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
