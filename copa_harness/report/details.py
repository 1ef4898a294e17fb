"""Tables that tell more: attribution, ranked strategies, unstable examples, rows saved, and what speaks for a search.

What an optimization learned (credit, evidence) is about its validation examples, in numbers the optimizer
made; the others are about the test split. Only the ranking is computed here, from the scores. Each function returns
text without a final newline, or "" when no run has anything to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from copa_harness.formatting import number, probability_cell
from copa_harness.judge.attribution import CELLS, EFFECTS
from copa_harness.judge.flaky import FlakyReport, flaky_report
from copa_harness.judge.paired_tests import PairedDifference
from copa_harness.judge.ranking import compare_strategies
from copa_harness.report.grouping import by_task, chosen, deduplicated, disambiguated, distinct, from_optimization
from copa_harness.report.records import RunRecord
from copa_harness.report.rendering import Style, bounds, draw, opening, table, with_notes
from copa_harness.results import Interval

MAX_FLAKY_SHOWN = 10
"""Unstable examples shown per run; latest.json has all repeats."""


_CELL_NAMES = {
    "base_plain": "base, plain prompts",
    "base_optimized": "base, optimized",
    "tuned_plain": "tuned, plain prompts",
    "tuned_optimized": "tuned, optimized",
}

_EFFECT_NAMES = {
    "prompts": "prompts alone",
    "weights": "weights alone",
    "both": "both together",
    "prompts_on_tuned": "prompts on tuned",
    "weights_on_optimized": "weights on optimized",
    "interaction": "beyond their sum",
}


def attribution_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """The 2 x 2 of weights and prompts of every run that measured it, with gains and their interaction."""
    rows: list[list[str]] = []
    notes = ["base or tuned weights with plain or optimized prompts: mean score, then gains, paired by example"]
    for run, found in deduplicated(runs, lambda run: run.attribution):
        lines = [
            (_CELL_NAMES[name], *_cell(found.means[name], found.intervals[name], signed=False), "") for name in CELLS
        ]
        for name in EFFECTS:
            effect: PairedDifference = getattr(found, name)
            cell = _cell(effect.difference, effect.interval, signed=True)
            lines.append((_EFFECT_NAMES[name], *cell, probability_cell(effect.p_value)))
        for index, line in enumerate(lines):
            where = opening(index, run.task, run.strategy, f"{found.n:,}")
            rows.append([*where[:2], line[0], where[2], *line[1:]])
        notes.append(f"{run.task}, {run.strategy}: {found.sentence()}")
    titles = "task|strategy|system or gain|n|score or gain|95 % interval|p"
    return table(rows, titles, *notes, style=style, n_text=3)


def ranking_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """Strategies over the tasks all of them have run: score, Holm-corrected difference, cost; "" under two.

    They are compared with the program as written, or without runs of it with the first strategy seen.
    """
    rows: list[list[str]] = []
    notes: list[str] = []
    repeated = any(new is not run for new, run in zip(disambiguated(runs), runs, strict=True))
    anchors: set[str] = set()
    models = list(dict.fromkeys(run.model for run in runs if run.split == "test"))
    for model in models:
        best = _best_runs([run for run in runs if run.model == model])
        complete = _same_tasks(best)
        if len(complete) < 2:
            continue
        anchor = "none" if "none" in complete else next(iter(complete))
        scores = {name: {task: run.scores for task, run in tasks.items()} for name, tasks in complete.items()}
        try:
            comparison = compare_strategies(scores, reference=anchor, groups=_groups(complete))
        except ValueError:  # the runs have no example in common: nothing to rank
            continue
        anchors.add(anchor)
        for index, row in enumerate(comparison.rows):
            spent = complete[row.strategy].values()
            is_anchor = row.strategy == anchor
            rows.append(
                [
                    model if index == 0 else "",
                    row.strategy,
                    f"{len(comparison.tasks):,}",
                    f"{comparison.n:,}",
                    number(row.score),
                    "-" if is_anchor else number(row.difference, signed=True) + bounds(row.interval, signed=True),
                    "-" if is_anchor else probability_cell(row.adjusted),
                    f"{sum(run.usage.paid_calls + run.usage.cached_calls for run in spent):,}",
                    f"{sum(run.usage.usd for run in spent):,.4f}",
                ]
            )
        notes.append(comparison.sentence() if len(models) == 1 else f"{model}: {comparison.sentence()}")
    if not rows:
        return ""
    against = anchors.pop() if len(anchors) == 1 else "the row without one"
    titles = f"model|strategy|tasks|n|score|difference to {against}|p (Holm)|calls|USD"
    notes.insert(
        0,
        "differences paired by example, every task counting the same [95 % interval of each alone]; "
        "p corrected for the number of strategies",
    )
    if repeated:
        notes.insert(1, "of several runs of a strategy on a task, that with the best validation score stands for it")
    return table(rows, titles, *notes, style=style, n_text=2)


def flaky_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """Examples that passed some repeats and failed others, nearest to a coin flip first, per run with repeats."""
    rows: list[list[str]] = []
    notes: list[str] = []
    for run in runs:
        report = _flaky(run)
        if report is None:
            continue
        for index, row in enumerate(report.flaky[:MAX_FLAKY_SHOWN]):
            told = [row.example_id, f"{row.n_passed} of {row.k}", f"{row.pass_rate:.2f}"]
            rows.append([*opening(index, run.task, run.strategy), *told])
        more = len(report.flaky) - MAX_FLAKY_SHOWN
        rest = f" ({more} more not shown)" if more > 0 else ""
        notes.append(
            f"{run.task}, {run.strategy}: {report.n_pass_all} of {report.n} passed all {report.k} repeats"
            f"{bounds(report.pass_all_interval)}, {report.n_pass_none} none, {len(report.flaky)} some{rest}. "
            f"{report.advice}"
        )
    if not notes:
        return ""
    headers = ["task", "strategy", "example", "passed", "pass rate"]
    return with_notes(draw(rows, headers, style=style, n_text=3) if rows else "", notes, style=style)


def sequential_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """Rows and dollars saved by stopping early, per run in sequential mode."""
    rows = []
    n_used = n_total = 0
    for run in runs:
        if run.sequential is None:
            continue
        found = run.sequential
        used, total = found.n_used, found.n_total
        n_used, n_total = n_used + used, n_total + total
        saved = f"{total - used:,} ({100 * (total - used) / total:.0f} %)" if total else "-"
        dollars = "-" if found.usd_saved is None else f"{found.usd_saved:,.4f}"
        counts = [f"{total:,}", f"{used:,}", saved, dollars]
        rows.append([run.task, run.strategy, *counts, number(run.score), run.verdict.value])
    titles = "task|strategy|n|used|saved|USD saved|score so far|verdict"
    notes = ["a score so far is of the rows used: judge by the verdict, and run all rows for the exact number"]
    if n_total:
        notes.append(f"in all {n_total - n_used:,} of {n_total:,} rows saved ({100 * (1 - n_used / n_total):.0f} %)")
    return table(rows, titles, *notes, style=style, n_text=2, last_text=True)


def _groups(by_strategy: Mapping[str, Mapping[str, RunRecord]]) -> dict[str, Mapping[str, str]]:
    """Task -> example id -> group, of all runs together."""
    groups: dict[str, Mapping[str, str]] = {}
    for tasks in by_strategy.values():
        for task, run in tasks.items():
            groups[task] = {**groups.get(task, {}), **run.groups}
    return groups


def _flaky(run: RunRecord) -> FlakyReport | None:
    """The report of a run whose examples were repeated; None otherwise."""
    if not run.repeats or min(len(scores) for scores in run.repeats.values()) < 2:
        return None
    return flaky_report(run.repeats)


def _best_runs(runs: Sequence[RunRecord]) -> dict[str, dict[str, RunRecord]]:
    """Strategy -> task -> the run that stands for it."""
    best: dict[str, dict[str, RunRecord]] = {}
    for (task, _), group in by_task(runs).items():
        for strategy in distinct(group):
            run = chosen(run for run in group if run.strategy == strategy)
            if run is not None and run.scores:
                best.setdefault(strategy, {})[task] = run
    return best


def _same_tasks(best: Mapping[str, Mapping[str, RunRecord]]) -> dict[str, Mapping[str, RunRecord]]:
    """The strategies that have run every task at least two of them have run: only those can be ranked together.

    When that leaves fewer than two, all of them: they are then ranked on the tasks they have in common.
    """
    counts = Counter(task for by_name in best.values() for task in by_name)
    shared = {task for task, count in counts.items() if count > 1}
    complete = {name: by_name for name, by_name in best.items() if shared and by_name.keys() >= shared}
    return complete if len(complete) > 1 else dict(best)


def _cell(value: float, interval: Interval, *, signed: bool) -> tuple[str, str]:
    return number(value, signed=signed), bounds(interval, signed=signed).strip()


def credit_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """Who earned it: the gain of every part of every stage of the programs that optimizations ended on."""
    rows: list[list[str]] = []
    for run, credit in deduplicated(runs, from_optimization("credit")):
        parts = [*credit["parts"], {"predictor": "", "part": "all parts", "method": "measured", **credit["total"]}]
        for index, part in enumerate(parts):
            rows.append(
                [
                    *opening(index, run.task, run.strategy),
                    "" if part["part"] == "all parts" else _stage(part["predictor"]),
                    part["part"],
                    f"{credit['n']:,}" if index == 0 else "",
                    number(part["gain"], signed=True),
                    part["method"],
                ]
            )
    titles = "task|strategy|stage|part|n|gain|by"
    notes = ["gains over the program as written on the validation examples the winner was chosen on, paired by example"]
    if any(row[-1] == "Shapley value" for row in rows):
        notes.append("Shapley values share what parts gain together, and add up to the whole gain")
    if any(row[-1] == "leave one out" for row in rows):
        notes.append("leave one out: what is lost with that part alone as it was; together parts may gain more or less")
    return table(rows, titles, *notes, style=style, n_text=4, last_text=True)


def evidence_table(runs: Sequence[RunRecord], *, style: Style = "terminal") -> str:
    """What speaks for each result against the program as written, paired by example, and what was returned."""
    told = deduplicated(runs, from_optimization("evidence"))
    rows: list[list[str]] = []
    for run, found in told:
        interval = bounds(Interval(found.low, found.high), signed=True).strip()
        returned = "the result" if found.adopted else "the program as written"
        rows.append(
            [
                run.task,
                run.strategy,
                f"{found.n:,} {'unseen' if found.unseen else 'validation'}",
                f"{found.n_tried:,}",
                f"{found.gained:,}",
                f"{found.lost:,}",
                number(found.difference, signed=True),
                interval,
                probability_cell(found.p_value),
                returned if found.tested else f"{returned}, no test",
            ]
        )
    titles = "task|strategy|rows|scored|better|worse|difference|95 % interval|p|returned"
    notes = ["p: one-sided, paired, corrected for the candidates with a full score among which the result was chosen"]
    if any(found.unseen for _, found in told):
        notes.append("unseen: validation rows held back from the search")
    if not all(found.unseen for _, found in told):
        notes.append(
            "validation: the rows that chose the result; difference and interval flatter it, and p does not count the "
            "candidates a race dropped: where nothing is better, p is 0.2 or less in about half of the searches"
        )
    if not all(found.tested for _, found in told):
        notes.append("no test: DSPy's optimizers alone, adoption_p = 1, or a cheaper program that was preferred")
    notes.extend(f"{run.task}, {run.strategy}: {found.why}" for run, found in told if found.why)
    return table(rows, titles, *notes, style=style, n_text=3, last_text=True)


def _stage(predictor: str) -> str:
    return {"": "all stages", "self": "the program"}.get(predictor, predictor)
