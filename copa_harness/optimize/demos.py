"""Proposals of demonstration sets: labelled rows drawn at random in several sizes, passing traces, and none at all.

Knows examples, traces and signatures; knows nothing of scores of sets (the study finds out) or of samplers. Random
sets are stratified by label when labels are categories, so a set of nine shows three of each of three classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
import numpy as np

from copa_harness.evaluate.runner import ExampleRun
from copa_harness.optimize.schema import strata_of, stratified_order


@dataclass(frozen=True, slots=True)
class DemoSet:
    """Demonstrations for one predictor, and the name they go by in the study."""

    name: str
    demos: tuple[Any, ...]


NO_DEMOS = DemoSet("none", ())
"""The empty set: always a candidate."""


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
