"""Gathers what a prompt phase may choose from: demonstration sets and instructions for every predictor.

The order of options matters in one way only: starting points are made from the first ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import dspy
import numpy as np

from copa_harness.evaluate.metrics import Metric
from copa_harness.optimize.budget import Allowance
from copa_harness.optimize.options import SearchOptions
from copa_harness.optimize.propose.demos import bootstrapped, labelled_pool, sets_from, settle, wants_bootstrap
from copa_harness.optimize.propose.instructions import rule_based
from copa_harness.optimize.propose.reflection import find_failures
from copa_harness.optimize.propose.render import Failure
from copa_harness.optimize.propose.writer import InstructionWriter
from copa_harness.optimize.search.bandit import Knowledge, input_key
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.space import NO_DEMOS, WEIGHTS, DemoSet, InstructionOption, Point, WeightsLevel

LOOK_SHARE = 0.6
"""Of a full score, what a look at a candidate costs on average, raced."""

MIN_DEMO_SETS, MAX_DEMO_SETS = 6, 32
"""Bounds of how many demonstration sets are proposed at once where the number is not given."""


def sized(settings: SearchOptions, *, calls: float, full_score: float) -> SearchOptions:
    """The settings with a number of demonstration sets, in proportion to what can be looked at unless it is given.

    Args:
        settings: What is proposed.
        calls: What the search over the proposals may use, `inf` for no bound.
        full_score: Calls of scoring a candidate in full.
    """
    if settings.n_demo_sets is not None:
        return settings
    n = MAX_DEMO_SETS if math.isinf(calls) else round(calls / (LOOK_SHARE * full_score))
    return replace(settings, n_demo_sets=min(MAX_DEMO_SETS, max(MIN_DEMO_SETS, n)))


def propose_demos(
    incumbent: Candidate,
    *,
    trainset: Sequence[dspy.Example],
    metric: Metric,
    settings: SearchOptions,
    allowance: Allowance,
    threads: int,
    seed: Sequence[int],
    calls_per_example: int,
    teacher: dspy.Module | None = None,
    knowledge: Knowledge | None = None,
    mistakes: Sequence[dspy.Example] = (),
) -> dict[str, tuple[DemoSet, ...]]:
    """Demonstration sets by predictor, the empty set last.

    How the sets are chosen is itself chosen: in turn at first, then by what has gained most so far (`Learner`).

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
        knowledge: The run's memory; a fresh one by default.
        mistakes: Examples the incumbent answers wrong, whose neighbours may be worth showing.
    """
    memory = knowledge if knowledge is not None else Knowledge()
    program = incumbent.program()
    traced: Mapping[str, list[tuple[dspy.Example, str]]] = {}
    if settings.max_demos > 0 and wants_bootstrap(program, trainset, settings):
        traced = bootstrapped(
            teacher or program, trainset, metric, settings, allowance, threads, seed, calls_per_example
        )
    if settings.max_demos > 0:
        settle(
            incumbent,
            trainset,
            metric=metric,
            settings=settings,
            allowance=allowance,
            threads=threads,
            calls_per_example=calls_per_example,
            memory=memory,
            generator=np.random.default_rng([*seed, 505]),
        )
    options: dict[str, tuple[DemoSet, ...]] = {}
    for i, (name, predictor) in enumerate(program.named_predictors()):
        sets: list[DemoSet] = []
        for j, (source, pool) in enumerate(
            (("bootstrapped", traced.get(name, [])), ("labelled", labelled_pool(predictor.signature, trainset)))
        ):
            if pool:
                generator = np.random.default_rng([*seed, i, j])
                sets.extend(
                    sets_from(
                        pool,
                        source=source,
                        predictor=name,
                        signature=predictor.signature,
                        settings=settings,
                        memory=memory,
                        mistakes=mistakes,
                        instruction=predictor.signature.instructions,
                        shown=predictor.demos,
                        generator=generator,
                    )
                )
        options[name] = (*sets, NO_DEMOS)
    return options


def propose_instructions(
    incumbent: Candidate,
    *,
    plain: Mapping[str, str],
    trainset: Sequence[dspy.Example],
    settings: SearchOptions,
    allowance: Allowance,
    seed: int,
    prompt_lm: Any = None,
    metric: Metric | None = None,
    threads: int = 1,
    calls_per_example: int = 1,
    past: Mapping[str, Sequence[tuple[str, float]]] | None = None,
    first_rollout: int = 1,
    knowledge: Knowledge | None = None,
) -> dict[str, tuple[InstructionOption, ...]]:
    """Instructions by predictor, the plain one first.

    Args:
        incumbent: Whose predictors, and whose mistakes are reflected on.
        plain: The student's own instructions; labels and rules are appended to these, never to each other.
        trainset: Rows that labels and rules are learned from, and that mistakes are looked for on.
        settings: Numbers and groundings.
        allowance: Bounds the prompt LM's calls and the incumbent's on the rows looked at.
        seed: For ties in the rules.
        prompt_lm: Writes proposals when given. Never the task model by default: a small one cannot.
        metric: Finds the mistakes; without one nothing is reflected on.
        threads: Examples in flight at once.
        calls_per_example: Upper estimate, for the allowance.
        past: Instructions tried before with their scores, by predictor.
        first_rollout: Rollout id of the first proposal.
        knowledge: The run's memory; a fresh one by default.
    """
    memory = knowledge if knowledge is not None else Knowledge()
    options: dict[str, tuple[InstructionOption, ...]] = {}
    written: Mapping[str, Sequence[InstructionOption]] = {}
    if prompt_lm is not None and settings.n_proposed > 0:
        failures: Mapping[str, Sequence[Failure]] = {}
        if metric is not None and settings.n_reflected > 0:
            failures = find_failures(
                incumbent,
                trainset,
                metric=metric,
                settings=settings,
                allowance=allowance,
                threads=threads,
                calls_per_example=calls_per_example,
                generator=memory.generator(),
            )
        writer = InstructionWriter(
            prompt_lm,
            incumbent=incumbent,
            trainset=trainset,
            settings=settings,
            memory=memory,
            past=past or {},
            failures=failures,
        )
        written = writer.write(allowance, first_rollout=first_rollout)
    for name, predictor in incumbent.template.named_predictors():
        found = list(_ruled(name, predictor.signature, plain[name], trainset, seed=seed, memory=memory))
        options[name] = (*found, *written.get(name, ()))
    return options


def _ruled(
    name: str, signature: Any, plain: str, trainset: Sequence[dspy.Example], *, seed: int, memory: Knowledge
) -> tuple[InstructionOption, ...]:
    """What needs no model: plain, rules, labels; what a rule settles is remembered for the demonstrations."""
    pool = [demo for demo, _ in labelled_pool(signature, trainset)] if trainset else []
    stress = memory.stress_of(name, pool) if len(pool) == len(trainset) else None
    proposals = rule_based(name, signature, plain, trainset=trainset, seed=seed, stress=stress)
    fields = tuple(signature.input_fields)
    for proposal in proposals:
        memory.note_instruction(name, proposal.option.text, f"instruction: {proposal.arm}")
        if proposal.answered is not None:
            keys = [input_key(example, fields) for example in trainset]
            memory.note_settled(proposal.option.text, dict(zip(keys, proposal.answered, strict=True)))
    return tuple(proposal.option for proposal in proposals)


def starting_points(
    instructions: Mapping[str, Sequence[InstructionOption]],
    demos: Mapping[str, Sequence[DemoSet]],
    *,
    weights: Sequence[WeightsLevel] = (),
) -> tuple[Point, ...]:
    """Points worth trying before the sampler knows anything, for all predictors alike.

    For every weights level: every instruction with a demonstration set of its own, then every instruction without
    demonstrations. No two of the former share a set, as a start that fails says nothing about either alone.
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
                    shown = [one for one in sets if one.demos] or [NO_DEMOS]
                    point[f"{name}.demos"] = shown[i % len(shown)].name if with_demos else NO_DEMOS.name
                points.append(point)
    return tuple(points)
