"""The one table that everybody sees, and the line of totals: on the terminal, on the pull request, on the page.

    task | strategy | score | to base | to accepted | calls | verdict

Runs alike (two tests may share one optimization) are one row. The base is the program as written on the same model; the
accepted result is what `max_regression` compared with. The receipt says where calls, tokens and dollars went.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from copa_harness.formatting import counted, dollars, duration, number
from copa_harness.report.grouping import by_task, chosen, difference, disambiguated, kind_of
from copa_harness.report.records import RunRecord
from copa_harness.report.rendering import Style, bounds, draw
from copa_harness.results import GateResult, Interval, Usage, Verdict

SEVERITY = (Verdict.PASS, Verdict.NOT_COMPARABLE, Verdict.UNDECIDED, Verdict.ERROR, Verdict.FAIL)
"""From harmless to worst: of several alike runs the worst verdict counts."""


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """One row: a run, or several alike with what they spent together."""

    run: RunRecord
    base: str
    accepted: str
    positions: tuple[int, ...]
    """Of the runs it stands for, among all."""

    @property
    def score(self) -> str:
        """`0.933 [.85, .97]`."""
        return "-" if self.run.score is None else number(self.run.score) + bounds(self.run.interval)


def summary_rows(runs: Sequence[RunRecord]) -> list[SummaryRow]:
    """The rows in the order of the runs; those alike are one."""
    merged: dict[Any, RunRecord] = {}
    positions: dict[Any, list[int]] = {}
    for position, run in enumerate(disambiguated(runs)):
        key = (run.task, run.model, run.split, run.strategy, tuple(run.scores.items()) or id(run))
        if (before := merged.get(key)) is not None:
            gates = (*before.gates, *(gate for gate in run.gates if gate not in before.gates))
            verdict = max(before.verdict, run.verdict, key=SEVERITY.index)
            run = replace(before, usage=before.usage + run.usage, gates=gates, verdict=verdict)
        merged[key] = run
        positions.setdefault(key, []).append(position)
    bases = {
        where: chosen(run for run in group if kind_of(run.strategy) == "baseline")
        for where, group in by_task(runs).items()
    }
    return [
        SummaryRow(run, _to_base(run, bases.get((run.task, run.model))), _to_accepted(run), tuple(positions[key]))
        for key, run in merged.items()
    ]


def _to_base(run: RunRecord, base: RunRecord | None) -> str:
    if base is None or run.split != "test" or kind_of(run.strategy) == "baseline":
        return "-"
    if run.score is None or base.score is None:
        return "-"
    paired = difference(base, run)
    if paired is None:
        return f"{number(run.score - base.score, signed=True)} (unpaired)"
    return number(paired.difference, signed=True) + bounds(paired.interval, signed=True)


def regression_of(run: RunRecord) -> GateResult | None:
    """The answer of the gate that compared a run with its accepted result, if there was something to compare."""
    gates = (gate for gate in run.gates if gate.gate.startswith("max_regression"))
    return next((gate for gate in gates if gate.details.keys() & {"difference", "identical"}), None)


def _to_accepted(run: RunRecord) -> str:
    gate = regression_of(run)
    if gate is None:
        return "-"
    told = gate.details
    if "identical" in told:
        return "identical"
    interval = Interval(told["low"], told["high"]) if "low" in told and "high" in told else None
    text: str = number(told["difference"], signed=True) + bounds(interval, signed=True)
    return text


def summary_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """The table; columns without anything to say are left out."""
    lines = summary_rows(runs)
    if not lines:
        return ""
    models = {row.run.model for row in lines} | {row.run.lm for row in lines if row.run.label}
    priced = any(row.run.usage.usd or row.run.usage.unpriced_calls for row in lines)
    compared = any(row.accepted != "-" for row in lines)
    sliced = any(row.run.worst_slice for row in lines)
    based = any(row.base != "-" for row in lines)
    rows, shown = [], ""
    for row in lines:
        run = row.run
        name = f"{run.task} ({run.split})" if run.split != "test" else run.task
        name = f"{name}, {run.model}" if len(models) > 1 else name
        rows.append(
            [
                "" if name == shown and style == "terminal" else name,
                run.strategy,
                f"{run.n - run.n_failed:,}",
                row.score,
                *([_worst_slice(run)] if sliced else []),
                *([row.base] if based else []),
                *([row.accepted] if compared else []),
                f"{run.usage.paid_calls:,}",
                *([_usd(run.usage)] if priced else []),
                verdict_text(run.verdict) + drift_text(run),
            ]
        )
        shown = name
    headers = [
        "task",
        "strategy",
        "n",
        "score",
        *(["worst slice"] if sliced else []),
        *(["to base"] if based else []),
        *(["to accepted"] if compared else []),
        "calls",
        *(["USD"] if priced else []),
        "verdict",
    ]
    return draw(rows, headers, style=style, n_text=2, last_text=True)


def _worst_slice(run: RunRecord) -> str:
    return "-" if run.worst_slice is None else "{} {:.3f} (n {:,})".format(*run.worst_slice)


def verdict_text(verdict: Verdict) -> str:
    """What is bad stands out without colour."""
    text = str(verdict.value)
    return text if verdict is Verdict.PASS else text.upper()


def drift_text(run: RunRecord) -> str:
    """`, DRIFT` behind a verdict that rests on stored answers which are no longer the model's."""
    return "" if run.drift is None or not run.drift.name else f", {run.drift.name.upper()}"


def drifts_told(runs: Sequence[RunRecord], *, where: str = "") -> list[tuple[str, str]]:
    """What the canaries of runs showed: its name (see `Drift.name`), and in sentences."""
    found = [(run, run.drift) for run in runs if run.drift is not None]
    told = [(drift.name, f"{run.task}, {run.strategy}{where}: {drift.text()}") for run, drift in found]
    return list(dict.fromkeys(told))


def _usd(usage: Usage) -> str:
    return f"{usage.usd:,.4f}" + ("+?" if usage.unpriced_calls else "")


def verdict_counts(runs: Sequence[RunRecord]) -> str:
    """`3 pass, 1 fail, 2 undecided`."""
    counts = {verdict: sum(run.verdict is verdict for run in runs) for verdict in Verdict}
    return ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items() if count)


def spent_by(runs: Sequence[RunRecord]) -> Usage:
    """What all runs spent together."""
    return sum((run.usage for run in runs), Usage())


def totals(runs: Sequence[RunRecord]) -> str:
    """`runs: 21 pass; 5,206 calls paid, 2,528 from the cache; 2,460,332 tokens, 226 training steps, 3 min 55 s`."""
    spent = spent_by(runs)
    parts = [f"{spent.tokens:,} tokens"] if spent.tokens else []
    parts += [f"{spent.train_steps:,} training steps"] if spent.train_steps else []
    parts += [dollars(spent.usd) + ("+?" if spent.unpriced_calls else "")] if spent.usd or spent.unpriced_calls else []
    paid = f"{counted(spent.paid_calls, 'call')} paid, {spent.cached_calls:,} from the cache"
    return f"runs: {verdict_counts(runs) or 'none'}; " + ", ".join([paid, *parts, duration(spent.wall_s)])


# -- the receipt


@dataclass(frozen=True, slots=True)
class ReceiptLine:
    """Where calls, tokens and dollars went; None where nobody counts."""

    what: str
    calls: int | None
    tokens: int | None = None
    usd: float | None = None
    note: str = ""


def receipt(
    runs: Sequence[RunRecord], *, trials: Sequence[Mapping[str, Any]] = (), n_refused: int = 0
) -> list[ReceiptLine]:
    """What was allowed, used, paid, replayed, refused and saved.

    `trials` are what the searches tried, each with `n` examples scored of `n_validation`; `n_refused` evaluations and
    tests were cut short by a ceiling of the session.
    """
    searched = {
        (run.task, run.model, run.strategy, run.budget.calls, run.optimization.charged_calls, run.validation): run
        for run in runs
        if run.optimization is not None and math.isfinite(run.budget.calls) and kind_of(run.strategy) != "baseline"
    }
    planned = sum(int(calls) for _, _, _, calls, _, _ in searched)
    spent = spent_by(runs)
    early = [run.sequential for run in runs if run.sequential is not None]
    raced = sum(max(0, trial["n_validation"] - trial["n"]) for trial in trials if trial["outcome"] == "dropped")
    lines = [
        ReceiptLine("planned", planned, note="ceilings of the searches, in distinct requests"),
        ReceiptLine(
            "used by the searches", sum(key[4] for key in searched), note="distinct requests, paid or replayed"
        ),
        ReceiptLine("paid", spent.paid_calls, spent.tokens, spent.usd, "searches, evaluations, metrics"),
        ReceiptLine("from the cache", spent.cached_calls, note="replayed, free"),
        ReceiptLine("failed", spent.failed_calls, note="answered with an error"),
        ReceiptLine("refused", n_refused, note="evaluations or tests cut short by the session's ceilings"),
        ReceiptLine("saved by racing", raced, note="examples that hopeless candidates were not asked"),
        ReceiptLine(
            "saved by stopping early",
            sum(one.n_saved for one in early),
            usd=sum(one.usd_saved or 0.0 for one in early),
            note="test examples (--copa-sequential)",
        ),
    ]
    return [line for line in lines if line.calls or line.what in ("paid", "from the cache", "refused")]


def receipt_table(lines: Sequence[ReceiptLine], *, style: Style = "terminal") -> str:
    """The receipt, drawn."""
    priced = any(line.usd for line in lines)
    rows = [
        [
            line.what,
            "-" if line.calls is None else f"{line.calls:,}",
            "-" if line.tokens is None else f"{line.tokens:,}",
            *(["-" if line.usd is None else f"{line.usd:,.4f}"] if priced else []),
            line.note,
        ]
        for line in lines
    ]
    headers = ["receipt", "calls", "tokens", *(["USD"] if priced else []), "of what"]
    return draw(rows, headers, style=style, n_text=1, last_text=True, wrap=False)
