"""Proposals of demonstration sets: labelled rows and passing traces, chosen in several ways and sizes, and none at all.

Knows examples, traces and signatures; knows nothing of scores of sets (the study finds out) or of samplers. Sets are
stratified by label when labels are categories, so a set of nine shows three of each of three classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
import numpy as np

from copa_harness.evaluate.runner import ExampleRun
from copa_harness.optimize import selection
from copa_harness.optimize.schema import strata_of, stratified_order
from copa_harness.optimize.vectors import Vectors


@dataclass(frozen=True, slots=True)
class DemoSet:
    """Demonstrations for one predictor, and the name they go by in the study."""

    name: str
    demos: tuple[Any, ...]


NO_DEMOS = DemoSet("none", ())
"""The empty set: always a candidate."""

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
