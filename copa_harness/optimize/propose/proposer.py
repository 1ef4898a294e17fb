"""Gathers what a prompt step may choose from: demonstration sets and instructions for every predictor.

The order of options matters in one way only: starting points are made from the first ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from copa_harness.optimize.options import SearchOptions
from copa_harness.optimize.propose.demos import (
    DemoSource,
    StratifiedDemo,
    bootstrapped_demos,
    labelled_demos,
    set_sizes,
    sets_from,
    wants_bootstrap,
)
from copa_harness.optimize.propose.instructions import rule_based
from copa_harness.optimize.propose.reflection import find_failures
from copa_harness.optimize.propose.render import Failure
from copa_harness.optimize.propose.writer import InstructionWriter
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.space import NO_DEMOS, WEIGHTS, DemoSet, InstructionOption, Point, WeightsChoice
from copa_harness.optimize.search.trial_memory import SearchMemory
from copa_harness.optimize.step_budget import CallBudget

if TYPE_CHECKING:
    from copa_harness.optimize.search_context import SearchContext

LOOK_SHARE = 0.6
"""Of a full score, what a look at a candidate costs on average, raced."""

MIN_DEMO_SETS, MAX_DEMO_SETS = 6, 32
"""Bounds of how many demonstration sets are proposed at once where the number is not given."""


def propose_demos(
    context: SearchContext, incumbent: Candidate, *, allowance: CallBudget, memory: SearchMemory, seed: Sequence[int]
) -> dict[str, tuple[DemoSet, ...]]:
    """Demonstration sets by predictor, the empty set last.

    How the sets are chosen is itself chosen: in turn at first, then by what has gained most so far.

    Args:
        context: Source of demonstrations, and how many of them.
        incumbent: Whose predictors, and whose answers when bootstrapping.
        allowance: Calls the search over the sets may use; bootstrapping takes a share of them.
        memory: The run's.
        seed: Entropy of the random draws.
    """
    settings, program = context.settings, incumbent.program()
    n_sets = n_demo_sets(settings, calls=allowance.remaining, full_score=context.full_score_cost(incumbent))
    bootstrapped: Mapping[str, list[StratifiedDemo]] = {}
    if settings.max_demos > 0 and wants_bootstrap(context, program):
        bootstrapped = bootstrapped_demos(context, incumbent, allowance=allowance, seed=seed)
    sizes, mistakes = set_sizes(settings.max_demos, n_sets), context.validation.mistakes(incumbent)
    options: dict[str, tuple[DemoSet, ...]] = {}
    for i, (name, module) in enumerate(program.named_predictors()):
        sources = (
            DemoSource("bootstrapped", name, module, bootstrapped.get(name, [])),
            DemoSource("labelled", name, module, labelled_demos(module.signature, context.trainset)),
        )
        sets: list[DemoSet] = []
        for j, source in enumerate(sources):
            if source.demos:
                generator = np.random.default_rng([*seed, i, j])
                sets += sets_from(source, sizes=sizes, memory=memory, mistakes=mistakes, generator=generator)
        options[name] = (*sets, NO_DEMOS)
    return options


def n_demo_sets(settings: SearchOptions, *, calls: float, full_score: float) -> int:
    """How many sets per predictor and source: as given, else in proportion to what can be looked at.

    Args:
        settings: What is proposed.
        calls: What the search over the proposals may use, `inf` for no bound.
        full_score: Calls of scoring a candidate in full.
    """
    if settings.n_demo_sets is not None:
        return settings.n_demo_sets
    n = MAX_DEMO_SETS if math.isinf(calls) else round(calls / (LOOK_SHARE * full_score))
    return min(MAX_DEMO_SETS, max(MIN_DEMO_SETS, n))


def propose_instructions(
    context: SearchContext,
    incumbent: Candidate,
    *,
    allowance: CallBudget,
    memory: SearchMemory,
    past: Mapping[str, Sequence[tuple[str, float]]] | None = None,
    first_rollout: int = 1,
) -> dict[str, tuple[InstructionOption, ...]]:
    """Instructions by predictor, the plain one first.

    Labels and rules are appended to the student's own instructions, never to each other; where there is a prompt LM it
    writes some more.

    Args:
        context: Rows that labels and rules are learned from and mistakes are looked for on; the prompt LM.
        incumbent: Whose predictors, and whose mistakes are reflected on.
        allowance: Bounds the prompt LM's calls and the incumbent's on the rows looked at.
        memory: The run's.
        past: Instructions tried before with their scores, by predictor.
        first_rollout: Rollout id of the first proposal.
    """
    settings = context.settings
    written: Mapping[str, Sequence[InstructionOption]] = {}
    if context.prompt_lm is not None and settings.n_proposed > 0:
        failures: Mapping[str, Sequence[Failure]] = {}
        if settings.n_reflected > 0:
            failures = find_failures(context, incumbent, allowance=allowance, generator=memory.generator())
        writer = InstructionWriter(context, incumbent, memory=memory, past=past or {}, failures=failures)
        written = writer.write(allowance, first_rollout=first_rollout)
    return {
        name: (*_without_a_model(context, name, predictor.signature, memory), *written.get(name, ()))
        for name, predictor in incumbent.template.named_predictors()
    }


def _without_a_model(
    context: SearchContext, predictor: str, signature: Any, memory: SearchMemory
) -> tuple[InstructionOption, ...]:
    """Plain, rules, labels."""
    trainset, plain = context.trainset, context.plain_instruction(predictor)
    demos = [demo for demo, _ in labelled_demos(signature, trainset)] if trainset else []
    weights = memory.row_weights(predictor, demos) if len(demos) == len(trainset) else None
    seed = context.settings.seed
    proposals = rule_based(predictor, signature, plain, trainset=trainset, seed=seed, row_weights=weights)
    for proposal in proposals:
        memory.note_instruction(predictor, proposal.option.text, f"instruction: {proposal.arm}")
    return tuple(proposal.option for proposal in proposals)


def starting_points(
    instructions: Mapping[str, Sequence[InstructionOption]],
    demos: Mapping[str, Sequence[DemoSet]],
    *,
    weights: Sequence[WeightsChoice] = (),
) -> tuple[Point, ...]:
    """Points worth trying before the sampler knows anything, for all predictors alike.

    For every choice of weights: every instruction with a demonstration set of its own, then every instruction without
    demonstrations. No two of the former share a set, as a start that fails says nothing about either alone.
    """
    n_instructions = max((len(options) for options in instructions.values()), default=0)
    points: list[Point] = []
    for choice in weights or (None,):
        base = {} if choice is None else {WEIGHTS: choice.name}
        for with_demos in (True, False):
            for i in range(max(1, n_instructions)):
                point = dict(base)
                for name, options in instructions.items():
                    if options:
                        point[f"{name}.instruction"] = options[min(i, len(options) - 1)].name
                for name, sets in demos.items():
                    shown = [one for one in sets if one.demos] or [NO_DEMOS]
                    point[f"{name}.demos"] = shown[i % len(shown)].name if with_demos else NO_DEMOS.name
                points.append(point)
    return tuple(points)
