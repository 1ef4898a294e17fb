"""Runs one cell: an optimization under its budget, then its test score, outside of the budget.

All methods go through `COPA`, so all are metered alike. Answers and LoRA weights are shared by all cells of a grid: a
budget counts distinct requests of a run, bought or replayed, so a cell's result does not depend on what ran before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from copa_harness import tasks
from copa_harness.evaluate import evaluate
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.optimize.copa import COPA
from copa_harness.optimize.dspy_optimizers.builders import scores_its_result
from copa_harness.optimize.propose import demos
from copa_harness.optimize.result import apply_state
from copa_harness.optimize.search.bandit import ProposalBandit
from copa_harness.optimize.search.racing import RacingPruner
from search.cells import CONTROLS, RIVALS, WRITTEN_FOR, Cell
from search.watching import watched
from search.writer import rule_writer

_STRATEGIES: dict[str, dict[str, Any]] = {
    "p, no racing": {"strategy": "p"},
    "random, no racing": {"strategy": "joint", "sampler": "random", "patience": None},
    "p, written": {"strategy": "p"},
    "p, one round": {"strategy": "p", "n_rounds": 1},
    "p, random sampler": {"strategy": "p", "sampler": "random"},
    "p, uniform proposals": {"strategy": "p"},
    "p, random sets": {"strategy": "p"},
    "miprov2 light": {"strategy": "miprov2", "optimizer_kwargs": {"miprov2": {"auto": "light"}}},
    "bootstrap random search": {"strategy": "bootstrap_fewshot_random_search"},
    "gepa": {"strategy": "gepa"},
    "better_together": {"strategy": "better_together"},
}

N_THREADS = 32


class Bench:
    """The model and its caches, shared by the cells of one process."""

    def __init__(self, cache_dir: Path) -> None:
        self.cache = ResponseCache(cache_dir / "responses")
        self.lm = build_lm("embedded", gateway=Gateway(cache=self.cache), cache_dir=cache_dir)
        self._tasks: dict[tuple[str, int], Any] = {}

    def task(self, cell: Cell) -> Any:
        """The cell's task."""
        key = (cell.task, cell.seed)
        if key not in self._tasks:
            self._tasks[key] = getattr(tasks, cell.task)(cell.seed)
        return self._tasks[key]

    def run(self, cell: Cell) -> dict[str, Any]:
        """The record of a cell."""
        task = self.task(cell)
        arguments = dict(_STRATEGIES.get(cell.method, {"strategy": cell.method}))
        if cell.method in WRITTEN_FOR:
            arguments["prompt_lm"] = rule_writer(task, seed=cell.seed)
        if cell.method == "gepa":
            # It counts program runs, repeated ones too, and would stop at half of its distinct calls.
            arguments["optimizer_kwargs"] = {"gepa": {"max_metric_calls": 4 * cell.budget}}
        # All that DSPy's optimizers may use is theirs. One that has not evaluated its result on all of validation has a
        # scoring of it held back, which comes on top here.
        step, given = str(arguments["strategy"]), arguments.get("optimizer_kwargs", {})
        held_back = 0
        if cell.method in RIVALS and not scores_its_result(step, given.get(step, {}), n_validation=len(task.valset)):
            held_back = len(task.valset) * len(task.program.predictors())
        copa = COPA(
            metric=task.metric,
            budget=cell.budget + held_back,
            seed=cell.seed,
            lm=self.lm,
            threads=N_THREADS,
            **arguments,
        )
        if cell.method in CONTROLS:
            copa.settings = replace(copa.settings, stop_without_headroom=False)
        began, began_cpu = time.perf_counter(), time.process_time()
        with watched(n_validation=len(task.valset)) as curve, _racing(cell.method not in CONTROLS), _without(cell):
            program = copa.compile(task.program, trainset=list(task.trainset), valset=list(task.valset))
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
        result = program.copa_result
        test = self._test(task, program)
        cpu_test_s = time.process_time() - began_cpu - cpu_s
        record = {
            "task": cell.task,
            "seed": cell.seed,
            "budget": cell.budget,
            "method": cell.method,
            "validation": result.score_after,
            "baseline": result.score_before,
            "charged": result.charged_calls,
            "paid": result.usage.paid_calls,
            "train_steps": result.usage.train_steps,
            "stopped": result.stopped,
            "n_trials": result.n_trials,
            "notes": list(result.notes),
            "test": test,
            "phases": [[p.phase, p.score_before, p.score_after] for p in result.phases],
            "curve": curve.points,
            "n_candidates": len(curve.candidates),
            "n_full": curve.n_full,
            "n_scored": sum(curve.candidates.values()),
            "n_validation": len(task.valset),
            "model": result.model,
            "state": result.state,
            "wall_s": round(wall_s, 2),
            "cpu_s": round(cpu_s, 2),
            "cpu_test_s": round(cpu_test_s, 2),
        }
        return record

    def test_curve(self, cell: Cell, record: dict[str, Any]) -> list[float]:
        """Mean test scores of a run's incumbents."""
        task = self.task(cell)
        programs = [apply_state(task.program, point["state"], lm=self.lm) for point in record["curve"]]
        return [_mean(self._test(task, program)) for program in programs]

    def _test(self, task: Any, program: Any) -> dict[str, float]:
        with open_scope("test of the result"):
            found = evaluate(
                program, task.testset, metric=task.metric, split="test", lm=self.lm, threads=len(task.testset)
            )
        return {one.example_id: 0.0 if one.score is None else one.score for one in found.results}


@contextmanager
def _without(cell: Cell) -> Iterator[None]:
    """Without learning which proposals pay, or with demonstration sets drawn at random alone."""
    choose, sets = ProposalBandit.choose, demos.chosen_sets

    def uniform(self: Any, family: str, arms: Sequence[str], *, n: int, generator: np.random.Generator) -> list[str]:
        if not self.knows(family):
            return choose(self, family, arms, n=n, generator=generator)
        return [arms[int(generator.integers(len(arms)))] for _ in range(n)]

    def drawn(found: Any, *, plan: Sequence[tuple[int, str]], **given: Any) -> Any:
        return sets(found, plan=[(size, "random") for size, _ in plan], **given)

    if cell.method == "p, uniform proposals":
        ProposalBandit.choose = uniform  # type: ignore[method-assign]
    if cell.method == "p, random sets":
        demos.chosen_sets = drawn
    try:
        yield
    finally:
        ProposalBandit.choose, demos.chosen_sets = choose, sets  # type: ignore[method-assign]


def _mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)


@contextmanager
def _racing(on: bool) -> Iterator[None]:
    """Without racing every candidate is scored on every row."""
    prune = RacingPruner.prune
    if not on:
        RacingPruner.prune = lambda self, study, trial: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        RacingPruner.prune = prune  # type: ignore[method-assign]
