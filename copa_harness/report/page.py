"""The report as one HTML file that needs nothing else: `page.html.jinja` filled with what it shows.

Whatever comes from a model, a task or a traceback is escaped by Jinja, and what a browser would obey without showing it
(escape sequences, marks of direction) is named instead. A content security policy in the file itself allows no request
and no script but its own, so that a hole in the escaping would still lead nowhere.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from copa_harness.formatting import number, visible
from copa_harness.judge.attribution import CELLS
from copa_harness.report.examples import RunDetails, Told
from copa_harness.report.records import RunRecord
from copa_harness.report.rendering import bounds
from copa_harness.report.summary import SummaryRow, receipt, receipt_table, summary_rows, totals
from copa_harness.report.tables import all_tables, phase_table
from copa_harness.results import GateResult, Verdict

TEMPLATE = "page.html.jinja"

MAX_WORDS = 400
"""Of a changed passage; longer ones are compared by line only."""

CONTEXT = 3
"""Lines shown before and after a change."""

CURVE_WIDTH, CURVE_HEIGHT = 640, 200


@dataclass(frozen=True, slots=True)
class Curve:
    """Score against examples scored by a search, in the coordinates of a picture.

    Attributes:
        dots: x, y and a title for every trial; "dropped" ones are hollow.
        best: Points of the line of the best score so far.
        n: Examples scored in all.
        low: Score at the bottom.
        high: Score at the top.
        text: The same in a sentence.
    """

    dots: tuple[tuple[float, float, str, bool], ...]
    best: str
    n: int
    low: float
    high: float
    text: str


@dataclass(frozen=True, slots=True)
class RunShown:
    """One run's part of the page."""

    row: SummaryRow
    details: RunDetails
    number: int

    @property
    def run(self) -> RunRecord:
        """Its record."""
        return self.row.run

    @property
    def is_open(self) -> bool:
        """What needs attention is open from the beginning."""
        return self.run.verdict is not Verdict.PASS

    @property
    def gates(self) -> list[GateResult]:
        """Those that did not pass first."""
        return sorted(self.run.gates, key=lambda gate: gate.verdict is Verdict.PASS)

    @property
    def square(self) -> list[tuple[str, list[tuple[str, float, str]]]]:
        """The 2 x 2 of weights and prompts: per row its name, and per cell name, mean and interval."""
        found = self.run.attribution
        if found is None:
            return []
        cells = {name: (found.means[name], bounds(found.intervals[name]).strip()) for name in CELLS}
        return [
            (name, [(prompts, *cells[f"{weights}_{key}"]) for prompts, key in _PROMPTS])
            for name, weights in (("base weights", "base"), ("tuned weights", "tuned"))
        ]

    @property
    def prompts(self) -> list[tuple[str, list[tuple[str, str]], str]]:
        """Per predictor its name, what changed in its prompt, and the prompt as it is sent."""
        before = self.details.prompts_before
        return [
            ({"self": "the program"}.get(name, name), folded(changes(before.get(name, ""), text)), text)
            for name, text in self.details.prompts_after.items()
        ]

    @property
    def has_accepted(self) -> bool:
        """Whether examples are compared with the accepted result."""
        return any(row.accepted is not None for row in self.details.examples)

    @property
    def counts(self) -> dict[str, int]:
        """Examples by what a reader filters for."""
        rows = self.details.examples
        return {
            "all": len(rows),
            "worse": sum(row.change == "worse" for row in rows),
            "better": sum(row.change == "better" for row in rows),
            "wrong": sum(row.score is None or row.score < 1 for row in rows),
        }

    @property
    def curve(self) -> Curve | None:
        """The search as a picture; None without one."""
        return curve_of(self.details.trials, start=self.run.validation[0])

    @property
    def phases(self) -> str:
        """What each phase spent, as HTML."""
        return phase_table([self.run], style="html")

    @property
    def bar(self) -> tuple[float, float, float] | None:
        """Interval and score in percent."""
        run = self.run
        if run.score is None or run.interval is None:
            return None
        return 100 * run.interval.low, 100 * run.interval.high, 100 * run.score


_PROMPTS = (("plain prompts", "plain"), ("optimized prompts", "optimized"))


def page_html(runs: Sequence[RunRecord], *, environment: Mapping[str, Any], told: Told) -> str:
    """The page.

    The runs are in the order of the report, their credentials masked already.
    """
    from jinja2 import Environment, PackageLoader, select_autoescape
    from markupsafe import Markup

    def safe(value: Any) -> Any:
        return value if hasattr(value, "__html__") else visible(value) if isinstance(value, str) else value

    jinja = Environment(
        loader=PackageLoader("copa_harness.report", "."),
        autoescape=select_autoescape(default=True, default_for_string=True, enabled_extensions=("jinja",)),
        finalize=safe,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {"number": number, "html": Markup, "hash": _policy_hash}
    shown = []
    for place, row in enumerate(summary_rows(runs), start=1):
        found = next((told.details[i] for i in row.positions if i in told.details), RunDetails())
        shown.append(RunShown(row, found, place))
    return jinja.get_template(TEMPLATE).render(
        shown=shown,
        totals=totals(runs),
        worst=[one for one in shown if one.is_open],
        tables=(*told.tables, *all_tables(runs, style="html")),
        receipt=receipt_table(receipt(runs, trials=told.trials, n_refused=told.n_refused), style="html"),
        environment=environment,
        notes=(*told.remarks, *told.notes),
        width=CURVE_WIDTH,
        height=CURVE_HEIGHT,
    )


def _policy_hash(script: str) -> str:
    """How a content security policy names a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


def curve_of(trials: Sequence[Mapping[str, Any]], *, start: float | None) -> Curve | None:
    """Scores of a search's trials against the examples scored by then.

    Args:
        trials: In their order: `n` examples scored and the mean `score` of each, estimated for dropped ones.
        start: Score of the program as written, on validation.
    """
    points, spent, best = [], 0, start
    line = [(0, start)] if start is not None else []
    for trial in trials:
        spent += trial["n"]
        if trial["score"] is None:
            continue
        dropped = trial["outcome"] != "complete"
        points.append(
            (spent, trial["score"], f"{trial['study']}: {number(trial['score'])}, {trial['outcome']}", dropped)
        )
        if not dropped and (best is None or trial["score"] > best):
            best = trial["score"]
        if best is not None:
            line.append((spent, best))
    if len(points) < 2 or best is None:
        return None
    scores = [score for _, score, _, _ in points] + [score for _, score in line if score is not None]
    low, high = min(scores), max(scores)
    height = (high - low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return round(CURVE_WIDTH * x / spent, 1), round(CURVE_HEIGHT * (1 - (y - low) / height), 1)

    stairs = []
    for index, (x, y) in enumerate(line):
        assert y is not None
        if index:
            stairs.append(place(x, line[index - 1][1] or 0.0))
        stairs.append(place(x, y))
    return Curve(
        dots=tuple((*place(x, y), title, dropped) for x, y, title, dropped in points),
        best=" ".join(f"{x},{y}" for x, y in stairs),
        n=spent,
        low=low,
        high=high,
        text=f"{len(points)} candidates over {spent:,} scored validation examples; the best went from "
        f"{number(start)} to {number(best)}",
    )


def changes(before: str, after: str) -> list[tuple[str, str]]:
    """What became of a text: pieces that are the `same`, `gone` or `new`; by line, and by word where a line changed."""
    if before == after:
        return []
    return _merged(_changes(before.splitlines(keepends=True), after.splitlines(keepends=True), by_word=True))


def folded(pieces: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pieces with all but `CONTEXT` lines on either side of a change folded into a line that says how many."""
    found: list[tuple[str, str]] = []
    for index, (kind, text) in enumerate(pieces):
        lines = text.splitlines(keepends=True)
        head, tail = (CONTEXT if index else 0), (CONTEXT if index < len(pieces) - 1 else 0)
        n_folded = len(lines) - head - tail
        if kind != "same" or n_folded <= CONTEXT:
            found.append((kind, text))
            continue
        found += [("same", "".join(lines[:head])), ("folded", f"[{n_folded} lines as before]\n")]
        found.append(("same", "".join(lines[len(lines) - tail :])))
    return [(kind, text) for kind, text in found if text]


def _changes(before: Sequence[str], after: Sequence[str], *, by_word: bool) -> list[tuple[str, str]]:
    pieces: list[tuple[str, str]] = []
    for kind, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        old, new = "".join(before[i:j]), "".join(after[k:m])
        words = [re.findall(r"\s+|\S+", text) for text in (old, new)]
        if kind == "equal":
            pieces.append(("same", old))
        elif kind == "replace" and by_word and max(map(len, words)) <= MAX_WORDS:
            pieces += _changes(words[0], words[1], by_word=False)
        else:
            pieces += [("gone", old)] if old else []
            pieces += [("new", new)] if new else []
    return pieces


def _merged(pieces: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    merged: list[tuple[str, str]] = []
    for kind, text in pieces:
        if merged and merged[-1][0] == kind:
            merged[-1] = (kind, merged[-1][1] + text)
        else:
            merged.append((kind, text))
    return merged
