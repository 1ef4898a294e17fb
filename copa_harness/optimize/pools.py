"""Pools of demonstrations and the sets taken from them: where rows come from, and which methods are asked for sets.

Methods are taken in turn until something is known, then drawn by the run's `Learner`. Knows examples, traces and the
run's memory; knows nothing of scores, samplers or instructions beyond what they settle.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import dspy
import numpy as np

from copa_harness.evaluate.metrics import Metric
from copa_harness.evaluate.runner import run_examples
from copa_harness.optimize.allowance import Allowance
from copa_harness.optimize.candidate import Candidate
from copa_harness.optimize.demos import (
    DemoSet,
    PoolKnowledge,
    arm_of,
    chosen_sets,
    set_counts,
    traced_pools,
)
from copa_harness.optimize.knowledge import Knowledge, demo_key, input_key
from copa_harness.optimize.schema import is_fully_labelled, strata_of, stratified_order
from copa_harness.optimize.vectors import row_vectors
from copa_harness.results import Phase

if TYPE_CHECKING:
    from copa_harness.optimize.proposals import ProposalSettings

logger = logging.getLogger("copa_harness")

DEFAULT_SETS = 12
"""Sets per pool where nobody says how many."""

BOOTSTRAP_SHARE = 0.2
"""At most this share of a step's calls goes into bootstrapping; the rest is for finding out what is good."""

TRANSFER_SHARE = 0.1
"""At most this share of a step's calls goes into what instructions settle by themselves."""

MIN_SETTLED = 8
"""Fewer examples than this say too little about it."""

UNTRIED_METHODS: tuple[str, ...] = ("typical", "random", "diverse")
"""How sets are chosen while nothing is known, in turn.

Measured on development tasks (4 tasks, 3 splits, 9 demonstrations, 6 sets each): mean test score of a set .881 typical,
.846 diverse, .834 random, .776 nearest to mistakes; of the set best on 25 validation rows .883, .855, .873, .801.
"""


def sets_from(
    pool: Sequence[tuple[dspy.Example, str]],
    *,
    source: str,
    predictor: str,
    signature: Any,
    settings: ProposalSettings,
    memory: Knowledge,
    mistakes: Sequence[dspy.Example],
    instruction: str,
    shown: Sequence[Any],
    generator: np.random.Generator,
) -> list[DemoSet]:
    """Sets from one pool, sized and chosen by what is known."""
    n_sets = DEFAULT_SETS if settings.n_demo_sets is None else settings.n_demo_sets
    sizes = [size for size, n in set_counts(settings.max_demos, n_sets).items() for _ in range(n)]
    if not sizes:
        return []
    known = _known_of(
        pool, predictor, signature, memory=memory, mistakes=mistakes, instruction=instruction, shown=shown,
        generator=generator,
    )  # fmt: skip
    learner = memory.learner
    untried = ("mutated", *UNTRIED_METHODS)
    methods = known.methods if learner.knows("demos") else [m for m in untried if m in known.methods]
    by_arm = {arm_of(source, method): method for method in methods}
    arms = learner.choose("demos", list(by_arm), n=len(sizes), generator=generator)
    made = chosen_sets(
        pool, source=source, plan=[(size, by_arm[arm]) for size, arm in zip(sizes, arms, strict=True)],
        knowledge=known, generator=generator,
    )  # fmt: skip
    for one, arm in made:
        memory.note_demos(predictor, one, f"demos: {arm}")
    return [one for one, _ in made]


def _known_of(
    pool: Sequence[tuple[dspy.Example, str]],
    predictor: str,
    signature: Any,
    *,
    memory: Knowledge,
    mistakes: Sequence[dspy.Example],
    instruction: str,
    shown: Sequence[Any],
    generator: np.random.Generator,
) -> PoolKnowledge:
    demos, fields = [demo for demo, _ in pool], tuple(signature.input_fields)
    targets = [example for example in mistakes if all(name in example for name in fields)]
    vectors = row_vectors([*demos, *targets], fields)
    answered = memory.settled_by(instruction)
    keys = [input_key(demo, fields) for demo in demos]
    places = {demo_key(demo): i for i, demo in enumerate(demos)}
    current = [places.get(demo_key(demo)) for demo in shown]
    return PoolKnowledge(
        vectors=vectors[: len(demos)],
        targets=vectors[len(demos) :],
        settled=[answered.get(key, True) for key in keys] if answered else (),
        current=[place for place in current if place is not None] if None not in current else (),
        weights=memory.weights_of(predictor, demos, n_draws=4, generator=generator),
    )


def settle(
    incumbent: Candidate,
    trainset: Sequence[dspy.Example],
    *,
    metric: Metric,
    settings: ProposalSettings,
    allowance: Allowance,
    threads: int,
    calls_per_example: int,
    memory: Knowledge,
    generator: np.random.Generator,
) -> None:
    """Find out which training examples the incumbent's written instructions answer rightly without demonstrations.

    Done once per set of instructions, once demonstrations have been tried, within the transfer share of the allowance;
    rules need no run (see `Rule.answers`), and what labels or the plain instruction settle, demonstrations settle too.

    Args:
        incumbent: Whose instructions.
        trainset: Where examples are drawn from.
        metric: Scores them.
        settings: Whether to, and from which score on an example is settled.
        allowance: Bounds how many are run.
        threads: Examples in flight at once.
        calls_per_example: Upper estimate, for the allowance.
        memory: Where the answers are remembered.
        generator: Draws the examples.
    """
    open_parts = [
        part
        for part in incumbent.parts
        if memory.is_written(part.predictor, part.instruction) and not memory.settled_by(part.instruction)
    ]
    share = allowance.remaining * TRANSFER_SHARE / max(1, calls_per_example)
    n = len(trainset) if math.isinf(share) else min(len(trainset), int(share))
    if not settings.transfer or not open_parts or not memory.learner.knows("demos") or n < MIN_SETTLED:
        return
    examples = [trainset[i] for i in stratified_order(strata_of(trainset), generator)[:n]]
    program = incumbent.with_demos({part.predictor: () for part in incumbent.parts}).program()
    runs = run_examples(
        program, examples, metric=metric, split="train", phase=Phase.DEMOS, threads=threads,
        raise_if_nothing_works=False,
    )  # fmt: skip
    predictors = dict(program.named_predictors())
    for part in open_parts:
        fields = tuple(predictors[part.predictor].signature.input_fields)
        answered = {
            input_key(inputs, fields): run.result.score >= settings.min_score
            for run in runs
            for predictor, inputs, _ in run.trace
            if predictor is predictors[part.predictor] and run.result.score is not None
        }
        memory.note_settled(part.instruction, answered)
        logger.info("%s: %d of %d settled by the instruction alone", part.predictor, sum(answered.values()), n)


def wants_bootstrap(program: dspy.Module, trainset: Sequence[dspy.Example], settings: ProposalSettings) -> bool:
    """Whether demonstrations are to be made by running the program: as set, or where examples lack an output."""
    if settings.bootstrap is not None:
        return settings.bootstrap
    return not all(is_fully_labelled(predictor.signature, trainset) for _, predictor in program.named_predictors())


def bootstrapped(
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
