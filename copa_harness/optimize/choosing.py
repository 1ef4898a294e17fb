"""The end of a run: among everything fully scored, what keeps the limits and serves the preference; and the record.

The search itself maximizes the score alone; every program it scored fully is remembered with what its answers cost.
From these the front of score and cost is drawn, and the preferred one is taken, never one below the program that came
in. Knows runs and preferences; knows nothing of how candidates were found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dspy

from copa_harness.errors import ConfigurationError
from copa_harness.judge.messages import counted
from copa_harness.optimize.candidate import Candidate
from copa_harness.optimize.evidence import LastLook, allowed, decide, look_again, reference_of
from copa_harness.optimize.outcome import OptimizationResult, to_state
from copa_harness.optimize.pareto import Preference, pareto_front, preferred

if TYPE_CHECKING:
    from copa_harness.optimize.run import Run


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


def _priced(
    run: Run, preference: Preference, candidates: list[Candidate]
) -> tuple[str, list[tuple[float, float]]]:
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
        "no improvement": f"no improvement in {counted(run.settings.search.patience or 0, 'trial')}",
        "no head-room": "no head-room",
        "search space exhausted": "every combination was tried",
        "trials": counted(run.settings.search.max_trials, "trial"),
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
