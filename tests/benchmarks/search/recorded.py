"""Searches over recorded configurations of a real model: hundreds of seeds in seconds, no model at all.

A recording (`record_configurations.py`) says what every point of a joint space scores on every row. A seed draws
`N_VALIDATION` of the rows to search on; the others tell what the chosen point is worth. Calls are rows looked at.

Regret = mean, on the rows not searched on, of the point that is best over all rows, less that of the chosen point. Both
are measured on the same rows, so what the rows are like cancels.

Ours run through `optimize.search.study` as it is, with a `Validation` that looks the scores up. The others are written
here from their papers, each a few lines over the table.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize.options import SearchOptions
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.samplers import quiet_optuna
from copa_harness.optimize.search.scoring import Validation
from copa_harness.optimize.search.space import WEIGHTS, DemoSet, InstructionOption, Space, WeightsChoice
from copa_harness.optimize.search.study import Race, Watchers
from copa_harness.optimize.step_budget import OutOfCalls
from copa_harness.results import Phase
from search.figures import mean_of
from search.plot import draw_regret

FOLDER = Path(__file__).parent / "recorded"

N_VALIDATION = 24

Table = npt.NDArray[np.float64]
"""(points, rows): what every point scores on every row."""


@dataclass(frozen=True)
class Recording:
    """One file: `table` (points, rows), points in the order of `product(*dimensions.values())`."""

    name: str
    dimensions: Mapping[str, Sequence[str]]
    table: Table

    @classmethod
    def read(cls, path: Path) -> Recording:
        """From a file of `record_configurations.py`."""
        document = json.loads(gzip.decompress(path.read_bytes()))
        table = np.array([[float(digit) for digit in row] for row in document["scores"]])
        return cls(document["task"], document["dimensions"], table)

    @cached_property
    def space(self) -> Space:
        """The space of real candidates, of a program that is never run."""
        lms = [ScriptedLM("", model=f"scripted/{name}") for name in self.dimensions["weights"]]
        student = Candidate.of(dspy.Predict("text -> intent"), lm=lms[0])
        (name,) = [part.predictor for part in student.parts]
        texts, sets = self.dimensions["instruction"], self.dimensions["demos"]
        student = student.with_instructions({name: texts[0]})
        return Space.around(
            student,
            weights=[WeightsChoice(option, (lm,)) for option, lm in zip(self.dimensions["weights"], lms, strict=True)],
            instructions={name: [InstructionOption(option, option) for option in texts]},
            # A size by the set's place, so that "simpler" means something.
            demos={name: [DemoSet(o, () if o == "none" else (dspy.Example(text=o),)) for o in sets]},
        )

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Number of a point by its candidate's key."""
        points = product(*self.dimensions.values())
        names = list(self.space.dimensions)
        return {self.space.candidate(dict(zip(names, p, strict=True))).key: i for i, p in enumerate(points)}


class RecordedValidation(Validation):
    """Scores by looking them up; a row looked at is a call."""

    def __init__(self, recording: Recording, rows: Sequence[int], *, seed: int, discriminating: bool = False) -> None:
        super().__init__(
            [dspy.Example(text=str(row), intent="").with_inputs("text") for row in rows],
            metric=lambda example, prediction, trace=None: 0.0,
            threads=1,
            seed=seed,
        )
        self._recording, self._discriminating = recording, discriminating

    def _next_block(self, candidate: Candidate, against: Candidate | None) -> list[int]:
        if not self._discriminating:
            return super()._next_block(candidate, against)
        # Of each stratum first the rows on which the candidates seen so far differ most (as POES and IRT choose them).
        seen = [[scores[row] for scores in self._table.values() if row in scores] for row in range(self.n)]
        spread = [float(np.var(one)) if len(one) > 1 else 0.25 for one in seen]
        mine = self.scores(against) if against else (None,) * self.n
        left = [row for row in range(self.n) if row not in self._table.get(candidate.key, {})]
        hard = [row for row in left if mine[row] == 0.0] or left
        return sorted(hard, key=lambda row: -spread[row])[: self.block_size]

    def _run(self, candidate: Candidate, rows: Sequence[int], *, allowance: Any, phase: Phase) -> None:
        if not allowance.can_afford(len(rows)):
            raise OutOfCalls
        allowance.spend(len(rows))
        scores = self._table.setdefault(candidate.key, {})
        self._candidates.setdefault(candidate.key, candidate)
        self._parses.add(candidate.key)
        known = self._recording.table[self._recording.numbers[candidate.key]]
        scores.update((row, float(known[int(self.examples[row].text)])) for row in rows)


class Calls:
    """An allowance without a model behind it; what `CallBudget` is for a study."""

    def __init__(self, ceiling: int) -> None:
        self.ceiling, self.charged_calls, self.scope = ceiling, 0, self

    def can_afford(self, n_calls: float) -> bool:
        return self.charged_calls + n_calls <= self.ceiling

    def spend(self, n_calls: int) -> None:
        self.charged_calls += n_calls


Method = Callable[[Recording, Sequence[int], int, int], int]
"""(recording, validation rows, calls, seed) -> number of the chosen point."""


def study(**settings: Any) -> Method:
    """Our own study with some settings changed; `race=False` scores every candidate in full."""
    race, discriminating = settings.pop("race", True), settings.pop("discriminating", False)

    def choose(recording: Recording, rows: Sequence[int], calls: int, seed: int) -> int:
        validation, allowance = (
            RecordedValidation(recording, rows, seed=seed, discriminating=discriminating),
            Calls(calls),
        )
        validation.complete(recording.space.incumbent, allowance=allowance, phase=Phase.BASELINE)  # type: ignore[arg-type]
        options = replace(SearchOptions(seed=seed, patience=None), stop_without_headroom=False, **settings)
        run = Race(
            recording.space,
            validation,
            allowance,
            options,
            phase=Phase.SEARCH,
            name="",
            watchers=Watchers(),  # type: ignore[arg-type]
        )
        if not race:
            run._pruner.prune = lambda study, trial: False  # type: ignore[method-assign]
        # As in `joint`: every weights under the prompts as written first.
        starts = [{WEIGHTS: option} for option in recording.space.dimensions[WEIGHTS]]
        return recording.numbers[run.run(starts).best.key]

    return choose


def random_search(recording: Recording, rows: Sequence[int], calls: int, seed: int) -> int:
    """Points drawn at random, each scored in full."""
    table, generator = recording.table[:, rows], np.random.default_rng(seed)
    drawn = generator.permutation(len(table))[: max(1, calls // len(rows))]
    return int(drawn[np.argmax(table[drawn].mean(axis=1))])


def successive_halving(recording: Recording, rows: Sequence[int], calls: int, seed: int) -> int:
    """Sequential halving (Karnin et al. 2013; TRIPLE-SH for prompts, Shi et al. 2024): equal calls to every round."""
    table, generator = recording.table[:, rows], np.random.default_rng(seed)
    # As many points as every round can give at least one row.
    n = min(len(table), max(2, calls // 4))
    alive, order = generator.permutation(len(table))[:n], generator.permutation(len(rows))
    n_rounds, seen = max(1, math.ceil(math.log2(n))), np.zeros(len(table), int)
    for _ in range(n_rounds):
        more = max(1, calls // n_rounds // len(alive))
        seen[alive] = np.minimum(len(rows), seen[alive] + more)
        means = np.array([table[i, order[: seen[i]]].mean() for i in alive])
        alive = alive[np.argsort(-means, kind="stable")][: math.ceil(len(alive) / 2)]
    return int(alive[0])


def hyperband(recording: Recording, rows: Sequence[int], calls: int, seed: int) -> int:
    """Hyperband (Li et al. 2018) with halving: brackets that begin with 3, 6, 12 or all rows, equal calls to each."""
    table, generator = recording.table[:, rows], np.random.default_rng(seed)
    starts = [start for start in (3, 6, 12, len(rows)) if start <= len(rows)]
    best, best_mean = 0, -1.0
    for start in starts:
        share, order = calls // len(starts), generator.permutation(len(rows))
        n_levels = 1 + int(math.log2(len(rows) / start))
        alive = generator.permutation(len(table))[: max(1, share // (start * n_levels))]
        n_seen = start
        while True:
            means = table[np.ix_(alive, order[:n_seen])].mean(axis=1)
            if n_seen >= len(rows) or len(alive) == 1:
                break
            alive = alive[np.argsort(-means, kind="stable")][: max(1, len(alive) // 2)]
            n_seen = min(len(rows), 2 * n_seen)
        first = int(np.argmax(means))
        if means[first] > best_mean:
            best, best_mean = int(alive[first]), float(means[first])
    return best


def ucb(recording: Recording, rows: Sequence[int], calls: int, seed: int) -> int:
    """UCB-E (Audibert et al. 2010): the next row to the point with the highest upper bound; the best mean wins."""
    table, generator = recording.table[:, rows], np.random.default_rng(seed)
    pool = generator.permutation(len(table))[: max(2, calls // 4)]
    orders = np.array([generator.permutation(len(rows)) for _ in pool])
    n, total = np.ones(len(pool)), np.array([table[i, orders[k, 0]] for k, i in enumerate(pool)])
    for _ in range(calls - len(pool)):
        bound = np.where(n < len(rows), total / n + np.sqrt(1.0 / n), -np.inf)
        k = int(np.argmax(bound))
        if not math.isfinite(bound[k]):
            break
        total[k] += table[pool[k], orders[k, int(n[k])]]
        n[k] += 1
    return int(pool[np.argmax(np.where(n >= 3, total / n, -1.0))])


METHODS: Mapping[str, Method] = {
    "ours (TPE, racing)": study(),
    "random, racing": study(sampler="random"),
    "GP, racing": study(sampler="gp"),
    "TPE, racing, discriminating rows first": study(discriminating=True),
    "TPE, no racing": study(race=False),
    "random": random_search,
    "successive halving": successive_halving,
    "hyperband": hyperband,
    "UCB-E": ucb,
}


OURS = "ours (TPE, racing)"


def report(directory: Path, *, budgets: Sequence[int], n_seeds: int) -> str:
    """Regret by method and calls with 95 % intervals, and the paired difference to ours; regret.png in `directory`.

    Raises:
        SystemExit: There is no recording.
    """
    recordings = [Recording.read(path) for path in sorted(FOLDER.glob("*.json.gz"))]
    if not recordings:
        raise SystemExit(f"{FOLDER} holds no recording: run record_configurations.py first.")
    logging.getLogger("copa_harness").setLevel(logging.WARNING)
    sections, curves = [], {}
    for recording in recordings:
        with quiet_optuna():
            found = {
                name: [regrets(recording, method, calls=calls, seeds=range(n_seeds)) for calls in budgets]
                for name, method in METHODS.items()
            }
        curves[recording.name] = {name: [mean_of(one) for one in by_calls] for name, by_calls in found.items()}
        rows = [
            [
                name,
                *(
                    cell
                    for mine, ours in zip(by_calls, found[OURS], strict=True)
                    for cell in (
                        mean_of(mine).text(),
                        ""
                        if name == OURS
                        else mean_of(a - b for a, b in zip(mine, ours, strict=True)).text(signed=True),
                    )
                ),
            ]
            for name, by_calls in found.items()
        ]
        means = recording.table.mean(axis=1)
        title = (
            f"{recording.name}: {len(means)} configurations, right on {means.max():.2f} of {recording.table.shape[1]} "
            f"rows at best, on {np.median(means):.2f} in the middle; regret after so many calls and its difference to "
            f"ours, 95 % intervals over {n_seeds} seeds"
        )
        headers = ["method", *(header for calls in budgets for header in (f"{calls}", "to ours"))]
        sections.append(title + "\n" + tabulate(rows, headers=headers, disable_numparse=True, stralign="right"))
    directory.mkdir(parents=True, exist_ok=True)
    draw_regret(curves, budgets, directory / "regret.png")
    return "\n\n".join(sections)


def regrets(recording: Recording, method: Method, *, calls: int, seeds: Sequence[int]) -> list[float]:
    """Regret of a method by seed."""
    best = int(np.argmax(recording.table.mean(axis=1)))
    found = []
    for seed in seeds:
        rows = np.random.default_rng([seed, 909]).permutation(recording.table.shape[1])
        chosen = method(recording, [int(row) for row in rows[:N_VALIDATION]], calls, seed)
        rest = recording.table[:, rows[N_VALIDATION:]]
        found.append(float(rest[best].mean() - rest[chosen].mean()))
    return found
