"""The last look: which finalist is returned, and whether it is better than what came in.

Where there are enough validation examples and calls, a share of the rows is held back from the search. At the end
the finalists and the program as written are scored on them, and the best finalist is taken (see `finalists`). Where
there are too few, training rows that no finalist shows decide among the finalists. Either way the result must not lose
to the program as written on these rows, and that is only given up on paired evidence (see `significance`): on the rows
held back, where there are some, else on the validation rows that chose the result, corrected for the candidates with a
full score it was chosen among. That correction cannot count the candidates a race dropped early.

The end of a run: among everything fully scored, what keeps the limits and serves the preference; and the record.

The search itself maximizes the score alone; every program it scored fully is remembered with what its answers cost.
From these the front of score and cost is drawn, and the preferred one is taken, never one below the program that came
in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import dspy
import numpy as np

from copa_harness.errors import BudgetExhausted, ConfigurationError
from copa_harness.judge.paired_tests import PairedDifference, PairedScores, paired_difference
from copa_harness.optimize.budget import Allowance, OutOfCalls, step_scope
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
from copa_harness.optimize.result import to_state
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.scoring import Validation
from copa_harness.results import OptimizationResult, Phase
from copa_harness.strategy import Step, StepKind
from copa_harness.wording import counted

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
"""Of the budget, what the last look may cost at most."""


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


@dataclass(frozen=True, slots=True)
class LastLook:
    """What is set aside for the end of a run.

    Attributes:
        held_back: Validation rows the search does not see, None where there are not enough.
        n_training: Training rows at most to tell finalists apart by, 0 where rows are held back or calls are few.
        cost: Calls it may take.
        level: Of the paired test against the program as written, 0..1; 1 keeps whatever scored at least as well.
    """

    held_back: Validation | None = None
    n_training: int = 0
    cost: int = 0
    level: float = 1.0


def planned(
    whole: Validation,
    student: Candidate,
    steps: Sequence[Step],
    settings: SearchOptions,
    *,
    n_training: int,
    calls: float,
) -> tuple[Validation, LastLook]:
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
        return whole, LastLook()
    cost = whole.calls_per_example(student)
    n = n_held_back(whole.n, calls=calls, calls_per_example=cost)
    if n == 0:
        n = _affordable(n_training, calls, N_SCORED * cost)
        n = n if n >= MIN_TRAINING_ROWS else 0
        return whole, LastLook(None, n, N_SCORED * n * cost, settings.adoption_p)
    order = [int(i) for i in stratified_order(strata_of(whole.examples), np.random.default_rng([settings.seed, 606]))]
    held_back = whole.part(sorted(order[:n]))
    return whole.part(sorted(order[n:])), LastLook(held_back, 0, N_SCORED * n * cost, settings.adoption_p)


@contextmanager
def setting_aside(run: Run, look: LastLook) -> Iterator[None]:
    """Hold the run to its budget less what the last look will cost."""
    whole = run.scope
    if not look.cost or math.isinf(whole.budget.calls):
        yield
        return
    try:
        with step_scope(Allowance(whole, whole.budget.calls - look.cost), name="search") as run.scope:
            yield
    finally:
        run.scope = whole


def allowed(run: Run) -> list[Candidate]:
    """Everything fully scored that keeps the limits, in the order in which it was first scored."""
    return [candidate for candidate in run.validation.completed() if run.forbids(candidate) is None]


def reference_of(run: Run) -> Candidate | None:
    """What the result has to be better than: the program as written, with required texts appended where it lacks them.

    None when that has no score or breaks a limit: then any program that keeps the limits is better.
    """
    for candidate in (run.student, run.constraints.completed_candidate(run.student)):
        if run.forbids(candidate) is None and run.validation.is_complete(candidate):
            return candidate
    return None


def out_of_reach(run: Run, look: LastLook) -> str | None:
    """Why no search could find a result that is adopted, or None: the program as written makes too few mistakes."""
    reference = reference_of(run)
    if reference is None or look.level >= 1 or look.held_back is not None:
        return None
    scores, wrong = run.validation.scores(reference), len(run.validation.mistakes(reference))
    least = least_p_value(scores)
    if least <= look.level or not wrong:
        return None
    return (
        f"nothing was searched: the program as written falls short on {wrong} of {counted(run.validation.n, 'row')}, "
        f"so even a result with full marks would have p = {least:.3g}, above adoption_p = {look.level:g}; give more "
        "validation examples, or adopt without a test (adoption_p=1)"
    )


def look_again(run: Run, look: LastLook) -> Validation | None:
    """Score the finalists on rows that did not choose them and make the best of them the incumbent.

    Returns:
        These rows, on which the program as written was scored too; None without such a look.
    """
    reference = reference_of(run)
    if reference is None or run.incumbent.key == reference.key:
        return None
    found = [one for one in allowed(run) if one.key != reference.key]
    finalists = finalists_of(run.validation, found, run.incumbent, reference=reference)
    if look.held_back is not None:
        fresh, what = look.held_back, "validation rows the search did not use"
    else:
        rows = unshown(run.trainset, finalists)[: look.n_training]
        if len(rows) < MIN_TRAINING_ROWS:
            return None
        fresh, what = run.validation.over([run.trainset[i] for i in rows]), "training rows none of them shows"
    with run.recorded("last look", len(run.notes)):
        try:
            for candidate in (reference, *finalists):
                fresh.complete(candidate, allowance=Allowance(run.scope, math.inf), phase=Phase.SEARCH)
        except (OutOfCalls, BudgetExhausted):
            run.note(f"the budget does not pay for scoring {counted(len(finalists), 'finalist')} on {fresh.n} {what}")
            return None
        kept = [one for one in finalists if run.forbids(one) is None] or list(finalists)
        run.incumbent = chosen(kept, search=run.validation, fresh=fresh)
        run.passed_over = frozenset(one.key for one in finalists if one.key != run.incumbent.key)
        run.note(
            f"{counted(len(finalists), 'finalist')} scored on {fresh.n} {what}: "
            + ", ".join(f"{run.validation.mean(one):.3f} -> {fresh.mean(one):.3f}" for one in finalists)
            + f" (as written: {run.validation.mean(reference):.3f} -> {fresh.mean(reference):.3f})"
        )
    return fresh


def decide(run: Run, look: LastLook, fresh: Validation | None) -> Mapping[str, Any]:
    """Keep what the run found or go back to the program as written; the evidence.

    Args:
        run: A run that has made its choice.
        look: What was set aside.
        fresh: The rows of the last look.

    Returns:
        A record of plain numbers; empty when nothing was found, or when there is nothing to compare it with.
    """
    reference, result = reference_of(run), run.incumbent
    if reference is None or result.key == reference.key:
        return {}
    held_back = fresh if look.held_back is not None else None
    if held_back is not None and not _is_scored(run, held_back, result):
        held_back = fresh = None
    sheet = held_back or run.validation
    tried = [one for one in sheet.completed() if one.key != reference.key and run.forbids(one) is None]
    p_value = chosen_p_value(sheet.scores(reference), sheet.scores(result), [sheet.scores(one) for one in tried])
    pair = _compared(reference, result, sheet)
    lost = fresh.difference(result, reference) if fresh is not None else math.nan
    what = f"{pair.n_better} of {counted(pair.n, 'row')} better, {pair.n_worse} worse"
    tested = look.level < 1
    why = ""
    if tested and lost < -1e-9 and fresh is not None:
        where = "the search did not use" if held_back is not None else "of the training split that it does not show"
        why = f"it loses {-lost:.3f} on {fresh.n} rows {where}"
    elif tested and p_value > look.level:
        why = f"p = {p_value:.3g} is above adoption_p = {look.level:g}"
    if why:
        run.note(f"the program as written is returned, the result is not adopted: {what}; {why}", headline=True)
        run.incumbent = reference
    elif tested:
        run.note(f"better than the program as written: {what}, p = {p_value:.3g}")
    else:
        run.note(f"kept without a test: {what}")
    return {
        "n": pair.n,
        "unseen": 0 if held_back is None else held_back.n,
        "n_tried": len(tried) + run.n_evaluated_elsewhere,
        "difference": pair.difference,
        "low": pair.interval.low,
        "high": pair.interval.high,
        "gained": pair.n_better,
        "lost": pair.n_worse,
        "p_value": p_value,
        "level": look.level,
        "tested": tested,
        "adopted": not why,
        "why": why,
    }


def _is_scored(run: Run, sheet: Validation, candidate: Candidate) -> bool:
    """Whether the candidate has a full score on these rows, or the budget pays for one."""
    try:
        sheet.complete(candidate, allowance=Allowance(run.scope, math.inf), phase=Phase.SEARCH)
    except (OutOfCalls, BudgetExhausted):
        run.note(f"the budget does not pay for scoring the result on {sheet.n} rows the search did not use")
        return False
    return True


def _compared(before: Candidate, after: Candidate, sheet: Validation) -> PairedDifference:
    pairs = [
        (old, new)
        for old, new in zip(sheet.scores(before), sheet.scores(after), strict=True)
        if old is not None and new is not None
    ]
    old, new = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return paired_difference(PairedScores([str(i) for i in range(len(pairs))], old, new))


def conclude(run: Run, look: LastLook, preference: Preference | None) -> tuple[Mapping[str, Any], ...]:
    """End a run whose steps are over: finalists, limits, preference, evidence; the front of score and cost.

    Raises:
        ConfigurationError: No program that was fully scored keeps every limit.
    """
    fresh = look_again(run, look)
    _keep_limits(run)
    is_cheaper = preference is not None and _prefer(run, preference)
    run.evidence = decide(run, replace(look, level=1.0) if is_cheaper else look, fresh)
    return _front(run, preference)


def _keep_limits(run: Run) -> None:
    """Make sure that the incumbent keeps every limit, where the best of the others has to take its place."""
    if run.constraints.measured and not run.validation.is_complete(run.incumbent):
        raise ConfigurationError(
            "the budget does not pay for scoring the program as written: its costs could not be measured, and no limit "
            "on them can be kept; raise the budget"
        )
    if not run.validation.is_complete(run.incumbent):  # the budget did not pay for a score; words can still be kept
        run.incumbent = run.constraints.completed_candidate(run.incumbent)
    if run.forbids(run.incumbent) is not None:
        found = allowed(run)
        if not found:
            raise ConfigurationError(
                f"no program keeps the constraints: {run.forbids(run.incumbent)}; "
                f"{counted(len(run.validation.completed()), 'program')} scored in full; loosen the limit, raise the "
                "budget, or change the program"
            )
        run.incumbent = max(found, key=run.validation.mean)


def _prefer(run: Run, preference: Preference) -> bool:
    """Make the preferred program the incumbent; whether it costs less than the program as written.

    Finalists that lost the last look are out of the choice.
    """
    found = [one for one in allowed(run) if one.key not in run.passed_over]
    objective, points = _priced(run, preference, found)
    what = f"{objective.replace('_', ' ')} per answer"
    if not points:
        run.note(f"prefer={str(preference)!r} was ignored: {what} is not known", headline=True)
        return False
    keys = [one.key for one in found]
    reference = reference_of(run)
    before = float("-inf") if reference is None else run.validation.mean(reference)
    i = preferred(points, within=preference.within, at_least=before)
    if keys[i] != run.incumbent.key:
        best = keys.index(run.incumbent.key)
        run.note(
            f"{preference}: {points[i][0]:.3f} at {points[i][1]:.6g} {what} instead of "
            f"{points[best][0]:.3f} at {points[best][1]:.6g}",
            headline=True,
        )
        run.incumbent = found[i]
    return reference is not None and reference.key in keys and points[i][1] < points[keys.index(reference.key)][1]


def _front(run: Run, preference: Preference | None) -> tuple[Mapping[str, Any], ...]:
    """The front of score and cost, cheapest first, when a preference asked for it and costs are known."""
    if preference is None:
        return ()
    found = allowed(run)
    objective, points = _priced(run, preference, found)
    return tuple(_entry(run, found[i], objective) for i in pareto_front(points))


def _priced(run: Run, preference: Preference, candidates: list[Candidate]) -> tuple[str, list[tuple[float, float]]]:
    """What is minimized, and every candidate's (score, cost); no points where the cost of one is not known."""
    objective = _objective(preference, candidates, run)
    costs = [run.validation.cost(one).per_answer(objective) for one in candidates]
    points = [(run.validation.mean(one), cost) for one, cost in zip(candidates, costs, strict=True) if cost is not None]
    return objective, points if len(points) == len(candidates) else []


def _objective(preference: Preference, candidates: list[Candidate], run: Run) -> str:
    """What is minimized; where answers have no price, "cheapest" means the fewest tokens."""
    if preference.objective != "usd":
        return preference.objective
    prices = [run.validation.cost(candidate).per_answer("usd") for candidate in candidates]
    return "usd" if any(prices) and None not in prices else "tokens"


def _entry(run: Run, candidate: Candidate, objective: str) -> dict[str, Any]:
    cost = run.validation.cost(candidate)
    return {
        "score": run.validation.mean(candidate),
        "objective": objective,
        **{
            f"{what}_per_answer": cost.per_answer(what) for what in ("prompt_tokens", "output_tokens", "usd", "seconds")
        },
        "longest_prompt": cost.longest_prompt,
        "n_demos": candidate.n_demos,
        "model": candidate.model,
        "returned": candidate.key == run.incumbent.key,
    }


def reason_of(run: Run) -> str:
    """Why a run ended, in words for the report."""
    if run.stopped == "budget":
        return f"the budget: {run.scope.charged_calls:,} of {run.scope.budget.calls:,.0f} calls used{_why_a_rest(run)}"
    if run.stopped == "converged":
        return f"no improvement over a full cycle (epsilon {run.settings.epsilon:g}, or the noise)"
    if run.stopped == "max_cycles":
        return f"max_cycles = {run.settings.max_cycles}, the last of which still improved"
    if run.stopped == "out of reach":
        return "too few mistakes on validation for any result to be adopted"
    if run.stopped == "perfect score":
        return f"perfect score on {counted(run.validation.n, 'validation example')}"
    said = {
        "no improvement": f"no improvement in {counted(run.settings.patience or 0, 'trial')}",
        "no head-room": "no head-room",
        "search space exhausted": "every combination was tried",
        "trials": counted(run.settings.max_trials, "trial"),
        "budget": "its share of the calls was used",
        "perfect score": "perfect score",
    }
    return "all steps taken" + (f"; the last search: {said[run.last_search]}" if run.last_search else "")


def _why_a_rest(run: Run) -> str:
    """Why a budget that ended a run has calls left."""
    if run.scope.remaining_calls < 1 or math.isinf(run.scope.remaining_calls) or run.scope.exhausted:
        return ""  # none is left, or it was another ceiling that ended it
    if not run.validation.is_complete(run.student):
        return "; the rest does not pay for scoring the program as written"
    if run.scope.remaining_calls < run.full_score_cost:
        return "; the rest does not pay for another candidate in full"
    return "; the rest was set aside for what comes after the search"


def result_of(
    run: Run,
    *,
    strategy: str,
    program: dspy.Module,
    front: tuple[Mapping[str, Any], ...],
    credit: Mapping[str, Any],
) -> OptimizationResult:
    """The record of a finished run.

    Args:
        run: The run.
        strategy: As parsed.
        program: The incumbent as a program.
        front: What `conclude` gave.
        credit: What `credit_of` gave.
    """
    before, after = run.validation.mean(run.student), run.score
    return OptimizationResult(
        strategy=strategy,
        model=run.incumbent.model,
        phases=tuple(run.phases),
        score_before=None if math.isnan(before) else before,
        score_after=None if math.isnan(after) else after,
        n_validation=run.validation.n,
        stopped=run.stopped,
        exhausted=run.stopped == "budget",
        usage=run.scope.usage(),
        seed=run.settings.seed,
        budget_calls=run.scope.budget.calls,
        charged_calls=run.scope.charged_calls,
        n_trials=run.n_trials,
        notes=tuple(run.notes),
        headlines=tuple(run.headlines),
        reason=reason_of(run),
        front=front,
        credit=credit,
        evidence=run.evidence,
        learned=tuple(run.knowledge.report()),
        trials=tuple(run.knowledge.records),
        state=None if run.incumbent.structure else to_state(program),
    )
