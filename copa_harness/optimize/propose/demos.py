"""Demonstration sets for one predictor: the sources demonstrations come from, and the sets chosen from each.

A source is labelled rows (`labelled_demos`) or passing traces of the program (`bootstrapped_demos`). From it come sets
of several sizes, stratified by label where labels are categories, so a set of nine shows three of each of three
classes. Which rows make a set is one of several methods (`METHODS`), taken in turn until something is known and drawn
by the run's `ProposalBandit` from then on; what the methods go by is in a `SelectionBasis`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dspy
import numpy as np

from copa_harness.evaluate.runner import ExampleRun
from copa_harness.optimize.propose import similarity
from copa_harness.optimize.propose.schema import is_fully_labelled, strata_of, stratified_order
from copa_harness.optimize.propose.similarity import Vectors, row_vectors
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.space import DemoSet
from copa_harness.optimize.search.trial_memory import SearchMemory, demo_key
from copa_harness.optimize.step_budget import CallBudget
from copa_harness.results import Phase

if TYPE_CHECKING:
    from copa_harness.optimize.search_context import SearchContext

logger = logging.getLogger("copa_harness")

METHODS: tuple[str, ...] = ("random", "diverse", "typical", "weighty", "mutated")
"""How a set is chosen from a source; the last two need something to be known first, see `SelectionBasis`."""

UNTRIED_METHODS: tuple[str, ...] = ("typical", "random", "diverse")
"""How sets are chosen while nothing is known, in turn.

Measured on development tasks (4 tasks, 3 splits, 9 demonstrations, 6 sets each): mean test score of a set .881 typical,
.846 diverse, .834 random, .776 nearest to mistakes; of the set best on 25 validation rows .883, .855, .873, .801.
"""

REDRAWS = 3
"""Attempts of a method at a set that is not there yet, before one is drawn at random."""

BOOTSTRAP_SHARE = 0.2
"""At most this share of a step's calls goes into bootstrapping; the rest is for finding out what is good."""

StratifiedDemo = tuple[dspy.Example, str]
"""A demonstration and its stratum: its categorical labels, or "" where labels are free text."""


@dataclass(frozen=True, slots=True)
class DemoSource:
    """Where demonstrations of one predictor come from.

    Attributes:
        name: "labelled" or "bootstrapped".
        predictor: The predictor's name in the program.
        module: The predictor, with the instruction and the demonstrations it has now.
        demos: What there is to choose from.
    """

    name: str
    predictor: str
    module: Any
    demos: Sequence[StratifiedDemo]


def sets_from(
    source: DemoSource,
    *,
    sizes: Sequence[int],
    memory: SearchMemory,
    mistakes: Sequence[dspy.Example],
    generator: np.random.Generator,
) -> list[DemoSet]:
    """Sets of these sizes, chosen by what is known; remembered with the arm each came from.

    Args:
        source: What they are taken from.
        sizes: One per set.
        memory: The run's.
        mistakes: Examples the incumbent answers wrong, whose neighbours may be worth showing.
        generator: Source of randomness.
    """
    if not sizes:
        return []
    basis = _basis_of(source, memory=memory, mistakes=mistakes, generator=generator)
    untried = ("mutated", *UNTRIED_METHODS)
    methods = basis.methods if memory.bandit.knows("demos") else [m for m in untried if m in basis.methods]
    by_arm = {arm_of(source.name, method): method for method in methods}
    arms = memory.bandit.choose("demos", list(by_arm), n=len(sizes), generator=generator)
    plan = [(size, by_arm[arm]) for size, arm in zip(sizes, arms, strict=True)]
    chosen = chosen_sets(source.demos, source=source.name, plan=plan, basis=basis, generator=generator)
    for one, arm in chosen:
        memory.note_demos(source.predictor, one, f"demos: {arm}")
    return [one for one, _ in chosen]


def set_sizes(max_demos: int, n_sets: int) -> list[int]:
    """Sizes of so many sets: half of them full, a third two thirds full, the rest a third full.

    More demonstrations nearly always help a small model, so most of the sets are large; the small ones are there for
    models and programs that are distracted by them, and win ties because they are cheaper.
    """
    if max_demos < 1 or n_sets < 1:
        return []
    middle, small = max(1, round(max_demos * 2 / 3)), max(1, round(max_demos / 3))
    n_full = max(1, round(n_sets / 2))
    n_middle = round(n_sets / 3)
    counts = {max_demos: n_full}
    for size, n in ((middle, n_middle), (small, n_sets - n_full - n_middle)):
        if n > 0:
            counts[size] = counts.get(size, 0) + n
    return [size for size, n in counts.items() for _ in range(n)]


# -- sources


def labelled_demos(signature: Any, trainset: Sequence[dspy.Example]) -> list[StratifiedDemo]:
    """A demonstration for every training example that holds all inputs and at least one output.

    Fields the signature does not have are left out; a missing output (a reasoning field) stays missing, which DSPy
    renders as an incomplete demonstration.
    """
    usable = [
        example
        for example in trainset
        if all(name in example for name in signature.input_fields)
        and any(name in example for name in signature.output_fields)
    ]
    demos = []
    for example, stratum in zip(usable, strata_of(usable), strict=True):
        fields = {name: example[name] for name in signature.fields if name in example}
        demos.append((dspy.Example(**fields).with_inputs(*signature.input_fields), stratum))
    return demos


def wants_bootstrap(context: SearchContext, program: dspy.Module) -> bool:
    """Whether demonstrations are to be made by running the program: as set, or where examples lack an output."""
    if (bootstrap := context.settings.bootstrap) is not None:
        return bootstrap
    signatures = [predictor.signature for _, predictor in program.named_predictors()]
    return not all(is_fully_labelled(signature, context.trainset) for signature in signatures)


def bootstrapped_demos(
    context: SearchContext, incumbent: Candidate, *, allowance: CallBudget, seed: Sequence[int]
) -> dict[str, list[StratifiedDemo]]:
    """Passing traces from as many training examples as the bootstrap share of the allowance pays for, by predictor."""
    n = context.n_affordable(incumbent, allowance.remaining * BOOTSTRAP_SHARE)
    if n < 1:
        return {}
    order = stratified_order(strata_of(context.trainset), np.random.default_rng([*seed, 404]))[:n]
    program = context.teacher or incumbent.program()
    candidate = incumbent if context.teacher is None else None
    runs = context.run_on_training(program, order, phase=Phase.BOOTSTRAP, candidate=candidate)
    examples = [context.trainset[i] for i in order]
    demos = traced_demos(program, examples, runs, min_score=context.settings.pass_score)
    logger.info("bootstrap: %d of %d traces pass", max((len(found) for found in demos.values()), default=0), n)
    return demos


def traced_demos(
    program: dspy.Module, examples: Sequence[dspy.Example], runs: Sequence[ExampleRun], *, min_score: float = 1.0
) -> dict[str, list[StratifiedDemo]]:
    """Demonstrations by predictor from the traces of examples whose score reaches `min_score`.

    Args:
        program: The very program object that was run.
        examples: The examples that were run, with `runs` in the same order.
        runs: What came out.
        min_score: Which traces pass, 0..1.

    Returns:
        By predictor name, at most one demonstration per predictor and example (the last call, as the earlier ones of a
        loop are intermediate steps).
    """
    names = {id(predictor): name for name, predictor in program.named_predictors()}
    demos: dict[str, list[StratifiedDemo]] = {name: [] for name in names.values()}
    for run, stratum in zip(runs, strata_of(examples), strict=True):
        if run.result.score is None or run.result.score < min_score:
            continue
        last: dict[str, dspy.Example] = {}
        for predictor, inputs, outputs in run.trace:
            name = names.get(id(predictor))
            if name is not None:
                fields = {**inputs, **dict(outputs.items())}
                last[name] = dspy.Example(augmented=True, **fields).with_inputs(*inputs)
        for name, demo in last.items():
            demos[name].append((demo, stratum))
    return demos


# -- what is known of a source


@dataclass(frozen=True, slots=True)
class SelectionBasis:
    """What the methods go by, for a source of n demonstrations.

    Attributes:
        vectors: (n, d) inputs, see `similarity.row_vectors`.
        targets: (m, d) inputs that were answered wrong; empty when none is known ("mutated").
        effects: Draws of what each of the n demonstrations adds; empty when not known ("weighty").
        current: Places in the source of the demonstrations shown now; empty when there are none, or not all are in it
            ("mutated").
    """

    vectors: Vectors
    targets: Vectors
    effects: Sequence[Sequence[float]] = ()
    current: Sequence[int] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that can be used."""
        ready = {
            "weighty": len(self.effects) > 0,
            "mutated": 0 < len(self.current) < len(self.vectors),
        }
        return tuple(name for name in METHODS if ready.get(name, True))


def _basis_of(
    source: DemoSource, *, memory: SearchMemory, mistakes: Sequence[dspy.Example], generator: np.random.Generator
) -> SelectionBasis:
    demos, fields = [demo for demo, _ in source.demos], tuple(source.module.signature.input_fields)
    targets = [example for example in mistakes if all(name in example for name in fields)]
    vectors = row_vectors([*demos, *targets], fields)
    places = {demo_key(demo): i for i, demo in enumerate(demos)}
    current = [places.get(demo_key(demo)) for demo in source.module.demos]
    return SelectionBasis(
        vectors=vectors[: len(demos)],
        targets=vectors[len(demos) :],
        effects=memory.drawn_effects(source.predictor, demos, n_draws=4, generator=generator),
        current=[place for place in current if place is not None] if None not in current else (),
    )


# -- sets


def arm_of(source: str, method: str) -> str:
    """The name of an arm: where demonstrations come from and how they are chosen."""
    return source if method == "random" else f"{source} {method}"


def chosen_sets(
    demos: Sequence[StratifiedDemo],
    *,
    source: str,
    plan: Sequence[tuple[int, str]],
    basis: SelectionBasis,
    generator: np.random.Generator,
) -> tuple[tuple[DemoSet, str], ...]:
    """Demonstration sets, each with its arm; no two show the same demonstrations.

    Args:
        demos: What there is to choose from.
        source: Where it comes from, for the names.
        plan: (size, method) of every set wanted; sizes beyond what there is are cut to it.
        basis: What the methods go by.
        generator: Source of randomness.
    """
    strata = [stratum for _, stratum in demos]
    sets: list[tuple[DemoSet, str]] = []
    seen: set[frozenset[int]] = set()
    numbers: dict[tuple[int, str], int] = {}
    for wanted, asked in plan:
        size = min(wanted, len(demos))
        if size < 1:
            continue
        for method in (*[asked] * REDRAWS, "random"):  # some methods have few different sets to offer
            rows = _rows(method, strata, size, basis, generator)
            if frozenset(rows) not in seen:
                break
        else:
            continue
        seen.add(frozenset(rows))
        size = len(rows)
        number = numbers[size, method] = numbers.get((size, method), 0) + 1
        arm = arm_of(source, method)
        order = rows if method == "mutated" else generator.permutation(rows)
        sets.append((DemoSet(f"{size} {arm} #{number}", tuple(demos[int(row)][0] for row in order)), arm))
    return tuple(sets)


def _rows(
    method: str, strata: Sequence[str], size: int, basis: SelectionBasis, generator: np.random.Generator
) -> list[int]:
    if method == "diverse":
        return similarity.diverse_rows(basis.vectors, strata, size, generator)
    if method == "typical":
        return similarity.typical_rows(basis.vectors, strata, size, generator)
    if method == "mutated":
        return similarity.mutated_rows(basis.vectors, strata, basis.current, generator, targets=basis.targets)
    if method == "weighty":
        draw = basis.effects[int(generator.integers(len(basis.effects)))]
        return similarity.heaviest_rows(strata, draw, size, generator)
    return stratified_order(strata, generator)[:size]


def random_demos(demos: Sequence[StratifiedDemo], size: int, generator: np.random.Generator) -> tuple[Any, ...]:
    """Up to `size` demonstrations drawn at random, stratified, in a random order."""
    rows = stratified_order([stratum for _, stratum in demos], generator)[:size]
    return tuple(demos[int(row)][0] for row in generator.permutation(rows))
