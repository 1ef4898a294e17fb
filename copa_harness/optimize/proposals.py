"""Gathers what a prompt phase may choose from: demonstration sets and instructions for every predictor.

The order of options matters in one way only: starting points are made from the first ones. Knows the proposers; knows
nothing of scores, samplers or how long the search will go on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
import numpy as np

from copa_harness.evaluate.metrics import Metric
from copa_harness.evaluate.runner import run_examples
from copa_harness.optimize.allowance import Allowance
from copa_harness.optimize.candidate import Candidate
from copa_harness.optimize.demos import NO_DEMOS, DemoSet, labelled_pool, random_sets, set_counts, traced_pools
from copa_harness.optimize.instructions import InstructionOption, proposed_by_lm, rule_based
from copa_harness.optimize.schema import is_fully_labelled, strata_of, stratified_order
from copa_harness.optimize.space import WEIGHTS, Point, WeightsLevel
from copa_harness.results import Phase

logger = logging.getLogger("copa_harness")

BOOTSTRAP_SHARE = 0.2
"""At most this share of a step's calls goes into bootstrapping; the rest is for finding out what is good."""


@dataclass(frozen=True, slots=True)
class ProposalSettings:
    """What is proposed.

    Attributes:
        max_demos: Demonstrations in the largest sets; 0 proposes none.
        n_demo_sets: Random sets per predictor and source.
        bootstrap: Run the program on training examples for demonstrations from passing traces. None does so exactly
            when a predictor has an output that the examples do not hold (reasoning, intermediate steps): where they
            hold all of them, a bootstrapped demonstration is the labelled one again, and not worth a call.
        min_score: Score from which a trace passes, 0..1.
        n_proposed: Instructions asked of the prompt LM, per predictor and phase.
    """

    max_demos: int = 9
    n_demo_sets: int = 12
    bootstrap: bool | None = None
    min_score: float = 1.0
    n_proposed: int = 4


def propose_demos(
    incumbent: Candidate,
    *,
    trainset: Sequence[dspy.Example],
    metric: Metric,
    settings: ProposalSettings,
    allowance: Allowance,
    threads: int,
    seed: Sequence[int],
    calls_per_example: int,
    teacher: dspy.Module | None = None,
) -> dict[str, tuple[DemoSet, ...]]:
    """Demonstration sets by predictor, the empty set last.

    Args:
        incumbent: Whose predictors, and whose answers when bootstrapping.
        trainset: Where demonstrations are taken from.
        metric: Decides which traces pass.
        settings: Sizes and numbers.
        allowance: Bounds bootstrapping.
        threads: Examples in flight at once.
        seed: Entropy of the random draws.
        calls_per_example: Upper estimate, for the allowance.
        teacher: Program to bootstrap from instead of the incumbent; must have the same predictors.
    """
    program = incumbent.program()
    traced: Mapping[str, list[tuple[dspy.Example, str]]] = {}
    if settings.max_demos > 0 and _wants_bootstrap(program, trainset, settings):
        traced = _bootstrapped(
            teacher or program, trainset, metric, settings, allowance, threads, seed, calls_per_example
        )
    options: dict[str, tuple[DemoSet, ...]] = {}
    for i, (name, predictor) in enumerate(program.named_predictors()):
        sets: list[DemoSet] = []
        counts = set_counts(settings.max_demos, settings.n_demo_sets)
        for j, (label, pool) in enumerate(
            (("bootstrapped", traced.get(name, [])), ("labelled", labelled_pool(predictor.signature, trainset)))
        ):
            generator = np.random.default_rng([*seed, i, j])
            sets.extend(random_sets(pool, label=label, counts=counts, generator=generator))
        options[name] = (*sets, NO_DEMOS)
    return options


def _wants_bootstrap(program: dspy.Module, trainset: Sequence[dspy.Example], settings: ProposalSettings) -> bool:
    if settings.bootstrap is not None:
        return settings.bootstrap
    return not all(is_fully_labelled(predictor.signature, trainset) for _, predictor in program.named_predictors())


def _bootstrapped(
    program: dspy.Module,
    trainset: Sequence[dspy.Example],
    metric: Metric,
    settings: ProposalSettings,
    allowance: Allowance,
    threads: int,
    seed: Sequence[int],
    calls_per_example: int,
) -> dict[str, list[tuple[dspy.Example, str]]]:
    """Passing traces from as many training examples as the bootstrap share of the allowance pays for."""
    share = allowance.remaining * BOOTSTRAP_SHARE / max(1, calls_per_example)
    n = len(trainset) if math.isinf(share) else min(len(trainset), int(share))
    if n < 1:
        return {}
    order = stratified_order(strata_of(trainset), np.random.default_rng([*seed, 404]))[:n]
    examples = [trainset[i] for i in order]
    runs = run_examples(
        program, examples, metric=metric, split="train", phase=Phase.BOOTSTRAP, threads=threads, trace_to_metric=True,
        raise_if_nothing_works=False,
    )  # fmt: skip
    pools = traced_pools(program, examples, runs, min_score=settings.min_score)
    logger.info("bootstrap: %d of %d traces pass", max((len(pool) for pool in pools.values()), default=0), n)
    return pools


def propose_instructions(
    incumbent: Candidate,
    *,
    plain: Mapping[str, str],
    trainset: Sequence[dspy.Example],
    settings: ProposalSettings,
    allowance: Allowance,
    seed: int,
    prompt_lm: Any = None,
    past: Mapping[str, Sequence[tuple[str, float]]] | None = None,
    first_rollout: int = 1,
) -> dict[str, tuple[InstructionOption, ...]]:
    """Instructions by predictor, the plain one first.

    Args:
        incumbent: Whose predictors.
        plain: The student's own instructions; labels and rules are appended to these, never to each other.
        trainset: Rows that labels and rules are learned from.
        settings: Numbers.
        allowance: Bounds the prompt LM's calls.
        seed: For ties in the rules.
        prompt_lm: Writes proposals when given. Never the task model by default: a small one cannot.
        past: Instructions tried before with their scores, by predictor.
        first_rollout: Rollout id of the first proposal.
    """
    options: dict[str, tuple[InstructionOption, ...]] = {}
    current = {part.predictor: part.instruction for part in incumbent.parts}
    for name, predictor in incumbent.template.named_predictors():
        found = list(rule_based(name, predictor.signature, plain[name], trainset=trainset, seed=seed))
        if prompt_lm is not None and allowance.can_afford(settings.n_proposed):
            found.extend(
                proposed_by_lm(
                    prompt_lm, predictor=name, signature=predictor.signature, current=current[name], trainset=trainset,
                    past=(past or {}).get(name, ()), n=settings.n_proposed, first_rollout=first_rollout,
                )
            )  # fmt: skip
        options[name] = tuple(found)
    return options


def starting_points(
    instructions: Mapping[str, Sequence[InstructionOption]],
    demos: Mapping[str, Sequence[DemoSet]],
    *,
    weights: Sequence[WeightsLevel] = (),
) -> tuple[Point, ...]:
    """Points worth trying before the sampler knows anything, for all predictors alike.

    For every weights level: the first demonstration set under every instruction, then every instruction without
    demonstrations.
    """
    n_instructions = max((len(options) for options in instructions.values()), default=0)
    points: list[Point] = []
    for level in weights or (None,):
        base = {} if level is None else {WEIGHTS: level.name}
        for with_demos in (True, False):
            for i in range(max(1, n_instructions)):
                point = dict(base)
                for name, options in instructions.items():
                    if options:
                        point[f"{name}.instruction"] = options[min(i, len(options) - 1)].name
                for name, sets in demos.items():
                    point[f"{name}.demos"] = sets[0].name if with_demos else NO_DEMOS.name
                points.append(point)
    return tuple(points)
