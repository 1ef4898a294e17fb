"""The steps of a strategy: what each proposes, and under which condition it replaces the incumbent.

Prompts, the alternating loop, weights, everything at once, and DSPy's own optimizers. A step ends by itself, with its
share of the calls, or with the budget; whatever ends it, the incumbent is the best program so far. Knows the order of
things; knows nothing of how an optimization is called or stored.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from copa_harness.errors import BudgetExhausted, NoTrainingRowsError, TrainingDivergedError
from copa_harness.optimize.allowance import Allowance, OutOfCalls, Replays
from copa_harness.optimize.candidate import Candidate
from copa_harness.optimize.demos import NO_DEMOS, labelled_pool, random_sets
from copa_harness.optimize.ensemble import ensemble_of
from copa_harness.optimize.evidence import allowed
from copa_harness.optimize.levels import checkpoint_levels
from copa_harness.optimize.optimizer_step import optimizer_step
from copa_harness.optimize.progress import incumbent_text
from copa_harness.optimize.proposals import starting_points
from copa_harness.optimize.rounds import DemoSets, InstructionSets, instruction_starts, search_in_rounds
from copa_harness.optimize.space import Point, Space, WeightsLevel, level_of
from copa_harness.optimize.strategy import Step, StepKind
from copa_harness.optimize.trials import PERFECT
from copa_harness.optimize.weights import Trained
from copa_harness.results import Phase

if TYPE_CHECKING:
    from copa_harness.optimize.run import Run

logger = logging.getLogger("copa_harness")


def execute(run: Run, steps: Sequence[Step], *, why_not: Callable[[], str | None] | None = None) -> None:
    """Score the student, then take the steps in order until they, the budget, or a perfect score end it.

    Args:
        run: A fresh run.
        steps: What is to be done.
        why_not: Asked once the student is scored: why nothing needs to be done, or None.
    """
    if [step.kind for step in steps] == [StepKind.NONE]:
        if run.constraints.any:
            run.baseline()
        return
    if not run.baseline():
        return
    if why_not is not None and run.score < PERFECT and (reason := why_not()) is not None:
        run.stopped = "out of reach"
        run.note(reason, headline=True)
        return
    for i, step in enumerate(steps):
        if run.score >= PERFECT:
            run.stopped = "perfect score"
            run.note(f"perfect score on validation before step {i + 1} ({step})")
            return
        run.n_steps += 1
        before = len(run.notes)
        name = f"{i + 1}: {step}" if len(steps) > 1 else str(step)
        with run.recorded(name, before):
            scores = run.validation.scores(run.incumbent)
            run.progress.say(f"step {name}: from {incumbent_text(scores)}")
            run.progress.at(f"step {name}", scores=scores)
            _take(run, step, steps[i + 1 :])
    if run.score >= PERFECT and run.stopped == "completed":
        run.stopped = "perfect score"


def _take(run: Run, step: Step, later: Sequence[Step]) -> None:
    allowance = run.share(step, later)
    try:
        if step.kind is StepKind.WEIGHTS:
            demos_ahead = any(s.kind is not StepKind.WEIGHTS for s in later)
            _weights(run, allowance, demos_ahead=demos_ahead, is_all=run.n_steps == 1 and not later)
        elif step.kind is StepKind.PROMPTS:
            _prompts(run, allowance)
        elif step.kind is StepKind.ALTERNATE:
            _alternate(run, allowance)
        elif step.kind is StepKind.JOINT:
            _joint(run, allowance)
        elif step.kind is StepKind.ENSEMBLE:
            _ensemble(run)
        else:
            optimizer_step(run, step, allowance)
    except (OutOfCalls, BudgetExhausted):
        run.budget_note(step)


def _prompts(run: Run, allowance: Allowance) -> None:
    """Studies over instructions and demonstrations, and over the other weights of a training before it."""
    levels = run.open_levels()
    own = level_of(run.incumbent)

    def starts(instructions: InstructionSets, demos: DemoSets) -> Sequence[Point]:
        return starting_points(instructions, demos, weights=(own, *levels))

    search_in_rounds(run, allowance, name="p", levels=[*levels, *run.checkpoint_levels()], first_starts=starts)


def _alternate(run: Run, allowance: Allowance) -> None:
    """Demonstrations for the current instruction, then instructions for those demonstrations, until converged.

    Source: COPA's alternating scheme (compilation phase, prompt phase). A cycle that improves by less than `epsilon`
    over both halves, or by no more than one standard error of the paired differences, has converged; neither counts
    with an `epsilon` of 0.
    """
    for cycle in range(run.settings.max_cycles):
        before, first = run.score, run.incumbent
        # Every cycle may use half of what is left, the last one all of it, and so may one whose half is too little to
        # score a single candidate; demonstrations have more to choose from.
        cost = run.full_score_cost
        half = run.fraction(allowance, 1 / 2)
        cycle_share = half if cycle + 1 < run.settings.max_cycles and half.can_afford(cost) else allowance
        two_thirds = run.fraction(cycle_share, 2 / 3)
        demos_share = two_thirds if two_thirds.can_afford(cost) else cycle_share
        space = Space.around(run.incumbent, demos=run.demo_options(demos_share))
        run.search(space, demos_share, phase=Phase.DEMOS, name=f"demos {cycle + 1}")
        if run.score < PERFECT:
            instructions = run.instruction_options(cycle_share)
            space = Space.around(run.incumbent, instructions=instructions)
            name, starts = f"instructions {cycle + 1}", instruction_starts(instructions)
            run.search(space, cycle_share, phase=Phase.INSTRUCTIONS, name=name, starts=starts)
        if run.score >= PERFECT:
            run.stopped = "perfect score"
            return
        if not allowance.can_afford(run.full_score_cost):
            run.stopped = "budget"
            return
        noise = run.validation.standard_error(run.incumbent, first) if run.settings.epsilon else 0.0
        if run.score - before < run.settings.epsilon or 0 < run.score - before <= noise + 1e-9:
            run.stopped = "converged"
            why = (
                f"less than epsilon {run.settings.epsilon:g}" if run.score - before < run.settings.epsilon
                else f"no more than the noise (a standard error of {noise:.3f}, paired)"
            )  # fmt: skip
            run.note(f"converged: cycle {cycle + 1} improved validation by {run.score - before:+.3f}, {why}")
            return
    run.stopped = "max_cycles"
    run.note(f"stopped after max_cycles = {run.settings.max_cycles} cycles, the last of which still improved")


def _weights(run: Run, allowance: Allowance, *, demos_ahead: bool, is_all: bool) -> None:
    """Train, then adopt the tuned weights under whichever prompt serves them best, if that is not worse.

    Where there is nothing to train on the program stays as it is, unless weights are all that was asked for.
    """
    if is_all:
        trained = run.tuned = run.train(demos_ahead=demos_ahead)
    elif (found := _trained(run, demos_ahead=demos_ahead, otherwise="the weights stay as they are")) is not None:
        trained = run.tuned = found
    else:
        return
    run.note(f"w: {trained.note}")
    whole = Allowance(run.scope, math.inf)
    best: Candidate | None = None
    for candidate in _serving_prompts(run, trained):
        # The first prompt is always tried; further ones only within this step's share.
        if best is not None and not allowance.can_afford(run.validation.cost_to_complete(candidate)):
            break
        run.validation.complete(candidate, allowance=whole, phase=Phase.WEIGHTS)
        logger.info("w: tuned weights, %d demonstrations: %.3f", candidate.n_demos, run.validation.mean(candidate))
        if best is None or _goes_before(run, candidate, best):
            best = candidate
    if best is not None:
        run.adopt(best, what="w: tuned weights")


def _goes_before(run: Run, candidate: Candidate, best: Candidate) -> bool:
    """Whether a candidate is to be preferred: what keeps the limits to what does not, then the better one."""
    breaks, best_breaks = run.forbids(candidate) is not None, run.forbids(best) is not None
    return run.validation.is_better(candidate, best) if breaks == best_breaks else best_breaks


def _serving_prompts(run: Run, trained: Trained) -> list[Candidate]:
    """The incumbent's prompts on the tuned weights; fresh demonstrations as in training; none."""
    tuned = run.incumbent.with_lms(trained.lms)
    found = [tuned]
    if trained.n_demos:
        fresh: dict[str, tuple[Any, ...]] = {}
        for i, (name, predictor) in enumerate(run.incumbent.template.named_predictors()):
            generator = np.random.default_rng([run.settings.seed, run.n_steps, i, 707])
            pool = labelled_pool(predictor.signature, run.trainset)
            sets = random_sets(pool, label="labelled", counts={trained.n_demos: 1}, generator=generator)
            if sets:
                fresh[name] = sets[0].demos
        found.append(tuned.with_demos(fresh))
        found.append(tuned.with_demos({part.predictor: NO_DEMOS.demos for part in tuned.parts}))
    return list({candidate.key: candidate for candidate in found}.values())


def _trained(run: Run, *, demos_ahead: bool, otherwise: str) -> Trained | None:
    """Tuned weights, or None and a note where there is nothing to train on or the training went astray."""
    try:
        return run.train(demos_ahead=demos_ahead)
    except (NoTrainingRowsError, TrainingDivergedError) as error:
        text = f"no weights were trained, {otherwise}: {error}"
        if text not in run.notes:
            run.note(text, headline=True)
            run.progress.say(text)
        return None


def _joint(run: Run, allowance: Allowance) -> None:
    """One study over weights and prompts at once.

    Levels of the weights: as they are, tuned behind demonstrations, tuned bare, and checkpoints of both trainings.
    """
    levels: list[WeightsLevel] = []
    others: list[WeightsLevel] = []
    for demos_ahead in (True, False):
        trained = _trained(run, demos_ahead=demos_ahead, otherwise="prompts are searched without such weights")
        if trained is None:
            continue
        run.note(f"joint: {trained.note}")
        levels.append(level_of(run.incumbent.with_lms(trained.lms)))
        others.extend(checkpoint_levels(run.incumbent, trained.lms, n=run.settings.n_checkpoints))

    def starts(instructions: InstructionSets, demos: DemoSets) -> Sequence[Point]:
        first = {f"{name}.demos": sets[0].name for name, sets in demos.items()}
        bare = {f"{name}.demos": NO_DEMOS.name for name in demos}
        tuned = [{"weights": levels[0].name, **first}, {"weights": levels[-1].name, **bare}] if levels else []
        return [*tuned, *starting_points(instructions, demos)]

    search_in_rounds(run, allowance, name="joint", levels=[*levels, *others], first_starts=starts)


def _ensemble(run: Run) -> None:
    """The best programs of the run, asked together."""
    best_first = sorted(allowed(run), key=run.validation.mean, reverse=True)
    candidate = ensemble_of(best_first, kwargs=run.settings.optimizer_kwargs.get("ensemble"))
    run.validation.complete(candidate, allowance=Replays(run.scope, math.inf), phase=Phase.SEARCH)
    run.adopt(candidate, what=candidate.structure)
