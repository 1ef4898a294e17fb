"""The steps of a strategy: what each proposes, and under which condition it replaces the incumbent.

    p                        rounds of studies over instructions and demonstrations
    demos -> instructions    one study after the other, in cycles, until converged
    w                        a training; the tuned weights under whichever prompt serves them best
    joint                    rounds of studies over weights and prompts at once
    gepa, miprov2, ...       one of DSPy's own optimizers
    ensemble                 the run's best programs asked together

A step ends by itself, with its share of the calls, or with the budget; whatever ends it, the incumbent is the best
program so far.

**When no answer parses** there is nothing to choose by, but prompts and weights can cure it: a model that answers in
prose learns the format from demonstrations or from training. So a run goes on as long as a lever is left that was not
tried: a step that moves prompts alone is left out once prompts were searched and nothing parsed, one that trains
weights alone once weights were trained, one that does both once both were; and the run ends there.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import dspy
import numpy as np
from dspy import teleprompt

from copa_harness.errors import BudgetExhausted, ConfigurationError, NoTrainingRowsError, TrainingDivergedError
from copa_harness.formatting import counted
from copa_harness.optimize.adoption import allowed
from copa_harness.optimize.dspy_optimizers.contract import OptimizerJob
from copa_harness.optimize.dspy_optimizers.kwargs import ENSEMBLE_KWARGS, check_kwargs
from copa_harness.optimize.dspy_optimizers.registry import run_optimizer
from copa_harness.optimize.propose.demos import labelled_demos, random_demos
from copa_harness.optimize.propose.proposer import starting_points
from copa_harness.optimize.run import NO_ANSWER_PARSES
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.space import (
    NO_DEMOS,
    WEIGHTS,
    DemoSet,
    InstructionOption,
    Point,
    Space,
    WeightsChoice,
    weights_choice,
)
from copa_harness.optimize.search.study import PERFECT
from copa_harness.optimize.step_budget import CallBudget, OutOfCalls, Replays
from copa_harness.optimize.weights import Trained, WeightsJob
from copa_harness.results import Phase
from copa_harness.strategy import Step, StepKind

if TYPE_CHECKING:
    from copa_harness.optimize.run import Run

logger = logging.getLogger("copa_harness")

MIN_FULL_SCORES = 3
"""Full scores a round must be able to pay for: less teaches nothing that the next round could use."""

ENSEMBLE_SIZE = 3
"""Members unless said otherwise: the fewest that can outvote one."""

InstructionSets = Mapping[str, Sequence[InstructionOption]]

DemoSets = Mapping[str, Sequence[DemoSet]]


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
        run.stop("out of reach", reason, headline=True)
        return
    pulled: set[str] = set()
    for i, step in enumerate(steps):
        if run.score >= PERFECT:
            run.stop("perfect score", f"perfect score on validation before step {i + 1} ({step})")
            return
        if run.validation.nothing_parses and pulled >= _levers_of(step):
            _give_up(run, before=f"step {i + 1} ({step})")
            return
        with run.step(f"{i + 1}: {step}" if len(steps) > 1 else str(step)):
            _take(run, step, steps[i + 1 :])
        pulled |= _levers_of(step)
    if run.validation.nothing_parses and run.stopped in ("completed", "converged", "max_cycles"):
        _give_up(run)
    if run.score >= PERFECT and run.stopped == "completed":
        run.stop("perfect score")


_LEVERS: Mapping[str, frozenset[str]] = {
    "w": frozenset({"weights"}),
    "bootstrap_finetune": frozenset({"weights"}),
    "joint": frozenset({"prompts", "weights"}),
    "better_together": frozenset({"prompts", "weights"}),
    "ensemble": frozenset(),
}
"""What steps change, by name; all others prompts."""


def _levers_of(step: Step) -> frozenset[str]:
    return _LEVERS.get(step.name, frozenset({"prompts"}))


def _give_up(run: Run, *, before: str = "") -> None:
    """End a run in which nothing parses, and say what would help."""
    text = f"no answer parses, of {counted(run.validation.n_programs_unparsed, 'program')} tried"
    if before:
        text += f"; {before} and what follows is left out, since it would try the same again"
    run.stop(NO_ANSWER_PARSES, text, headline=True)
    run.note(run.how_to_parse)
    run.progress.say(f"{text}; {run.how_to_parse}", urgent=True)


def _take(run: Run, step: Step, later: Sequence[Step]) -> None:
    allowance = run.share(step, later)
    try:
        if step.kind is StepKind.WEIGHTS:
            _weights(run, allowance, later=later)
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
        run.stop("budget", f"the budget ended step {step}; the best program so far is kept")


# -- prompts


def _prompts(run: Run, allowance: CallBudget) -> None:
    """Studies over instructions and demonstrations, and over the other weights there are, those as given too."""
    own = weights_choice(run.incumbent)
    others = [choice for choice in run.weights_choices() if choice.name != own.name]

    def starts(instructions: InstructionSets, demos: DemoSets) -> Sequence[Point]:
        return starting_points(instructions, demos, weights=(own, *others))

    search_in_rounds(run, allowance, name="p", weights=lambda: others, first_starts=starts)


def search_in_rounds(
    run: Run,
    allowance: CallBudget,
    *,
    name: str,
    weights: Callable[[], Sequence[WeightsChoice]],
    first_starts: Callable[[InstructionSets, DemoSets], Sequence[Point]],
) -> None:
    """Search instructions, demonstrations and weights in `n_rounds` studies.

    Every round may use half of what is left, the last one all of it; a round whose half does not pay for
    `MIN_FULL_SCORES` is the last.

    Args:
        run: Proposes, searches and adopts.
        allowance: Calls of all rounds together.
        name: Of the first study; later ones are numbered.
        weights: Asked in every round, after its proposals: the weights beside the incumbent's.
        first_starts: Points the first study begins with, from its proposals.
    """
    n_rounds = run.settings.n_rounds
    for number in range(1, n_rounds + 1):
        cost = run.full_score_cost
        if run.score >= PERFECT or (number > 1 and not allowance.can_afford(cost)):
            return
        half = run.fraction(allowance, 1 / 2)
        share = half if number < n_rounds and half.can_afford(MIN_FULL_SCORES * cost) else allowance
        demos = run.demo_options(share)
        instructions = run.instruction_options(share)
        choices = weights()
        starts = first_starts(instructions, demos) if number == 1 else _fresh_starts(instructions, demos)
        space = Space.around(run.incumbent, weights=choices, instructions=instructions, demos=demos)
        title = name if number == 1 else f"{name}, round {number}"
        if run.search(space, share, phase=Phase.SEARCH, name=title, starts=starts) in (
            "no head-room",
            NO_ANSWER_PARSES,
        ):
            return


def instruction_starts(instructions: InstructionSets) -> list[Point]:
    """Every instruction once, all predictors alike."""
    longest = max(len(options) for options in instructions.values())
    return [
        {f"{name}.instruction": options[min(i, len(options) - 1)].name for name, options in instructions.items()}
        for i in range(longest)
    ]


def _fresh_starts(instructions: InstructionSets, demos: DemoSets) -> list[Point]:
    """Every fresh set with the incumbent's instruction, then every instruction with the incumbent's demonstrations."""
    longest = max((len(sets) for sets in demos.values()), default=0)
    shown = [
        {f"{name}.demos": sets[min(i, len(sets) - 1)].name for name, sets in demos.items()} for i in range(longest)
    ]
    return [*shown, *instruction_starts(instructions)]


def _alternate(run: Run, allowance: CallBudget) -> None:
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
        if run.validation.nothing_parses:
            return
        if run.score < PERFECT:
            instructions = run.instruction_options(cycle_share)
            space = Space.around(run.incumbent, instructions=instructions)
            name, starts = f"instructions {cycle + 1}", instruction_starts(instructions)
            run.search(space, cycle_share, phase=Phase.INSTRUCTIONS, name=name, starts=starts)
        if run.score >= PERFECT:
            run.stop("perfect score")
            return
        if not allowance.can_afford(run.full_score_cost):
            run.stop("budget")
            return
        noise = run.validation.standard_error(run.incumbent, first) if run.settings.epsilon else 0.0
        if run.score - before < run.settings.epsilon or 0 < run.score - before <= noise + 1e-9:
            why = (
                f"less than epsilon {run.settings.epsilon:g}"
                if run.score - before < run.settings.epsilon
                else f"no more than the noise (a standard error of {noise:.3f}, paired)"
            )
            improved = f"cycle {cycle + 1} improved validation by {run.score - before:+.3f}"
            run.stop("converged", f"converged: {improved}, {why}")
            return
    said = f"stopped after max_cycles = {run.settings.max_cycles} cycles, the last of which still improved"
    run.stop("max_cycles", said)


# -- weights


def _weights(run: Run, allowance: CallBudget, *, later: Sequence[Step]) -> None:
    """Train, and adopt tuned weights under whichever prompts they serve best, if that is not worse.

    The bare training's weights are scored under the prompts as written, always and in full: what `w` alone finds. What
    else there is, other weights and the best prompts so far, races within this step's share. Where there is nothing to
    train on the program stays as it is, unless weights are all that was asked for.
    """
    demos_ahead = any(step.kind is not StepKind.WEIGHTS for step in later)
    is_all = run.n_steps == 1 and not later
    found, whole = run.incumbent, CallBudget(run.scope, math.inf)
    tuned: list[Trained] = []
    for job in run.weights_jobs(demos_ahead=demos_ahead):
        otherwise = "" if is_all and not tuned else "the weights stay as they are"
        trained = _trained(run, job, otherwise=otherwise)
        if trained is None:
            continue
        run.note(f"w: {trained.note}")
        if not tuned:
            run.validation.complete(trained.prompts, allowance=whole, phase=Phase.WEIGHTS)
            run.adopt(trained.prompts, what="w: tuned weights")
        tuned.append(trained)
    if tuned and run.score < PERFECT:
        _serve(run, allowance, tuned, found, is_last=not later)


def _serve(run: Run, allowance: CallBudget, tuned: Sequence[Trained], found: Candidate, *, is_last: bool) -> None:
    """Race a step's weights under the best prompts before it and behind fresh demonstrations, in one study.

    The last step's study goes on to the other combinations; else what follows shall have its share.
    """
    instructions: dict[str, Sequence[InstructionOption]] = {}
    demos: dict[str, Sequence[DemoSet]] = {}
    n_demos = tuned[-1].n_demos
    predictors = zip(run.plain.parts, found.parts, run.plain.template.named_predictors(), strict=True)
    for i, (plain, best, (name, predictor)) in enumerate(predictors):
        instructions[name] = (
            InstructionOption("found", best.instruction),
            InstructionOption("plain", plain.instruction),
        )
        generator = np.random.default_rng([run.settings.seed, run.n_steps, i, 707])
        fresh = random_demos(labelled_demos(predictor.signature, run.context.trainset), n_demos, generator)
        own = DemoSet("found", best.demos) if best.demos else NO_DEMOS
        demos[name] = (own, NO_DEMOS, DemoSet("fresh", fresh) if fresh else own)
    best_instructions = {f"{name}.instruction": "found" for name in instructions}
    # Last the bare weights behind demonstrations, which rarely serve them: few calls may be left.
    plan = [(tuned[-1], 0)] + [(tuned[-1], -1)] * (n_demos > 0) + [(one, 0) for one in tuned[:-1]]
    starts: list[Point] = [
        {WEIGHTS: weights_choice(one.prompts).name, **best_instructions}
        | {f"{name}.demos": sets[which].name for name, sets in demos.items()}
        for one, which in plan
    ]
    weights = [weights_choice(one.prompts) for one in tuned]
    space = Space.around(run.incumbent, weights=weights, instructions=instructions, demos=demos)
    if all(run.validation.is_complete(space.candidate(start)) for start in starts):
        return
    max_trials = None if is_last else len(starts) + 1
    run.search(space, allowance, phase=Phase.WEIGHTS, name="w", starts=starts, max_trials=max_trials)


def _trained(run: Run, job: WeightsJob, *, otherwise: str) -> Trained | None:
    """Tuned weights, or None and a note where there is nothing to train on or the training went astray.

    Without a word of what happens otherwise that is an error.
    """
    try:
        return run.train(job)
    except (NoTrainingRowsError, TrainingDivergedError) as error:
        if not otherwise:
            raise
        text = f"no weights were trained, {otherwise}: {error}"
        if text not in run.notes:
            run.note(text, headline=True)
            run.progress.say(text)
        return None


def _in_turn(first: Sequence[Point], second: Sequence[Point]) -> list[Point]:
    """One of the first, one of the second, and so on."""
    return [point for pair in zip_longest(first, second) for point in pair if point is not None]


def _joint(run: Run, allowance: CallBudget) -> None:
    """Studies over weights and prompts at once.

    Weights to choose from: as they are, tuned bare, and tuned behind demonstrations. Behind demonstrations a small
    model is trained at once, a large one before the second round, if the best program of the first shows some. First of
    all the bare weights are tried under the prompts as written, which is what `w` alone finds; then what `p` would
    begin with, and other prompts on the tuned weights, in turn.
    """
    trained: list[Trained] = []

    def weights() -> Sequence[WeightsChoice]:
        for job in run.weights_jobs(demos_ahead=not trained):
            if any(bool(one.n_demos) == bool(job.n_demos) for one in trained):
                continue
            one = _trained(run, job, otherwise="prompts are searched without such weights")
            if one is not None:
                run.note(f"joint: {one.note}")
                trained.append(one)
        return [weights_choice(one.prompts) for one in trained]

    def starts(instructions: InstructionSets, demos: DemoSets) -> Sequence[Point]:
        first: list[Point] = []
        tuned: list[Point] = []
        for one in trained:
            points = starting_points(instructions, demos, weights=(weights_choice(one.prompts),))
            shown, bare = points[: len(points) // 2], points[len(points) // 2 :]
            first.append(shown[0] if one.n_demos else bare[0])
            tuned.extend(_in_turn(shown, bare))
        return [*first, *_in_turn(starting_points(instructions, demos), tuned)]

    search_in_rounds(run, allowance, name="joint", weights=weights, first_starts=starts)


# -- DSPy's optimizers


def optimizer_step(run: Run, step: Step, allowance: CallBudget) -> None:
    """A DSPy optimizer on the incumbent; its result is adopted if it is not worse on validation.

    A result that breaks a limit is repaired where that can be done (required texts are appended, demonstrations with
    forbidden ones left out), else the next best of the programs it evaluated takes its place.

    Raises:
        OutOfCalls: The allowance does not reach for the optimizer, or the budget for scoring what it found.
    """
    from copa_harness.optimize.dspy_optimizers.builders import scores_its_result

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
        trainset=run.constraints.allowed_examples(run.context.trainset),
        valset=run.validation.examples,
        metric=run.context.metric,
        allowance=CallBudget(run.scope, run.scope.charged_calls + allowance.remaining - reserved),
        calls_per_example=run.validation.calls_per_example(run.incumbent),
        prompt_lm=run.context.prompt_lm,
        threads=run.settings.threads,
        seed=run.settings.seed,
        n_demos=run.settings.max_demos,
        kwargs=kwargs,
        teacher=run.context.teacher,
        min_score=run.settings.pass_score,
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
            whole = Replays(run.scope, math.inf) if is_free else CallBudget(run.scope, math.inf)
            try:
                run.validation.complete(candidate, allowance=whole, phase=Phase.SEARCH)
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


# -- ensemble


def _ensemble(run: Run) -> None:
    """The best programs of the run, asked together."""
    best_first = sorted(allowed(run), key=run.validation.mean, reverse=True)
    candidate = ensemble_of(best_first, kwargs=run.settings.optimizer_kwargs.get("ensemble"))
    run.validation.complete(candidate, allowance=Replays(run.scope, math.inf), phase=Phase.SEARCH)
    run.adopt(candidate, what=candidate.structure)


def ensemble_of(candidates: Sequence[Candidate], *, kwargs: Mapping[str, Any] | None = None) -> Candidate:
    """The first candidates asked together, by DSPy's `Ensemble`: their answers put to the vote, or averaged.

    Every member keeps its prompts and its weights. On validation it costs no call: its members' answers are known
    there. In use every answer costs one run of each member.

    Args:
        candidates: Fully scored candidates, best first.
        kwargs: `size` (members, at least 2) and `reduce` ("majority" or "mean").

    Raises:
        ConfigurationError: Fewer than two candidates, or an argument that cannot be used.
    """
    check_kwargs("ensemble", kwargs or {}, known=ENSEMBLE_KWARGS)
    given = {"size": ENSEMBLE_SIZE, "reduce": "majority", **(kwargs or {})}
    size, reduce = given["size"], given["reduce"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise ConfigurationError(f"got size={size!r} for ensemble; expected a whole number of at least 2")
    if reduce not in REDUCERS:
        raise ConfigurationError(f"got reduce={reduce!r} for ensemble; expected one of {', '.join(REDUCERS)}")
    members = [one for one in candidates if not one.structure][:size]
    if len(members) < 2:
        raise ConfigurationError(
            f"got {len(members)} fully scored program for an ensemble; expected at least 2: let a step that searches "
            "come before it, 'p -> ensemble'"
        )
    program = teleprompt.Ensemble(reduce_fn=REDUCERS[reduce]).compile([member.program() for member in members])
    return Candidate.of(program, lm=members[0].lms[0], structure=f"ensemble of {len(members)} by {reduce}")


def majority(predictions: Sequence[Any]) -> Any:
    """The first prediction that gives the commonest answer; the better member's when several are equally common.

    Answers are compared by all output fields, letter case and outer spaces aside.
    """
    counts = Counter(_answer(prediction) for prediction in predictions)
    most = max(counts.values())
    return next(prediction for prediction in predictions if counts[_answer(prediction)] == most)


def mean(predictions: Sequence[Any]) -> Any:
    """A prediction whose numeric fields are averages; what is no number is the first member's.

    Numbers written as text count as numbers, and stay text.
    """
    fields = dict(predictions[0].items())
    for name, first in fields.items():
        try:
            values = [float(prediction[name]) for prediction in predictions]
        except (TypeError, ValueError, KeyError):
            continue
        average = sum(values) / len(values)
        fields[name] = f"{average:g}" if isinstance(first, str) else average
    return dspy.Prediction(**fields)


def _answer(prediction: Any) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((str(name), str(value).strip().casefold()) for name, value in prediction.items()))


REDUCERS: dict[str, Callable[[Sequence[Any]], Any]] = {"majority": majority, "mean": mean}
"""How answers become one."""
