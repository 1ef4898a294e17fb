"""The step that is one of DSPy's own optimizers: what it may use, and which of its programs is adopted.

An optimizer that evaluates its result on validation itself uses all its calls, since scoring the result again costs
nothing; from the others one scoring is held back. Knows runs and limits; how an optimizer is run is in `registry`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from copa_harness.errors import BudgetExhausted
from copa_harness.optimize.allowance import Allowance, OutOfCalls, Replays
from copa_harness.optimize.registry import OptimizerJob, run_optimizer
from copa_harness.optimize.strategy import Step
from copa_harness.results import Phase

if TYPE_CHECKING:
    from copa_harness.optimize.run import Run


def optimizer_step(run: Run, step: Step, allowance: Allowance) -> None:
    """A DSPy optimizer on the incumbent; its result is adopted if it is not worse on validation.

    A result that breaks a limit is repaired where that can be done (required texts are appended, demonstrations with
    forbidden ones left out), else the next best of the programs it evaluated takes its place.

    Raises:
        OutOfCalls: The allowance does not reach for the optimizer, or the budget for scoring what it found.
    """
    from copa_harness.optimize.builders import scores_its_result

    cost, kwargs = run.full_score_cost, run.settings.optimizer_kwargs.get(step.name, {})
    # What it has not evaluated itself must be scored afterwards; texts put in or left out make another program of it.
    edits = bool(run.constraints.required_text or run.constraints.forbidden_text)
    is_scored = not edits and scores_its_result(step.name, kwargs, n_validation=run.validation.n)
    reserved = 0 if is_scored else cost
    if not allowance.can_afford(cost):
        raise OutOfCalls
    job = OptimizerJob(
        name=step.name,
        incumbent=run.incumbent,
        trainset=run.constraints.allowed_examples(run.trainset),
        valset=run.validation.examples,
        metric=run.metric,
        allowance=Allowance(run.scope, run.scope.charged_calls + allowance.remaining - reserved),
        calls_per_example=run.validation.calls_per_example(run.incumbent),
        prompt_lm=run.prompt_lm,
        threads=run.settings.threads,
        seed=run.settings.seed,
        n_demos=run.settings.proposals.max_demos,
        kwargs=kwargs,
        teacher=run.teacher,
        min_score=run.settings.proposals.min_score,
        shows=run.constraints.allows,
        known=frozenset(one.key for one in run.validation.completed()),
    )
    found = run_optimizer(job)
    for note in found.notes:
        run.note(f"{step}: {note}")
    run.count_candidates(found.evaluated)
    ranked = [*([] if found.candidate is None else [found.candidate]), *found.others]
    refused: list[str] = []
    unpaid = False
    for i, candidate in enumerate(map(run.constraints.repaired, ranked)):
        if (broken := run.forbids(candidate)) is None:
            is_free = found.covers_all and candidate.key in found.evaluated
            if i > 0 and not is_free and not allowance.can_afford(run.validation.cost_to_complete(candidate)):
                unpaid = True
                continue
            purse = Replays(run.scope, math.inf) if is_free else Allowance(run.scope, math.inf)
            try:
                run.validation.complete(candidate, allowance=purse, phase=Phase.SEARCH)
            except (OutOfCalls, BudgetExhausted):
                unpaid = True
                continue
            run.count_candidates([candidate.key])
            broken = run.forbids(candidate)  # now with what its answers cost
        if broken is None:
            if refused:
                run.note(f"{step}: {len(refused)} programs it liked better break a limit, the best: {refused[0]}")
            run.adopt(candidate, what=f"{step}: result")
            return
        refused.append(broken)
    if refused:
        run.note(f"{step}: result not adopted, nor any other program it evaluated: {refused[0]}")
    if unpaid:
        raise OutOfCalls
