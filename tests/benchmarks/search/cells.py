"""Cells of the grid: what each is, in which order they are run, and where their results lie.

A cell is one optimization: task x seed x budget x method. Its result is one JSON file under a folder named after the
sources that could have changed it, so results of different versions never mix.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copa_harness.atomic_files import write_atomic
from copa_harness.documents import canonical_json

PACKAGE = Path(__file__).parents[3] / "copa_harness"

TASKS = ("iris", "wine", "breast_cancer", "staged_wine")
BUDGETS = (100, 200, 400, 800)
SEEDS = (0, 1, 2, 3, 4)

COPA = ("joint", "p -> w -> p", "p", "demos -> instructions")
CONTROLS = ("p, no racing", "random, no racing")
"""COPA's own parts as plain searches: `p` without racing, and random search of the joint space without racing."""

PARTS = ("p, written", "p, one round", "p, random sampler", "p, uniform proposals", "p, random sets")
"""`p` with a prompt LM as it is, and without one of its parts: run with `--methods`, no part of the grid."""

RIVALS = ("miprov2 light", "bootstrap random search", "gepa", "better_together")
METHODS = (*COPA, *CONTROLS, *RIVALS)

WRITTEN_FOR = ("miprov2 light", "gepa", *PARTS)
"""Methods that are given the rule-based writer as their prompt LM."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One optimization of the grid."""

    task: str
    seed: int
    budget: int
    method: str

    @property
    def name(self) -> str:
        """File name without its ending."""
        return f"{self.task}-seed{self.seed}-calls{self.budget}-{re.sub(r'[^a-z0-9]+', '_', self.method)}"


def version_of(method: str) -> str:
    """Hash of the sources a method's result depends on: search and training for ours, the wrapper for DSPy's.

    DSPy's optimizers are untouched by changes of our own search; what trains weights concerns those that train.
    """
    optimize, tune = PACKAGE / "optimize", PACKAGE / "tune"
    if method in RIVALS:
        files = [optimize / "steps.py", *sorted((optimize / "dspy_optimizers").glob("*.py"))]
        files += sorted(tune.glob("*.py")) if method == "better_together" else []
        files += [Path(__file__).with_name("writer.py")] if method in WRITTEN_FOR else []
    else:
        ours = {path for path in optimize.rglob("*.py") if path.parent.name != "dspy_optimizers"}
        files = [*sorted(ours), *sorted(tune.glob("*.py"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:10]


class Store:
    """Results of cells, one file each: a file that exists is complete."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._versions = {method: version_of(method) for method in (*METHODS, *PARTS)}

    def path(self, cell: Cell) -> Path:
        """Where the result of a cell lies, for the present sources."""
        return self.directory / "cells" / self._versions[cell.method] / f"{cell.name}.json"

    def put(self, cell: Cell, record: dict[str, Any]) -> None:
        """Write a result."""
        path = self.path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, canonical_json(record))

    def get(self, cell: Cell, *, any_version: bool = False) -> dict[str, Any] | None:
        """The result of a cell, or None; with `any_version` the newest of whatever sources."""
        found = [self.path(cell)]
        if any_version and not found[0].exists():
            others = (self.directory / "cells").glob(f"*/{cell.name}.json")
            found = sorted(others, key=lambda path: -path.stat().st_mtime)
        for path in found[:1]:
            if path.exists():
                return {**json.loads(path.read_text(encoding="utf-8")), "version": path.parent.name}
        return None


def grid(*, tasks: Sequence[str], seeds: Sequence[int], budgets: Sequence[int], methods: Sequence[str]) -> list[Cell]:
    """All cells, what is needed first first: three seeds at 400 and 100 calls, then 200 and 800, then more seeds."""

    def rank(cell: Cell) -> tuple[int, ...]:
        budget = (400, 100, 800, 200).index(cell.budget) if cell.budget in BUDGETS else 4
        return (
            seeds.index(cell.seed) // 3,
            budget // 2,
            seeds.index(cell.seed),
            budget,
            tasks.index(cell.task),
            methods.index(cell.method),
        )

    cells = [Cell(t, s, b, m) for t in tasks for s in seeds for b in budgets for m in methods]
    return sorted(cells, key=rank)


def part_of(cells: Iterable[Cell], *, part: int, n_parts: int) -> list[Cell]:
    """The cells of one of several processes; those of one task and seed share answers and weights, so they stay
    together."""
    pairs: dict[tuple[str, int], int] = {}
    kept = []
    for cell in cells:
        number = pairs.setdefault((cell.task, cell.seed), len(pairs))
        if number % n_parts == part:
            kept.append(cell)
    return kept
