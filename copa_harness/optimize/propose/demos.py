"""Proposals of demonstration sets: labelled rows and passing traces, chosen in several ways and sizes, and none at all.

Sets are stratified by label when labels are categories, so a set of nine shows three of each of three classes.

Pools of demonstrations and the sets taken from them: where rows come from, and which methods are asked for sets.

Methods are taken in turn until something is known, then drawn by the run's `Learner`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dspy
import numpy as np

from copa_harness.evaluate.metrics import Metric
from copa_harness.evaluate.runner import ExampleRun, run_examples
from copa_harness.optimize.budget import Allowance
from copa_harness.optimize.propose import similarity as selection
from copa_harness.optimize.propose.schema import is_fully_labelled, strata_of, stratified_order
from copa_harness.optimize.propose.similarity import Vectors, row_vectors
from copa_harness.optimize.search.bandit import Knowledge, demo_key, input_key
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.space import DemoSet
from copa_harness.results import Phase

if TYPE_CHECKING:
    from copa_harness.optimize.options import SearchOptions

UNSETTLED_SHARE = 2 / 3
"""Of a set's places, what rows that the instruction alone gets wrong may take."""

REDRAWS = 3
"""Attempts of a method at a set that is not there yet, before one is drawn at random."""

METHODS: tuple[str, ...] = ("random", "diverse", "typical", "nearest", "unsettled", "weighty", "mutated")
"""How a set is chosen from a pool; the last four need something to be known first, see `Knowledge`."""


@dataclass(frozen=True, slots=True)
class PoolKnowledge:
    """What the methods go by, for a pool of n demonstrations.

    Attributes:
        vectors: (n, d) inputs, see `vectors`.
        targets: (m, d) inputs that were answered wrong; empty when none is known ("nearest").
        settled: n flags, what the instruction alone answers rightly; empty when not known ("unsettled").
        current: Places in the pool of the demonstrations shown now; empty when there are none, or not all are in the
            pool ("mutated").
        weights: n draws of what each demonstration adds; empty when not known ("weighty").
    """

    vectors: Vectors
    targets: Vectors
    settled: Sequence[bool] = ()
    weights: Sequence[Sequence[float]] = ()
    current: Sequence[int] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that can be used."""
        ready = {
            "nearest": len(self.targets) > 0,
            "unsettled": any(self.settled) and not all(self.settled),
            "weighty": len(self.weights) > 0,
            "mutated": 0 < len(self.current) < len(self.vectors),
        }
        return tuple(name for name in METHODS if ready.get(name, True))


def arm_of(source: str, method: str) -> str:
    """The name of an arm: where demonstrations come from and how they are chosen."""
    return source if method == "random" else f"{source} {method}"


def chosen_sets(
    pool: Sequence[tuple[dspy.Example, str]],
    *,
    source: str,
    plan: Sequence[tuple[int, str]],
    knowledge: PoolKnowledge,
    generator: np.random.Generator,
) -> tuple[tuple[DemoSet, str], ...]:
    """Demonstration sets, each with its arm; no two show the same demonstrations.

    Args:
        pool: (demonstration, stratum) pairs.
        source: Where the pool comes from, for the names.
        plan: (size, method) of every set wanted; sizes beyond the pool are cut to it.
        knowledge: What the methods go by.
        generator: Source of randomness.
    """
    strata = [stratum for _, stratum in pool]
    sets: list[tuple[DemoSet, str]] = []
    seen: set[frozenset[int]] = set()
    numbers: dict[tuple[int, str], int] = {}
    for wanted, asked in plan:
        size = min(wanted, len(pool))
        if size < 1:
            continue
        for method in (*[asked] * REDRAWS, "random"):  # some methods have few different sets to offer
            rows = _rows(method, strata, size, knowledge, generator)
            if frozenset(rows) not in seen:
                break
        else:
            continue
        seen.add(frozenset(rows))
        size = len(rows)
        number = numbers[size, method] = numbers.get((size, method), 0) + 1
        arm = arm_of(source, method)
        order = rows if method == "mutated" else generator.permutation(rows)
        demos = tuple(pool[int(row)][0] for row in order)
        sets.append((DemoSet(f"{size} {arm} #{number}", demos), arm))
    return tuple(sets)


def _rows(
    method: str, strata: Sequence[str], size: int, knowledge: PoolKnowledge, generator: np.random.Generator
) -> list[int]:
    if method == "diverse":
        return selection.diverse_rows(knowledge.vectors, strata, size, generator)
    if method == "typical":
        return selection.typical_rows(knowledge.vectors, strata, size, generator)
    if method == "nearest":
        return selection.nearest_rows(knowledge.vectors, strata, size, generator, targets=knowledge.targets)
    if method == "unsettled":
        return selection.open_rows(strata, knowledge.settled, size, generator, share=UNSETTLED_SHARE)
    if method == "mutated":
        return selection.mutated_rows(
            knowledge.vectors, strata, knowledge.current, generator, targets=knowledge.targets
        )
    if method == "weighty":
        draw = knowledge.weights[int(generator.integers(len(knowledge.weights)))]
        return selection.heaviest_rows(strata, draw, size, generator)
    return stratified_order(strata, generator)[:size]


def labelled_pool(signature: Any, trainset: Sequence[dspy.Example]) -> list[tuple[dspy.Example, str]]:
    """(demonstration, stratum) for every training example that holds all inputs and at least one output.

    Fields the signature does not have are left out; a missing output (a reasoning field) stays missing, which DSPy
    renders as an incomplete demonstration.
    """
    usable = [
        example
        for example in trainset
        if all(name in example for name in signature.input_fields)
        and any(name in example for name in signature.output_fields)
    ]
    strata = strata_of(usable)
    pool = []
    for example, stratum in zip(usable, strata, strict=True):
        fields = {name: example[name] for name in signature.fields if name in example}
        pool.append((dspy.Example(**fields).with_inputs(*signature.input_fields), stratum))
    return pool


def traced_pools(
    program: dspy.Module, trainset: Sequence[dspy.Example], runs: Sequence[ExampleRun], *, min_score: float = 1.0
) -> dict[str, list[tuple[dspy.Example, str]]]:
    """(demonstration, stratum) per predictor from the traces of examples whose score reaches `min_score`.

    Args:
        program: The very program object that was run.
        trainset: The examples that were run, with `runs` in the same order.
        runs: What came out.
        min_score: Which traces pass, 0..1.

    Returns:
        By predictor name, at most one demonstration per predictor and example (the last call, as the earlier ones of a
        loop are intermediate steps).
    """
    names = {id(predictor): name for name, predictor in program.named_predictors()}
    pools: dict[str, list[tuple[dspy.Example, str]]] = {name: [] for name in names.values()}
    strata = strata_of(trainset)
    for run, stratum in zip(runs, strata, strict=True):
        if run.result.score is None or run.result.score < min_score:
            continue
        last: dict[str, dspy.Example] = {}
        for predictor, inputs, outputs in run.trace:
            name = names.get(id(predictor))
            if name is not None:
                fields = {**inputs, **dict(outputs.items())}
                last[name] = dspy.Example(augmented=True, **fields).with_inputs(*inputs)
        for name, demo in last.items():
            pools[name].append((demo, stratum))
    return pools


def random_sets(
    pool: Sequence[tuple[dspy.Example, str]],
    *,
    label: str,
    counts: Mapping[int, int],
    generator: np.random.Generator,
) -> tuple[DemoSet, ...]:
    """Random stratified sets.

    Args:
        pool: (demonstration, stratum) pairs.
        label: Where the pool comes from, for the sets' names.
        counts: How many sets of which size; sizes beyond the pool are cut to it, and equal sets are dropped.
        generator: Source of randomness.
    """
    sets: list[DemoSet] = []
    seen: set[tuple[int, ...]] = set()
    for size, n_sets in counts.items():
        size = min(size, len(pool))
        if size < 1:
            continue
        for i in range(n_sets):
            members = stratified_order([stratum for _, stratum in pool], generator)[:size]
            members = [int(one) for one in generator.permutation(members)]
            if tuple(members) in seen:
                continue
            seen.add(tuple(members))
            sets.append(DemoSet(f"{size} {label} #{i + 1}", tuple(pool[one][0] for one in members)))
    return tuple(sets)


def set_counts(max_demos: int, n_sets: int) -> dict[int, int]:
    """How many sets of which size: half of them full, a third two thirds full, the rest a third full.

    More demonstrations nearly always help a small model, so most of the sets are large; the small ones are there for
    models and programs that are distracted by them, and win ties because they are cheaper.
    """
    if max_demos < 1 or n_sets < 1:
        return {}
    middle, small = max(1, round(max_demos * 2 / 3)), max(1, round(max_demos / 3))
    n_full = max(1, round(n_sets / 2))
    n_middle = round(n_sets / 3)
    counts = {max_demos: n_full}
    for size, n in ((middle, n_middle), (small, n_sets - n_full - n_middle)):
        if n > 0:
            counts[size] = counts.get(size, 0) + n
    return counts


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
    settings: SearchOptions,
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
        pool,
        predictor,
        signature,
        memory=memory,
        mistakes=mistakes,
        instruction=instruction,
        shown=shown,
        generator=generator,
    )
    learner = memory.learner
    untried = ("mutated", *UNTRIED_METHODS)
    methods = known.methods if learner.knows("demos") else [m for m in untried if m in known.methods]
    by_arm = {arm_of(source, method): method for method in methods}
    arms = learner.choose("demos", list(by_arm), n=len(sizes), generator=generator)
    made = chosen_sets(
        pool,
        source=source,
        plan=[(size, by_arm[arm]) for size, arm in zip(sizes, arms, strict=True)],
        knowledge=known,
        generator=generator,
    )
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
    settings: SearchOptions,
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
        program,
        examples,
        metric=metric,
        split="train",
        phase=Phase.DEMOS,
        threads=threads,
        raise_if_nothing_works=False,
    )
    predictors = dict(program.named_predictors())
    for part in open_parts:
        fields = tuple(predictors[part.predictor].signature.input_fields)
        answered = {
            input_key(inputs, fields): run.result.score >= settings.pass_score
            for run in runs
            for predictor, inputs, _ in run.trace
            if predictor is predictors[part.predictor] and run.result.score is not None
        }
        memory.note_settled(part.instruction, answered)
        logger.info("%s: %d of %d settled by the instruction alone", part.predictor, sum(answered.values()), n)


def wants_bootstrap(program: dspy.Module, trainset: Sequence[dspy.Example], settings: SearchOptions) -> bool:
    """Whether demonstrations are to be made by running the program: as set, or where examples lack an output."""
    if settings.bootstrap is not None:
        return settings.bootstrap
    return not all(is_fully_labelled(predictor.signature, trainset) for _, predictor in program.named_predictors())


def bootstrapped(
    program: dspy.Module,
    trainset: Sequence[dspy.Example],
    metric: Metric,
    settings: SearchOptions,
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
        program,
        examples,
        metric=metric,
        split="train",
        phase=Phase.BOOTSTRAP,
        threads=threads,
        trace_to_metric=True,
        raise_if_nothing_works=False,
    )
    pools = traced_pools(program, examples, runs, min_score=settings.pass_score)
    logger.info("bootstrap: %d of %d traces pass", max((len(pool) for pool in pools.values()), default=0), n)
    return pools
