"""The end of a run: among everything fully scored, what keeps the limits and serves the preference; and the record.

The search itself maximizes the score alone; every program it scored fully is remembered with what its answers cost.
From these the front of score and cost is drawn, and the preferred one is taken, never one below the program that came
in. Knows runs and preferences; knows nothing of how candidates were found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dspy

from copa_harness.errors import ConfigurationError
from copa_harness.optimize.candidate import Candidate
from copa_harness.optimize.outcome import OptimizationResult, to_state
from copa_harness.optimize.pareto import Preference, pareto_front, preferred

if TYPE_CHECKING:
    from copa_harness.optimize.run import Run


def choose(run: Run, preference: Preference | None) -> tuple[Mapping[str, Any], ...]:
    """Make the preferred program the incumbent; the front of score and cost, cheapest first, when costs are known.

    Raises:
        ConfigurationError: No program that was fully scored keeps every limit.
    """
    if run.constraints.measured and not run.validation.is_complete(run.incumbent):
        raise ConfigurationError(
            "the budget does not pay for scoring the program as written: its costs could not be measured, and no limit "
            "on them can be kept; raise the budget"
        )
    if not run.validation.is_complete(run.incumbent):  # the budget did not pay for a score; words can still be kept
        run.incumbent = run.constraints.completed_candidate(run.incumbent)
    allowed = [candidate for candidate in run.validation.completed() if run.forbids(candidate) is None]
    if run.forbids(run.incumbent) is not None:
        if not allowed:
            raise ConfigurationError(
                f"no program keeps the constraints: {run.forbids(run.incumbent)}; {len(run.validation.completed())} "
                "were scored; loosen the limit, raise the budget, or change the program"
            )
        run.incumbent = max(allowed, key=run.validation.mean)
    if preference is None:
        return ()
    objective = _objective(preference, allowed, run)
    points = [
        (run.validation.mean(candidate), cost)
        for candidate in allowed
        if (cost := run.validation.cost(candidate).per_answer(objective)) is not None
    ]
    if len(points) < len(allowed) or not points:
        what = objective.replace("_", " ")
        run.note(f"prefer={str(preference)!r} was ignored: {what} of the answers are not known", headline=True)
        return ()
    before = run.validation.mean(run.student) if run.forbids(run.student) is None else float("-inf")
    chosen = preferred(points, within=preference.within, at_least=before)
    if allowed[chosen].key != run.incumbent.key:
        best = [allowed[i].key for i in range(len(allowed))].index(run.incumbent.key)
        what = f"{objective.replace('_', ' ')} per answer"
        run.note(
            f"{preference}: {points[chosen][0]:.3f} at {points[chosen][1]:.6g} {what} instead of "
            f"{points[best][0]:.3f} at {points[best][1]:.6g}",
            headline=True,
        )
        run.incumbent = allowed[chosen]
    return tuple(_entry(run, allowed[i], objective) for i in pareto_front(points))


def _objective(preference: Preference, allowed: list[Candidate], run: Run) -> str:
    """What is minimized; where answers have no price, "cheapest" means the fewest tokens."""
    if preference.objective != "usd":
        return preference.objective
    prices = [run.validation.cost(candidate).per_answer("usd") for candidate in allowed]
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
        return f"the budget: {run.scope.charged_calls:,} of {run.scope.budget.calls:,.0f} calls used"
    if run.stopped == "converged":
        return f"no improvement over a full cycle (epsilon {run.settings.epsilon:g}, or the noise)"
    if run.stopped == "max_cycles":
        return f"max_cycles = {run.settings.max_cycles}, the last of which still improved"
    if run.stopped == "perfect score":
        return f"perfect score on {run.validation.n:,} validation examples"
    said = {
        "no improvement": f"no improvement in {run.settings.search.patience} trials",
        "no head-room": "no head-room",
        "search space exhausted": "every combination was tried",
        "trials": f"{run.settings.search.max_trials:,} trials",
        "budget": "its share of the calls was used",
        "perfect score": "perfect score",
    }
    return "all steps taken" + (f"; the last search: {said[run.last_search]}" if run.last_search else "")


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
        front: What `choose` gave.
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
