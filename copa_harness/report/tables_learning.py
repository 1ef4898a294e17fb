"""Tables of what an optimization learned: which part of which stage earned the gain, and which proposals paid.

Each function returns text without a final newline, or "" when no run has anything to say. Numbers come from the
records as the optimizer made them, on its validation examples. Knows nothing of files or pytest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from copa_harness.judge.messages import number
from copa_harness.report.grouping import told_once
from copa_harness.report.records import RunRecord
from copa_harness.report.tables_drawing import Style, bounds, draw, with_notes
from copa_harness.results import Interval

TERMINAL_ARMS = 2
"""Arms shown per family and run in the terminal, the best first; latest.md shows all."""


def credit_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """Who earned it: the gain of every part of every stage of the programs that optimizations ended on."""
    rows: list[list[str]] = []
    for run in told_once(runs, "credit"):
        credit: Mapping[str, Any] = run.credit
        parts = [*credit["parts"], {"predictor": "", "part": "all parts", "method": "measured", **credit["total"]}]
        for index, part in enumerate(parts):
            where = [run.task, run.strategy] if index == 0 else ["", ""]
            rows.append(
                [
                    *where,
                    "" if part["part"] == "all parts" else _stage(part["predictor"]),
                    part["part"],
                    f"{credit['n']:,}" if index == 0 else "",
                    *_gain(part),
                    part["method"],
                ]
            )
    if not rows:
        return ""
    headers = ["task", "strategy", "stage", "part", "n", "gain", "95 % interval", "by"]
    notes = ["gains over the program as written on the validation examples the winner was chosen on, paired by example"]
    if any(row[-1] == "Shapley value" for row in rows):
        notes.append("Shapley values share what parts gain together, and add up to the whole gain")
    if any(row[-1] == "leave one out" for row in rows):
        notes.append("leave one out: what is lost with that part alone as it was; together parts may gain more or less")
    if any(row[-1].endswith(" trials") for row in rows):
        notes.append("n trials: estimated from the search's own trials of this kind of setting, by regression")
    return with_notes(draw(rows, headers, style=style, n_text=4, last_text=True), notes, style=style)


def evidence_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """What speaks for each result against the program as written, paired by example, and what was returned."""
    told = told_once(runs, "evidence")
    rows: list[list[str]] = []
    for run in told:
        found: Mapping[str, Any] = run.evidence
        interval = bounds(Interval(found["low"], found["high"]), signed=True).strip()
        returned = "the result" if found["adopted"] else "the program as written"
        rows.append(
            [run.task, run.strategy, f"{found['n']:,} {'unseen' if found['unseen'] else 'validation'}",
             f"{found['n_tried']:,}", f"{found['gained']:,}", f"{found['lost']:,}",
             number(found["difference"], signed=True), interval, f"{found['p_value']:.3g}",
             returned if found["tested"] else f"{returned}, no test"]
        )  # fmt: skip
    if not rows:
        return ""
    headers = ["task", "strategy", "rows", "scored", "better", "worse", "difference", "95 % interval", "p",
               "returned"]  # fmt: skip
    notes = ["p: one-sided, paired, corrected for the candidates with a full score among which the result was chosen"]
    if any(run.evidence["unseen"] for run in told):
        notes.append("unseen: validation rows held back from the search")
    if not all(run.evidence["unseen"] for run in told):
        notes.append("validation: the rows that chose the result; difference and interval flatter it")
    if not all(run.evidence["tested"] for run in told):
        notes.append("no test: DSPy's optimizers alone, adoption_p = 1, or a cheaper program that was preferred")
    notes.extend(f"{run.task}, {run.strategy}: {run.evidence['why']}" for run in told if run.evidence["why"])
    return with_notes(draw(rows, headers, style=style, n_text=3, last_text=True), notes, style=style)


def learned_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """What every optimization learned about its proposals: how often an arm was tried, and what it gained."""
    rows: list[list[str]] = []
    for run in told_once(runs, "learned"):
        shown: dict[str, int] = {}
        first = True
        for arm in run.learned:
            shown[arm["family"]] = shown.get(arm["family"], 0) + 1
            if style == "terminal" and shown[arm["family"]] > TERMINAL_ARMS:
                continue
            where = [run.task, run.strategy] if first else ["", ""]
            offered = f"{arm['offered']:,}" if arm["offered"] else "-"
            rows.append(
                [*where, arm["family"], arm["arm"], offered, f"{arm['tries']:,}",
                 number(arm["mean_gain"], signed=True), *_gain(arm)]
            )  # fmt: skip
            first = False
    if not rows:
        return ""
    headers = ["task", "strategy", "choice", "arm", "proposed", "tried", "mean gain", "own gain", "95 % interval"]
    notes = [
        "gain of the trials that used the arm over the incumbent their study began with, on validation; own gain: the "
        "arm's share of it, by Bayesian regression [95 % credible interval], which decides what is proposed next"
    ]
    return with_notes(draw(rows, headers, style=style, n_text=4), notes, style=style)


def _stage(predictor: str) -> str:
    return {"": "all stages", "self": "the program"}.get(predictor, predictor)


def _gain(row: Mapping[str, Any]) -> tuple[str, str]:
    if row["gain"] is None:
        return "-", "-"
    return number(row["gain"], signed=True), bounds(Interval(row["low"], row["high"]), signed=True).strip()
