"""Which run belongs in which cell: what a strategy optimizes, and which of several runs stands for it.

Of several runs for one cell the one with the best *validation* score is shown (the last of equals): choosing by the
test score would make the table flatter than the truth. Pure functions of run records.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from copa_harness.judge.paired_tests import PairedDifference, pair_up, paired_difference
from copa_harness.report.records import RunRecord

Kind = Literal["baseline", "weights", "prompts", "joint", "other"]

_PROMPT_STEPS = frozenset({"p", "prompts", "demos", "instructions"})
_WEIGHT_STEPS = frozenset({"w", "weights"})


def steps_of(strategy: str) -> tuple[str, ...]:
    """The names between the arrows, in lower case."""
    return tuple(step.strip().lower() for step in re.split(r"->|→|>", bare(strategy)) if step.strip())


def bare(strategy: str) -> str:
    """A strategy without what `told_apart` added."""
    return strategy.split(" (", 1)[0]


def kind_of(strategy: str) -> Kind:
    """What a strategy optimizes; "other" for an optimizer of DSPy on its own or a program the test brought along."""
    steps = set(steps_of(strategy))
    if steps <= {"none"}:
        return "baseline"
    if steps <= _WEIGHT_STEPS:
        return "weights"
    if steps <= _PROMPT_STEPS:
        return "prompts"
    if "joint" in steps or (steps & _WEIGHT_STEPS and steps - _WEIGHT_STEPS):
        return "joint"
    return "other"


def chosen(runs: Iterable[RunRecord]) -> RunRecord | None:
    """The run that stands for a cell; None for none.

    Of those with a score it is one over all examples if there is any (a run that stopped early has the score of a
    streak), then the one with the best validation score, then the last.
    """
    best: RunRecord | None = None
    for run in runs:
        if run.score is not None and (best is None or _standing(run) >= _standing(best)):
            best = run
    return best


def _standing(run: RunRecord) -> tuple[bool, float]:
    is_whole = not run.sequential or run.sequential["n_used"] == run.sequential["n_total"]
    return is_whole, -math.inf if run.validation_after is None else run.validation_after


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


def told_apart(runs: Sequence[RunRecord]) -> list[RunRecord]:
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
        run.validation_after,
        dict(run.search),
        tuple(run.notes),
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


def told_once(runs: Sequence[RunRecord], attribute: str) -> list[RunRecord]:
    """The runs that have something to tell; two tests may share one optimization, which tells it once."""
    told: list[tuple[str, str, str, Any]] = []
    found = []
    for run in runs:
        told_as = (run.task, run.model, bare(run.strategy), getattr(run, attribute))
        if getattr(run, attribute) and told_as not in told:
            told.append(told_as)
            found.append(run)
    return found
