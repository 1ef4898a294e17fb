"""Adoption: which program is returned at the end of a run, and whether it is better than what came in.

    plan_holdout ──── before the search: rows set aside for the end, and the calls they will cost
    conclude ──────── at the end:
        finalists are validated on rows that did not choose them      `_validate_finalists`
        what breaks a limit is out                                    `_within_limits`
        a preference takes the cheapest of the good ones              `_preferred`
        the program as written is given up only on paired evidence    `_tested`

Where there are enough validation examples and calls, a share of the rows is held back from the search, and the best
finalist on them is taken (see `finalists`). Where there are too few, training rows decide among the finalists: those
that none of them shows and whose weights were not trained on, as many as the calls left pay for. Either way the result
must not lose to the program as written on these rows, and it must pass the paired test (`finalists.chosen_p_value`): on
the rows held back, where there are some, else on the validation rows that chose the result, corrected for the
candidates with a full score it was chosen among. That correction cannot count the candidates
a race dropped early, which makes `adoption_p` an error rate only on rows held back. On the rows that chose it is a
threshold: where every candidate is truly as good as the program as written, about half of the searches pass it, and a
third where fresh training rows confirm it (`tests/benchmarks/bench_adoption.py`). That changes a program for nothing,
but loses nothing: where all are truly five points worse it is a quarter, and a tenth with fresh rows.

**A whole and its parts.** Where no such rows are left (weights were trained on all of them) the validation rows that
chose the result are all there is, and the best of many combinations of prompts and weights is partly the luckiest.
What prompts alone or weights alone came to was chosen among fewer, weights alone among one. So a combination is
returned only if it beats the better of these parts by the paired test, one-sided at `adoption_p`. Simulated with 24
rows, 3 or 8 combinations whose true scores differ by .1 (standard deviation), scores of two programs correlated .4, and
a part that is right on .6: mean true score of what is returned, less the part's,

    combinations on average       .15 worse        .05 worse        .05 better       .10 worse, all alike (sd .03)
    always the best one         -.013   -.011     +.025   +.056    +.108   +.160    -.030   -.045
    this rule                    .000   +.001     +.019   +.039    +.081   +.139    -.005   -.010

The search itself maximizes the score alone; every program it scored fully is remembered with what its answers cost.
From these a preference draws the front of score and cost and takes its program, never one below the program that came
in.

The functions return what they decide; the run is told by `Run.choose`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from copa_harness.errors import BudgetExhausted, ConfigurationError
from copa_harness.formatting import counted
from copa_harness.optimize.finalists import (
    N_FINALISTS,
    chosen,
    chosen_p_value,
    finalists_of,
    least_p_value,
    pareto_front,
    preferred,
    unshown,
)
from copa_harness.optimize.options import Preference, SearchOptions
from copa_harness.optimize.propose.schema import strata_of, stratified_order
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.scoring import Validation
from copa_harness.optimize.step_budget import CallBudget, OutOfCalls
from copa_harness.results import Evidence, FrontProgram, Phase
from copa_harness.strategy import Step, StepKind

if TYPE_CHECKING:
    from copa_harness.optimize.run import Run

HELD_BACK_SHARE = 1 / 4
"""Of the validation rows, those held back."""

MIN_HELD_BACK = 20
"""Fewer rows decide nothing, and the search needs them more."""

MIN_TRAINING_ROWS = 12
"""Fewer training rows do not tell finalists apart."""

N_SCORED = N_FINALISTS + 1
"""The finalists and the program as written."""

BUDGET_SHARE = 0.2
"""Of the budget, what validating the finalists may cost at most."""


@dataclass(frozen=True, slots=True)
class HoldoutPlan:
    """What is set aside for the end of a run.

    Attributes:
        rows: Validation rows the search does not see, None where there are not enough.
        n_training: Training rows at most to tell finalists apart by, 0 where rows are held back or calls are few.
        cost: Calls it may take.
        level: Of the paired test against the program as written, 0..1; 1 keeps whatever scored at least as well.
    """

    rows: Validation | None = None
    n_training: int = 0
    cost: int = 0
    level: float = 1.0


@dataclass(frozen=True, slots=True)
class Adoption:
    """What is returned, and why.

    Attributes:
        program: The result, or the program as written.
        evidence: What speaks for the result; None when nothing was found, or there is nothing to compare it with.
        front: The front of score and cost, cheapest first, when a preference asked for it.
    """

    program: Candidate
    evidence: Evidence | None
    front: tuple[FrontProgram, ...] = ()


@dataclass(frozen=True, slots=True)
class _Validated:
    """The finalist taken, those passed over for it, and the rows that decided; None without any."""

    winner: Candidate
    passed_over: frozenset[str] = frozenset()
    rows: Validation | None = None


# -- before the search


def plan_holdout(
    whole: Validation,
    student: Candidate,
    steps: Sequence[Step],
    settings: SearchOptions,
    *,
    n_training: int,
    calls: float,
) -> tuple[Validation, HoldoutPlan]:
    """What the search scores on, and what is set aside for its end: nothing for DSPy's optimizers alone.

    Args:
        whole: All validation rows.
        student: For what a row costs.
        steps: What will be done. Who asks for DSPy's optimizers by name wants to see what they do.
        settings: Their seed decides which rows are held back; both parts have about the same mix of labels.
        n_training: Training rows there are.
        calls: The budget.
    """
    if all(step.kind in (StepKind.OPTIMIZER, StepKind.NONE) for step in steps):
        return whole, HoldoutPlan()
    cost = whole.calls_per_example(student)
    n = n_held_back(whole.n, calls=calls, calls_per_example=cost)
    if n == 0:
        n = _affordable(n_training, calls, N_SCORED * cost)
        n = n if n >= MIN_TRAINING_ROWS else 0
        return whole, HoldoutPlan(None, n, N_SCORED * n * cost, settings.adoption_p)
    order = [int(i) for i in stratified_order(strata_of(whole.examples), np.random.default_rng([settings.seed, 606]))]
    held_back = whole.part(sorted(order[:n]))
    return whole.part(sorted(order[n:])), HoldoutPlan(held_back, 0, N_SCORED * n * cost, settings.adoption_p)


def n_held_back(n_validation: int, *, calls: float, calls_per_example: int) -> int:
    """How many validation rows the search does not get to see; 0 when there are not enough rows or calls.

    Args:
        n_validation: Validation rows.
        calls: The budget, `inf` for none.
        calls_per_example: Upper estimate of what one row costs.
    """
    n = _affordable(int(n_validation * HELD_BACK_SHARE), calls, N_SCORED * calls_per_example)
    return n if n >= MIN_HELD_BACK else 0


def _affordable(n: int, calls: float, cost: float) -> int:
    return n if math.isinf(calls) else min(n, int(BUDGET_SHARE * calls / cost))


def out_of_reach(run: Run, plan: HoldoutPlan) -> str | None:
    """Why no search could find a result that is adopted, or None: the program as written makes too few mistakes."""
    reference = _reference_of(run)
    if reference is None or plan.level >= 1 or plan.rows is not None:
        return None
    scores, wrong = run.validation.scores(reference), len(run.validation.mistakes(reference))
    least = least_p_value(scores)
    if least <= plan.level or not wrong:
        return None
    return (
        f"nothing was searched: the program as written falls short on {wrong} of {counted(run.validation.n, 'row')}, "
        f"so even a result with full marks would have p = {least:.3g}, above adoption_p = {plan.level:g}; give more "
        "validation examples, or adopt without a test (adoption_p=1)"
    )


# -- at the end


def conclude(run: Run, plan: HoldoutPlan, preference: Preference | None) -> Adoption:
    """End a run whose steps are over: finalists, limits, preference, evidence.

    Raises:
        ConfigurationError: No program that was fully scored keeps every limit.
    """
    validated = _validate_finalists(run, plan)
    result, is_cheaper = _within_limits(run, validated.winner), False
    if preference is not None:
        result, is_cheaper = _preferred(run, preference, result, passed_over=validated.passed_over)
    adopted, evidence = _tested(run, replace(plan, level=1.0) if is_cheaper else plan, result, validated.rows)
    return Adoption(adopted, evidence, () if preference is None else _front(run, preference, adopted))


def allowed(run: Run) -> list[Candidate]:
    """Everything fully scored that keeps the limits, in the order in which it was first scored."""
    return [candidate for candidate in run.validation.completed() if run.forbids(candidate) is None]


def _reference_of(run: Run) -> Candidate | None:
    """What the result has to be better than: the program as written, with required texts appended where it lacks them.

    None when that has no score or breaks a limit: then any program that keeps the limits is better.
    """
    for candidate in (run.student, run.constraints.completed_candidate(run.student)):
        if run.forbids(candidate) is None and run.validation.is_complete(candidate):
            return candidate
    return None


def _validate_finalists(run: Run, plan: HoldoutPlan) -> _Validated:
    """Score the finalists, and the program as written, on rows that did not choose them; the best of them wins."""
    reference = _reference_of(run)
    if reference is None or run.incumbent.key == reference.key or run.validation.nothing_parses:
        return _Validated(run.incumbent)
    found = [one for one in allowed(run) if one.key != reference.key]
    part = _best_part(run, found, reference)
    finalists = finalists_of(run.validation, found, run.incumbent, reference=reference, part=part)
    if plan.rows is not None:
        fresh, what = plan.rows, "validation rows the search did not use"
    else:
        rows = _fresh_training_rows(run, finalists)
        n = plan.n_training
        if len(finalists) > 1:  # calls that the search left over have no better use
            n = max(n, _affordable_rows(run, finalists))
        if min(len(rows), n) < MIN_TRAINING_ROWS:
            _say_why_none(run, finalists, n_rows=len(rows))
            return _without_fresh_rows(run, plan, part)
        trainset = run.context.trainset
        fresh, what = run.validation.over([trainset[i] for i in rows[:n]]), "training rows none of them was made from"
    with run.recorded("last look"):
        try:
            for candidate in (reference, *finalists):
                fresh.complete(candidate, allowance=CallBudget(run.scope, math.inf), phase=Phase.SEARCH)
        except (OutOfCalls, BudgetExhausted):
            run.note(f"the budget does not pay for scoring {counted(len(finalists), 'finalist')} on {fresh.n} {what}")
            return _without_fresh_rows(run, plan, part)
        kept = [one for one in finalists if run.forbids(one) is None] or list(finalists)
        winner = chosen(kept, search=run.validation, fresh=fresh)
        run.choose(winner)  # the score after this phase is the winner's
        run.note(
            f"{counted(len(finalists), 'finalist')} scored on {fresh.n} {what}: "
            + ", ".join(f"{run.validation.mean(one):.3f} -> {fresh.mean(one):.3f}" for one in finalists)
            + f" (as written: {run.validation.mean(reference):.3f} -> {fresh.mean(reference):.3f})"
        )
    return _Validated(winner, frozenset(one.key for one in finalists if one.key != winner.key), fresh)


def _fresh_training_rows(run: Run, finalists: Sequence[Candidate]) -> list[int]:
    """Places of training rows that no finalist shows and that none's weights were trained on."""
    used = frozenset[int]().union(*map(run.trained_on, finalists))
    return [i for i in unshown(run.context.trainset, finalists) if i not in used]


def _affordable_rows(run: Run, finalists: Sequence[Candidate]) -> int:
    cost = (1 + len(finalists)) * run.validation.calls_per_example(run.incumbent)
    return int(min(len(run.context.trainset), run.scope.remaining_calls / cost))


def _say_why_none(run: Run, finalists: Sequence[Candidate], *, n_rows: int) -> None:
    if len(finalists) > 1 and n_rows < MIN_TRAINING_ROWS:
        run.note(
            f"{counted(len(finalists), 'finalist')} are told apart by validation alone: of "
            f"{counted(len(run.context.trainset), 'training row')} {n_rows} are shown by none of them and were not "
            f"trained on, too few (below {MIN_TRAINING_ROWS}) to say more"
        )


def _best_part(run: Run, candidates: Sequence[Candidate], reference: Candidate) -> Candidate | None:
    """The best that prompts alone or weights alone came to, None where nothing did better than the program as written.

    Of equals the simpler one, which tuned weights under the prompts as written always are.
    """
    changed = {one.key: one.changes(run.plain) for one in candidates}
    parts = [
        one
        for one in candidates
        if sum(changed[one.key]) == 1 and run.validation.difference(one, reference) > 1e-9 and not one.structure
    ]
    return max(parts, key=lambda one: (run.validation.mean(one), -one.size), default=None)


def _without_fresh_rows(run: Run, plan: HoldoutPlan, part: Candidate | None) -> _Validated:
    """The incumbent; where that changes prompts and weights, only if it beats the better part of both beyond noise."""
    best = run.incumbent
    if part is None or plan.level >= 1 or best.structure or not all(best.changes(run.plain)):
        return _Validated(best)
    p_value = chosen_p_value(run.validation.scores(part), run.validation.scores(best))
    if p_value <= plan.level:
        return _Validated(best)
    pair, alone = run.validation.compared(part, best), "weights" if part.changes(run.plain)[0] else "prompts"
    with run.recorded("last look"):
        run.choose(part)
        run.note(
            f"{alone} alone are returned: changing both gains {pair.difference:+.3f} over them on validation "
            f"({pair.n_better} better, {pair.n_worse} worse, p = {p_value:.3g}), which chance explains",
            headline=True,
        )
    return _Validated(part, frozenset({best.key}))


def _within_limits(run: Run, candidate: Candidate) -> Candidate:
    """The candidate if it keeps every limit, else the best of the others that does."""
    if run.constraints.measured and not run.validation.is_complete(candidate):
        raise ConfigurationError(
            "the budget does not pay for scoring the program as written: its costs could not be measured, and no limit "
            "on them can be kept; raise the budget"
        )
    if not run.validation.is_complete(candidate):  # the budget did not pay for a score; words can still be kept
        candidate = run.constraints.completed_candidate(candidate)
    broken = run.forbids(candidate)
    if broken is None:
        return candidate
    found = allowed(run)
    if not found:
        raise ConfigurationError(
            f"no program keeps the constraints: {broken}; {counted(len(run.validation.completed()), 'program')} scored "
            "in full; loosen the limit, raise the budget, or change the program"
        )
    return max(found, key=run.validation.mean)


def _tested(
    run: Run, plan: HoldoutPlan, result: Candidate, fresh: Validation | None
) -> tuple[Candidate, Evidence | None]:
    """The result or the program as written, and the evidence (`Adoption.evidence`).

    Args:
        run: A run that has made its choice.
        plan: What was set aside.
        result: The choice.
        fresh: The rows on which the finalists were validated.
    """
    reference = _reference_of(run)
    if reference is None or result.key == reference.key:
        return result, None
    held_back = fresh if plan.rows is not None else None
    if held_back is not None and not _is_scored(run, held_back, result):
        held_back = fresh = None
    judged_on = held_back or run.validation
    tried = [one for one in judged_on.completed() if one.key != reference.key and run.forbids(one) is None]
    scores = [judged_on.scores(one) for one in (reference, result, *tried)]
    p_value = chosen_p_value(scores[0], scores[1], scores[2:])
    pair = judged_on.compared(reference, result)
    lost = fresh.difference(result, reference) if fresh is not None else math.nan
    what = f"{pair.n_better} of {counted(pair.n, 'row')} better, {pair.n_worse} worse"
    tested = plan.level < 1
    why = ""
    if tested and lost < -1e-9 and fresh is not None:
        where = "the search did not use" if held_back is not None else "of the training split that it does not show"
        why = f"it loses {-lost:.3f} on {fresh.n} rows {where}"
    elif tested and p_value > plan.level:
        why = f"p = {p_value:.3g} is above adoption_p = {plan.level:g}"
    if why:
        run.note(f"the program as written is returned, the result is not adopted: {what}; {why}", headline=True)
    elif tested:
        run.note(f"better than the program as written: {what}, p = {p_value:.3g}")
    else:
        run.note(f"kept without a test: {what}")
    evidence = Evidence(
        n=pair.n,
        unseen=0 if held_back is None else held_back.n,
        n_tried=len(tried) + run.n_evaluated_elsewhere,
        difference=pair.difference,
        low=pair.interval.low,
        high=pair.interval.high,
        gained=pair.n_better,
        lost=pair.n_worse,
        p_value=p_value,
        level=plan.level,
        tested=tested,
        adopted=not why,
        why=why,
    )
    return reference if why else result, evidence


def _is_scored(run: Run, rows: Validation, candidate: Candidate) -> bool:
    """Whether the candidate has a full score on these rows, or the budget pays for one."""
    try:
        rows.complete(candidate, allowance=CallBudget(run.scope, math.inf), phase=Phase.SEARCH)
    except (OutOfCalls, BudgetExhausted):
        run.note(f"the budget does not pay for scoring the result on {rows.n} rows the search did not use")
        return False
    return True


# -- score and cost


def _preferred(
    run: Run, preference: Preference, result: Candidate, *, passed_over: frozenset[str]
) -> tuple[Candidate, bool]:
    """The preferred program; whether it costs less than the program as written. Who was passed over is out."""
    found = [one for one in allowed(run) if one.key not in passed_over]
    objective, points = _priced(run, preference, found)
    what = f"{objective.replace('_', ' ')} per answer"
    if not points:
        run.note(f"prefer={str(preference)!r} was ignored: {what} is not known", headline=True)
        return result, False
    keys = [one.key for one in found]
    reference = _reference_of(run)
    before = float("-inf") if reference is None else run.validation.mean(reference)
    i = preferred(points, within=preference.within, at_least=before)
    if keys[i] != result.key:
        best, result = keys.index(result.key), found[i]
        run.note(
            f"{preference}: {points[i][0]:.3f} at {points[i][1]:.6g} {what} instead of "
            f"{points[best][0]:.3f} at {points[best][1]:.6g}",
            headline=True,
        )
    is_cheaper = reference is not None and reference.key in keys and points[i][1] < points[keys.index(reference.key)][1]
    return result, is_cheaper


def _front(run: Run, preference: Preference, adopted: Candidate) -> tuple[FrontProgram, ...]:
    """The front of score and cost, cheapest first; empty where costs are not known."""
    found = allowed(run)
    objective, points = _priced(run, preference, found)
    return tuple(_front_entry(run, found[i], objective, adopted) for i in pareto_front(points))


def _priced(run: Run, preference: Preference, candidates: list[Candidate]) -> tuple[str, list[tuple[float, float]]]:
    """What is minimized, and every candidate's (score, cost); no points where the cost of one is not known.

    Where answers have no price, "cheapest" means the fewest tokens.
    """
    objective = preference.objective
    if objective == "usd":
        prices = [run.validation.cost(candidate).per_answer("usd") for candidate in candidates]
        objective = "usd" if any(prices) and None not in prices else "tokens"
    costs = [run.validation.cost(one).per_answer(objective) for one in candidates]
    points = [(run.validation.mean(one), cost) for one, cost in zip(candidates, costs, strict=True) if cost is not None]
    return objective, points if len(points) == len(candidates) else []


def _front_entry(run: Run, candidate: Candidate, objective: str, adopted: Candidate) -> FrontProgram:
    cost = run.validation.cost(candidate)
    return FrontProgram(
        score=run.validation.mean(candidate),
        objective=objective,
        prompt_tokens_per_answer=cost.per_answer("prompt_tokens"),
        output_tokens_per_answer=cost.per_answer("output_tokens"),
        usd_per_answer=cost.per_answer("usd"),
        seconds_per_answer=cost.per_answer("seconds"),
        longest_prompt=cost.longest_prompt,
        n_demos=candidate.n_demos,
        model=candidate.model,
        returned=candidate.key == adopted.key,
    )
