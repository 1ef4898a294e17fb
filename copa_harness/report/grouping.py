"""Which run belongs in which cell: what a strategy optimizes, which of several runs stands for it, what to call them.

Of several runs for one cell the one with the best *validation* score is shown (the last of equals): choosing by the
test score would make the table flatter than the truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from copa_harness.errors import ConfigurationError
from copa_harness.judge.paired_tests import PairedDifference, pair_up, paired_difference
from copa_harness.report.records import RunRecord
from copa_harness.strategy import StepKind, parse_strategy

Kind = Literal["baseline", "weights", "prompts", "joint", "other"]

Told = TypeVar("Told")


def base_strategy(strategy: str) -> str:
    """A strategy without what `disambiguated` added."""
    return strategy.split(" (", 1)[0]


def kind_of(strategy: str) -> Kind:
    """What a strategy optimizes; "other" for an optimizer of DSPy on its own or a program the test brought along."""
    try:
        kinds = {step.kind for step in parse_strategy(base_strategy(strategy))}
    except ConfigurationError:
        return "other"
    if kinds == {StepKind.NONE}:
        return "baseline"
    if kinds == {StepKind.WEIGHTS}:
        return "weights"
    if kinds <= {StepKind.PROMPTS, StepKind.ALTERNATE}:
        return "prompts"
    return "joint" if kinds & {StepKind.JOINT, StepKind.WEIGHTS} else "other"


def chosen(runs: Iterable[RunRecord]) -> RunRecord | None:
    """The run that stands for a cell; None for none.

    Of those with a score it is one over all examples if there is any (a run that stopped early has the score of a
    streak), then the one with the best validation score, then the last.
    """
    best: RunRecord | None = None
    for run in runs:
        if run.score is not None and (best is None or _preference(run) >= _preference(best)):
            best = run
    return best


def _preference(run: RunRecord) -> tuple[bool, float]:
    is_whole, validated = run.sequential is None or not run.sequential.n_saved, run.validation[1]
    return is_whole, -math.inf if validated is None else validated


def by_task(runs: Iterable[RunRecord], *, split: str = "test") -> dict[tuple[str, str], list[RunRecord]]:
    """Runs on one split by (task, model), in the order they were first seen."""
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for run in runs:
        if run.split == split:
            groups.setdefault((run.task, run.model), []).append(run)
    return groups


def difference(before: RunRecord, after: RunRecord) -> PairedDifference | None:
    """Paired difference of two runs over the examples that have a score in both.

    None when they were not run on the same examples (or their examples are not known).
    """
    pairs = pair_up(before.scores, after.scores, groups={**before.groups, **after.groups} or None)
    if not pairs.ids or before.scores.keys() != after.scores.keys():
        return None
    return paired_difference(pairs)


def distinct(runs: Sequence[RunRecord]) -> list[str]:
    """The strategies of some runs, each once, in order."""
    return list(dict.fromkeys(run.strategy for run in runs))


def disambiguated(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs, with the test's name in the strategy where several of one strategy differ in settings or results.

    Where the name does not tell them apart, the budget or a number does. Runs alike (two tests may share one
    optimization) and the program as written keep their names.
    """
    groups: dict[tuple[str, str, str, str], list[int]] = {}
    for i, run in enumerate(runs):
        if kind_of(run.strategy) != "baseline":
            groups.setdefault((run.task, run.model, run.split, run.strategy), []).append(i)
    found = list(runs)
    for group in groups.values():
        variants: list[Any] = []
        for i in group:
            if _variant(runs[i]) not in variants:
                variants.append(_variant(runs[i]))
        if len(variants) > 1:
            for i, label in zip(group, _labels([runs[i] for i in group], variants), strict=True):
                found[i] = replace(runs[i], strategy=f"{runs[i].strategy} ({label})")
    return found


def _variant(run: RunRecord) -> tuple[Any, ...]:
    """What a run was given and came to; what it cost depends on what was cached."""
    return (
        run.budget.calls,
        run.seed,
        run.n,
        run.scores,
        run.score,
        run.validation[1],
        None if run.optimization is None else run.optimization.ending,
        run.notes,
    )


def _labels(runs: Sequence[RunRecord], variants: Sequence[Any]) -> list[str]:
    """The shortest kind of label that is never the same for different variants."""
    names = [run.test.rsplit("::", 1)[-1] for run in runs]
    calls = ["no ceiling" if math.isinf(run.budget.calls) else f"{run.budget.calls:,.0f} calls" for run in runs]
    number = [variants.index(_variant(run)) for run in runs]
    for labels in (
        names,
        [run.test for run in runs],
        [f"{name}, {ceiling}" for name, ceiling in zip(names, calls, strict=True)],
    ):
        if len(set(zip(labels, number, strict=True))) == len(set(labels)):
            return labels
    return [f"{name}, no. {i + 1}" for name, i in zip(names, number, strict=True)]


def deduplicated(runs: Sequence[RunRecord], tell: Callable[[RunRecord], Told | None]) -> list[tuple[RunRecord, Told]]:
    """The runs that have something to tell, with it; two tests may share one optimization, which tells it once."""
    told: list[tuple[str, str, str, Told]] = []
    found = []
    for run in runs:
        what = tell(run)
        if not what:
            continue
        told_as = (run.task, run.model, base_strategy(run.strategy), what)
        if told_as not in told:
            told.append(told_as)
            found.append((run, what))
    return found


def from_optimization(attribute: str) -> Callable[[RunRecord], Any]:
    """What a run's optimization tells under a name of `OptimizationResult`; None without an optimization."""
    return lambda run: None if run.optimization is None else getattr(run.optimization, attribute)
