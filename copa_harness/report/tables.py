"""The tables of the terminal summary and of the page: what weights and prompts gained, what it cost, how it ended.

Numbers stand right-aligned with their unit in the header, beside every mean stand n and its interval, differences are
signed, and a missing value is '-'. Each function returns text without a final newline, or "" when it has no rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from copa_harness.formatting import number
from copa_harness.report.details import (
    attribution_table,
    credit_table,
    evidence_table,
    flaky_table,
    ranking_table,
    sequential_table,
)
from copa_harness.report.grouping import (
    Kind,
    by_task,
    chosen,
    deduplicated,
    difference,
    disambiguated,
    distinct,
    from_optimization,
    kind_of,
)
from copa_harness.report.records import RunRecord
from copa_harness.report.rendering import Style, bounds, opening, table
from copa_harness.results import FrontProgram, PhaseRecord, Usage


def ending_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """Why every optimization ended; "" without one."""
    rows = []
    for run, ending in deduplicated(runs, from_optimization("ending")):
        ceiling = "" if math.isinf(run.budget.calls) else f" of {run.budget.calls:,.0f}"
        rows.append([run.task, run.strategy, f"{ending.n_trials:,}", f"{ending.calls:,}{ceiling}", ending.reason])
    return table(rows, "task|strategy|candidates|calls|ended by", style=style, n_text=2, last_text=True)


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
    for run, front in deduplicated(runs, from_optimization("front")):
        for index, program in enumerate(front):
            where = opening(index, run.task, run.strategy)
            costs = [_answer_cost(program, key, form) for _, key, form in _COSTS]
            chosen = "returned" if program.returned else ""
            rows.append([*where, number(program.score), *costs, str(program.n_demos), chosen])
    titles = f"task|strategy|score|{'|'.join(name for name, _, _ in _COSTS)}|demos|"
    note = (
        "programs of which none is both better and cheaper than another, cheapest first; on validation; per answer, "
        "all calls of it together, as they were when they were bought"
    )
    return table(rows, titles, note, style=style, n_text=2, last_text=True)


def story_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """What every optimization did, in its own words; in the terminal nothing, since it was told while it ran."""
    if style == "terminal":
        return ""
    rows = [
        [*opening(index, run.task, run.strategy), note]
        for run, notes in deduplicated(runs, from_optimization("notes"))
        for index, note in enumerate(notes)
    ]
    return table(rows, "task|strategy|what it did", style=style, n_text=3)


def _answer_cost(program: FrontProgram, key: str, form: str) -> str:
    value = getattr(program, key)
    return "-" if value is None else form.format(value)


_CELLS: tuple[tuple[str, Kind], ...] = (
    ("baseline", "baseline"),
    ("weights only", "weights"),
    ("prompts only", "prompts"),
    ("COPA", "joint"),
)


def copa_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """What weights, prompts and both together gain, one row per task and model, on the test split."""
    rows, joint_strategies = [], {}
    for (task, model), group in by_task(runs).items():
        cells = {kind: chosen(run for run in group if kind_of(run.strategy) == kind) for _, kind in _CELLS}
        shown = [run for run in cells.values() if run is not None]
        if not shown:
            continue
        n = max(_n_scored(run) for run in shown)
        joint, baseline = cells["joint"], cells["baseline"]
        if joint is not None:
            joint_strategies[f"{task} {model}"] = joint.strategy
        gain = _difference(baseline, joint) if joint is not None and baseline is not None else "-"
        rows.append([task, model, f"{n:,}", *(_mean(cells[kind], n) for _, kind in _CELLS), gain])
    titles = f"task|model|n|{'|'.join(name for name, _ in _CELLS)}|improvement"
    notes = ["mean score on the test split [95 % interval]; improvement = COPA - baseline, paired by example"]
    strategies = list(dict.fromkeys(joint_strategies.values()))
    if len(strategies) == 1:
        notes.append(f"COPA = {strategies[0]}")
    elif strategies:
        each = ", ".join(f"{where}: {strategy}" for where, strategy in joint_strategies.items())
        notes.append(f"COPA = the joint strategy with the best validation score ({each})")
    return table(rows, titles, *notes, style=style, n_text=2)


def phase_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """What every phase of every run spent and did to the score, with a total per run and over all."""
    rows, spent = [], Usage()
    priced = any(run.usage.usd or run.usage.unpriced_calls for run in runs)
    for run in runs:
        lines = [_phase_cells(phase.phase, phase.usage, _change(phase), priced=priced) for phase in run.phases]
        outside = _outside(run)
        if outside is not None:
            lines.append(_phase_cells("other" if lines else "all", outside, "", priced=priced))
        if len(lines) > 1:
            change = _change(PhaseRecord("", Usage(), *run.validation))
            lines.append(_phase_cells("total", run.usage, change, priced=priced))
        for index, line in enumerate(lines):
            rows.append([*opening(index, run.task, run.strategy), *line])
        spent += run.usage
    if len(runs) > 1 and rows:
        rows.append(["all runs", "", *_phase_cells("", spent, "", priced=priced)])
    titles = "task|strategy|phase|paid calls|cached|tokens|train steps|seconds|" + "USD|" * priced
    notes = [*_counting(spent), *_unknown(spent)]
    return table(rows, f"{titles}score before -> after", *notes, style=style, n_text=3)


def _counting(spent: Usage) -> list[str]:
    """Why the calls of the phases may add up to more than what a budget was charged."""
    if not spent.cached_calls:
        return []
    return [
        "cached: every answer from the cache, also to a request that was made before; a budget counts distinct "
        "requests of the optimization alone, so phases may add up to more"
    ]


def _unknown(spent: Usage) -> list[str]:
    """What `+?` means in this table."""
    notes = []
    if spent.estimated_calls:
        notes.append(
            f"+? tokens: {spent.estimated_calls:,} calls told no usable number of tokens (or never how they ended); "
            "each is booked as what was reserved for it: its worst case under a ceiling on tokens or dollars, else none"
        )
    if spent.unpriced_calls:
        notes.append(
            f"+? USD: what {spent.unpriced_calls:,} of the paid calls cost is not known (no price, or no tokens told)"
        )
    return notes


def compare_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """Strategies side by side, one row each, per task and model; "" unless some task has at least two."""
    rows, budgets = [], set()
    for (task, model), group in by_task(disambiguated(runs)).items():
        strategies = distinct(group)
        if len(strategies) < 2:
            continue
        best = {name: chosen(r for r in group if r.strategy == name) or _last(group, name) for name in strategies}
        anchor = best.get("none")
        ordered = sorted(best.values(), key=lambda run: (run.strategy != "none", -_sortable(run.score)))
        for index, run in enumerate(ordered):
            if run.strategy != "none" and not math.isinf(run.budget.calls):
                budgets.add(f"{run.budget.name} ({run.budget.calls:,.0f} calls)")
            against = "-" if anchor is None or run is anchor else _difference(anchor, run)
            rows.append(
                [
                    *opening(index, task, model),
                    run.strategy,
                    f"{_n_scored(run):,}",
                    _mean(run, _n_scored(run)),
                    against,
                    *_cost(run.usage),
                    run.verdict.value,
                ]
            )
    titles = "task|model|strategy|n|score|difference to none|paid calls|cached|seconds|verdict"
    notes = ["mean score on the test split [95 % interval]; differences paired by example"]
    if len(budgets) == 1:
        notes.append(f"equal budget: {budgets.pop()} to optimize; evaluations on the test split come on top")
    elif budgets:
        notes.append(f"budgets differ, so costs are not comparable: {', '.join(sorted(budgets))}")
    return table(rows, titles, *notes, style=style, n_text=3, last_text=True)


def failure_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """Answers that did not parse and examples without a score, for the runs that have any."""
    columns = _failure_columns(runs)
    rows = [
        [run.task, run.strategy, run.split, f"{run.n:,}", *(f"{getattr(run, name):,}" for name, _ in columns)]
        for run in runs
        if any(getattr(run, name) for name, _ in columns)
    ]
    titles = "|".join(["task|strategy|split|n", *(header for _, header in columns)])
    return table(rows, titles, style=style, n_text=3)


def all_tables(runs: Sequence[RunRecord], *, style: Style = "terminal") -> tuple[tuple[str, str], ...]:
    """Every table that has something to say, as (title, text).

    Strategies are compared when some task has one that the first table has no column for, or several for one column.
    Several runs of one strategy are told apart (see `disambiguated`).
    """
    every, runs = runs, disambiguated(runs)
    repeated = {run.strategy for run, before in zip(runs, every, strict=True) if run is not before}
    crowded = [
        run
        for group in by_task(runs).values()
        if any(kind_of(name) == "other" or name in repeated for name in distinct(group))
        or len(distinct(group)) > len(_CELLS)
        for run in group
    ]
    tasks = {(run.task, run.model) for run in crowded}
    drawn = (
        ("weights, prompts, and both", copa_table(every, style=style)),
        ("what weights and prompts gained", attribution_table(runs, style=style)),
        ("who earned it", credit_table(runs, style=style)),
        ("score and cost", front_table(runs, style=style)),
        ("strategies compared", compare_table(crowded, style=style)),
        ("strategies ranked", ranking_table([run for run in every if (run.task, run.model) in tasks], style=style)),
        ("unstable examples", flaky_table(runs, style=style)),
        ("saved by stopping early", sequential_table(runs, style=style)),
        ("how the searches ended", ending_table(runs, style=style)),
        ("whether the result is better than the program as written, on validation", evidence_table(runs, style=style)),
        ("what the optimizations did", story_table(runs, style=style)),
        ("what it cost", phase_table(runs, style=style)),
        ("answers without a usable result", failure_table(runs, style=style)),
    )
    return tuple((title, text) for title, text in drawn if text)


def _n_scored(run: RunRecord) -> int:
    return run.n - run.n_failed


def _mean(run: RunRecord | None, n: int) -> str:
    """`0.933 [.85, .97]`, with `n=` only where it is not the row's."""
    if run is None or run.score is None:
        return "-"
    own = "" if _n_scored(run) == n else f" n={_n_scored(run):,}"
    return f"{number(run.score)}{bounds(run.interval)}{own}"


def _difference(before: RunRecord, after: RunRecord) -> str:
    """`+0.160 [+.05, +.27]`; without an interval where the examples are not the same,
    with `n=` where some have no score.
    """
    if before.score is None or after.score is None:
        return "-"
    paired = difference(before, after)
    if paired is None:
        return f"{number(after.score - before.score, signed=True)} (unpaired)"
    partly = f" n={paired.n:,}" if paired.n < max(before.n, after.n) else ""
    return f"{number(paired.difference, signed=True)}{bounds(paired.interval, signed=True)}{partly}"


def _change(phase: PhaseRecord) -> str:
    """`0.600 -> 0.800 +0.200`: what the phase did to the validation score, and its gain."""
    if phase.score_before is None and phase.score_after is None:
        return "-"
    if phase.score_before is None or phase.score_after is None:
        return number(phase.score_after)
    gain = number(phase.score_after - phase.score_before, signed=True)
    return f"{number(phase.score_before)} -> {number(phase.score_after)} {gain}"


def _phase_cells(name: str, usage: Usage, change: str, *, priced: bool) -> list[str]:
    calls = f"{usage.paid_calls:,}", f"{usage.cached_calls:,}"
    tokens = f"{usage.tokens:,}" + ("+?" if usage.estimated_calls else "")
    dollars = [f"{usage.usd:,.4f}" + ("+?" if usage.unpriced_calls else "")] if priced else []
    return [name, *calls, tokens, f"{usage.train_steps:,}", f"{usage.wall_s:,.1f}", *dollars, change]


def _cost(usage: Usage) -> list[str]:
    return [f"{usage.paid_calls:,}", f"{usage.cached_calls:,}", f"{usage.wall_s:,.1f}"]


def _outside(run: RunRecord) -> Usage | None:
    """What the run spent in no phase; None when the phases explain everything."""
    rest = run.usage - sum((phase.usage for phase in run.phases), Usage())
    rest = replace(rest, usd=max(0.0, rest.usd), wall_s=max(0.0, rest.wall_s))
    counted = (rest.paid_calls, rest.cached_calls, rest.tokens, rest.train_steps)
    return rest if any(count > 0 for count in counted) else None


def _failure_columns(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    columns = (
        ("n_unparsed", "unparsed"),
        ("n_provider_errors", "provider errors"),
        ("n_metric_errors", "metric errors"),
    )
    return [(name, header) for name, header in columns if any(getattr(run, name) for run in runs)]


def _last(group: Sequence[RunRecord], strategy: str) -> RunRecord:
    return [run for run in group if run.strategy == strategy][-1]


def _sortable(score: float | None) -> float:
    return -math.inf if score is None else score
