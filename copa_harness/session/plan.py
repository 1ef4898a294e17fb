"""A plan of a run: what it would pay, told from the cache alone. No call is made and nothing is trained.

An evaluation is run against the stored answers; what is missing is counted at the most it can cost. A search adapts to
answers, so one that is not finished on disk can only be bounded by its ceilings; its calls are priced like those of the
evaluation of the program as written. Where a run will be compared with a baseline, the plan also says what its rows can
decide (`power_told`), before anybody pays for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from copa_harness.formatting import counted, dollars, number
from copa_harness.results import Phase
from copa_harness.session.evaluation import searches_both, split_of
from copa_harness.session.options import Settings
from copa_harness.session.violations import perturbations_of

if TYPE_CHECKING:
    import dspy

    from copa_harness.lm.call_context import DryRun
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.session.optimizations import Optimized
    from copa_harness.tasks.task import Task


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One step of a run.

    Attributes:
        task: The task's name.
        what: The step.
        calls: Calls to pay at most.
        cached: Calls whose answers are stored.
        tokens: Tokens to pay at most; None when nobody knows.
        usd: Dollars to pay at most; None when nobody knows.
        key: Equal for steps that two tests share and only one of them pays for.
        each: Tokens and dollars that one call of this kind may take, cached ones included; None when nobody knows.
        note: What its rows can decide.
    """

    task: str
    what: str
    calls: float
    cached: int
    tokens: float | None
    usd: float | None
    key: str
    each: tuple[float, float] | None = None
    note: str = ""


def plan_evaluation(
    task: Task, program: dspy.Module, lm: MeteredLM, *, split: str, settings: Settings, what: str, key: str
) -> PlanLine:
    """What running a program over a split would pay."""
    from copa_harness.evaluate.runner import run_examples
    from copa_harness.lm.call_context import dry_run, in_context, open_scope, repeated

    asking = in_context(json_fallback=settings.json_fallback)
    with open_scope(f"{task.name}: plan"), asking, dry_run() as plan:
        for number in range(settings.repeat):
            with repeated(number):
                run_examples(
                    program,
                    split_of(task, split),
                    metric=task.metric,
                    split=split,
                    lm=lm,
                    phase=Phase.EVALUATE,
                    threads=settings.threads,
                )
    return _line(task, what, plan, key)


def plan_run(
    task: Task, finished: Optimized | None, lm: MeteredLM, *, strategy: str, settings: Settings, key: str
) -> list[PlanLine]:
    """What optimizing and judging would pay, step by step.

    `finished` is the optimization, if it was made before; `key` names task and model.
    """
    what = "program as written, test split"
    plain = plan_evaluation(task, task.program, lm, split="test", settings=settings, what=what, key=f"{key} none")
    plain = replace(plain, note=_power_note(task, plain, settings))
    forms = _asked_again(task, plain, settings, key=f"{key} {strategy} {settings.seed}")
    if strategy == "none":
        return [plain, *forms]
    if finished is not None:
        n_asked = finished.result.charged_calls
        return [
            plain,
            PlanLine(task.name, f"search {strategy} (finished earlier)", 0, n_asked, 0, 0.0, finished.key),
            plan_evaluation(
                task,
                finished.program,
                finished.lm,
                split="test",
                settings=settings,
                what=f"{strategy}, test split",
                key=f"{finished.key} test",
            ),
            *forms,
        ]
    budget = settings.budget
    n_more = 3 if searches_both(strategy) else 1
    later = _scaled(plain, n_more * (plain.calls + plain.cached))
    search = _scaled(plain, budget.calls)
    return [
        plain,
        PlanLine(
            task.name,
            f"search {strategy} (at most, by its budget)",
            budget.calls,
            0,
            _least(search.tokens, budget.tokens),
            _least(search.usd, budget.usd),
            f"{key} {strategy} {budget.name} {settings.seed}",
        ),
        PlanLine(
            task.name,
            f"{strategy}, test split" + (", with attribution" if n_more > 1 else ""),
            later.calls,
            0,
            later.tokens,
            later.usd,
            f"{key} {strategy} {budget.name} {settings.seed} test",
        ),
        *forms,
    ]


def _asked_again(task: Task, plain: PlanLine, settings: Settings, *, key: str) -> list[PlanLine]:
    """What canaries, asked twice, and `max_violation_rate` may take: every row in every form, and shrinking."""
    from copa_harness.robustness.strategies import MAX_TRIES

    n_rows, n_evaluation = len(task.testset), plain.calls + plain.cached
    asked = {"canaries, stored answers asked for again": 2 * n_evaluation * min(settings.canaries, n_rows) / n_rows}
    if settings.gates.get("max_violation_rate") is not None:
        forms = n_evaluation * len(perturbations_of(settings)) + MAX_TRIES * n_evaluation / n_rows
        asked["changed forms of the test split"] = forms
    bounds = {what: _scaled(plain, math.ceil(n_asked)) for what, n_asked in asked.items() if n_asked}
    return [replace(bound, what=f"{what} (at most)", key=f"{key} {what}") for what, bound in bounds.items()]


def plan_text(lines: Sequence[PlanLine]) -> str:
    """A table of the steps with a total per task and over all; steps that tests share are counted once."""
    from copa_harness.report.rendering import draw, with_notes

    distinct = list({line.key: line for line in lines}.values())
    rows = []
    for task in dict.fromkeys(line.task for line in distinct):
        own = [line for line in distinct if line.task == task]
        rows += [[task if index == 0 else "", line.what, *_cells(line)] for index, line in enumerate(own)]
        if len(own) > 1:
            rows.append(["", "total", *_cells(_total(own))])
    rows.append(["all", "", *_cells(_total(distinct))])
    headers = ["task", "step", "calls to pay", "cached", "tokens", "dollars"]
    note = "at most; a step after one that is missing is priced like the program as written; ? = no bound is known"
    notes = [note, *dict.fromkeys(line.note for line in lines if line.note)]
    lines_drawn = draw(rows, headers, style="terminal", n_text=2, wrap=False).splitlines()
    return with_notes("\n".join(line[1:] for line in lines_drawn), notes, style="terminal")


DISAGREEMENTS = (0.1, 0.2)
"""Share of answers in which two runs differ, where nobody has measured it: real models' lie about here."""


def power_told(
    n: int,
    *,
    margin: float,
    family: int = 1,
    disagreements: Sequence[float] = DISAGREEMENTS,
    usd_per_row: float | None = None,
) -> tuple[str, list[str]]:
    """The gate on so many rows, and by disagreement what they decide, how many are enough, and what those cost.

    Args:
        n: Test rows.
        margin: The drop that is allowed.
        family: Gates of the suite that share the error rate of failing.
        disagreements: Shares of answers in which two runs may differ.
        usd_per_row: Dollars that one row costs in a run; None when nobody knows.
    """
    from copa_harness.judge.options import Gates
    from copa_harness.judge.power import chance_to_pass, drop_to_see, rows_to_pass

    alpha = Gates().alpha
    said = []
    for share in disagreements:
        passes = chance_to_pass(n, disagreement=share, margin=margin, alpha=alpha) if margin else 0.0
        needed = rows_to_pass(disagreement=share, margin=margin, alpha=alpha)
        cost = "" if needed is None or not usd_per_row else f", {dollars(needed * usd_per_row)} a run"
        enough = "no number of rows does" if needed is None else f"80 % take {counted(needed, 'row')}{cost}"
        drop = drop_to_see(n, disagreement=share, margin=margin, alpha=alpha / family)
        seen = "no drop is found" if math.isinf(drop) else f"a drop of {number(drop)} is found"
        said.append(
            f"if {100 * share:.0f} % of answers differ by chance, an unchanged program passes in {100 * passes:.0f} % "
            f"of runs ({enough}), and {seen} in 80 %"
        )
    shared = f", one of {family} such gates" if family > 1 else ""
    return f"max_regression={margin:g} on {counted(n, 'row')}{shared}", said


def _power_note(task: Task, plain: PlanLine, settings: Settings) -> str:
    margin, n = settings.gates.get("max_regression"), len(task.testset)
    if margin is None:
        return ""
    usd = None if plain.each is None else plain.each[1] * (plain.calls + plain.cached) / n
    family = settings.families.get("max_regression", 1)
    gate, cases = power_told(n, margin=margin, family=family, usd_per_row=usd)
    return f"{task.name}, {gate}: {'; '.join(cases)}"


def _line(task: Task, what: str, plan: DryRun, key: str) -> PlanLine:
    usage, each = plan.usage, plan.each
    known = not usage.estimated_calls
    return PlanLine(
        task.name,
        what,
        usage.paid_calls,
        usage.cached_calls,
        usage.tokens if known else None,
        usage.usd if known else None,
        key,
        None if each is None else (each.input_tokens + each.output_tokens, each.usd),
    )


def _scaled(line: PlanLine, calls: float) -> PlanLine:
    """The same kind of call, `calls` times."""
    tokens, usd = (None, None) if line.each is None else (line.each[0] * calls, line.each[1] * calls)
    return PlanLine(line.task, line.what, calls, 0, tokens, usd, line.key)


def _least(amount: float | None, ceiling: float) -> float | None:
    if amount is None:
        return None if ceiling == float("inf") else ceiling
    return min(amount, ceiling)


def _total(lines: Sequence[PlanLine]) -> PlanLine:
    tokens, usd = _sum([line.tokens for line in lines]), _sum([line.usd for line in lines])
    calls, cached = sum(line.calls for line in lines), sum(line.cached for line in lines)
    return PlanLine("", "total", calls, cached, tokens, usd, "")


def _sum(amounts: Sequence[float | None]) -> float | None:
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if len(known) == len(amounts) else None


def _cells(line: PlanLine) -> tuple[str, str, str, str]:
    def shown(value: float | None, digits: int = 0) -> str:
        return "?" if value is None else "unlimited" if value == float("inf") else f"{value:,.{digits}f}"

    return shown(line.calls), shown(line.cached), shown(line.tokens), shown(line.usd, 4)
