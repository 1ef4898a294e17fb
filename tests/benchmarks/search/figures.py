"""What is made of the records: means, paired differences, calls to reach a score, evaluations saved. Pure functions.

Symbols: a *pair* is one task x seed; differences between methods are taken within pairs and intervals are 95 % t
intervals over them (None below three). Knows nothing of files, tables or plots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

Record = dict[str, Any]
Pair = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over pairs with its 95 % interval (None when there are fewer than three)."""

    value: float
    low: float | None
    high: float | None
    n: int

    def text(self, *, signed: bool = False) -> str:
        """Like `+0.021 [-.01, +.05]`."""
        if self.n == 0:
            return "-"
        sign = "+" if signed else ""
        number = f"{self.value:{sign}.3f}"
        return number if self.low is None else f"{number} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"


def mean_of(values: Iterable[float]) -> Mean:
    """The mean with a t interval over the values."""
    found = np.array([value for value in values if not math.isnan(value)], dtype=float)
    n = len(found)
    if n == 0:
        return Mean(math.nan, None, None, 0)
    mean = float(found.mean())
    if n < 3:
        return Mean(mean, None, None, n)
    half = float(student.ppf(0.975, n - 1) * found.std(ddof=1) / math.sqrt(n))
    return Mean(mean, mean - half, mean + half, n)


def test_score(record: Record) -> float:
    """Mean test score of the program a run returned."""
    return float(np.mean(list(record["test"].values())))


def validation_score(record: Record) -> float:
    """Its score on the validation rows, nan when there is none."""
    return math.nan if record["validation"] is None else float(record["validation"])


class Results:
    """Records by method, budget and pair."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = list(records)
        self._by_key = {(r["method"], r["budget"], r["task"], r["seed"]): r for r in records}
        self.tasks = list(dict.fromkeys(r["task"] for r in records))
        self.budgets = sorted({r["budget"] for r in records})
        self.methods = list(dict.fromkeys(r["method"] for r in records))
        self.pairs: list[Pair] = sorted({(r["task"], r["seed"]) for r in records})

    def get(self, method: str, budget: int, pair: Pair) -> Record | None:
        """One record, or None."""
        return self._by_key.get((method, budget, *pair))

    def of(self, method: str, budget: int, *, task: str | None = None) -> list[Record]:
        """Records of a method at a budget."""
        return [
            r
            for r in self.records
            if r["method"] == method and r["budget"] == budget and (task is None or r["task"] == task)
        ]

    def difference(
        self, ours: str, theirs: str, budget: int, value: Callable[[Record], float], *, task: str | None = None
    ) -> Mean:
        """Mean paired difference `ours - theirs` over the pairs that have both."""
        found = []
        for pair in self.pairs:
            a, b = self.get(ours, budget, pair), self.get(theirs, budget, pair)
            if a is not None and b is not None and (task is None or pair[0] == task):
                found.append(value(a) - value(b))
        return mean_of(found)


def calls_to_reach(record: Record, score: float) -> float:
    """Distinct calls after which the run had a program of at least that validation score; inf when it never had."""
    return next((float(p["calls"]) for p in record["curve"] if p["score"] >= score - 1e-9), math.inf)


@dataclass(frozen=True, slots=True)
class Reach:
    """How much sooner a method reaches the best rival's final validation score.

    Attributes:
        of_total: Its calls over all calls the rival used, one per pair; inf where it never got there.
        of_first: Its calls over those after which the rival itself first had that score.
    """

    of_total: tuple[float, ...]
    of_first: tuple[float, ...]

    @property
    def median_of_total(self) -> float:
        """Median over pairs."""
        return float(np.median(self.of_total)) if self.of_total else math.nan

    @property
    def median_of_first(self) -> float:
        """Median over pairs."""
        return float(np.median(self.of_first)) if self.of_first else math.nan

    @property
    def n_reached(self) -> int:
        """Pairs in which the score was reached at all."""
        return sum(math.isfinite(ratio) for ratio in self.of_total)


def reach(results: Results, ours: str, rivals: Sequence[str], budget: int, *, task: str | None = None) -> Reach:
    """Against the best rival of each pair at this budget (of equals, the one that got there first).

    With one name in `rivals` it is that rival everywhere.
    """
    totals, firsts = [], []
    for pair in results.pairs:
        mine = results.get(ours, budget, pair)
        them = [r for r in (results.get(name, budget, pair) for name in rivals) if r is not None]
        them = [r for r in them if r["validation"] is not None]
        if mine is None or not them or (task is not None and pair[0] != task):
            continue
        best = max(validation_score(r) for r in them)
        equals = [r for r in them if validation_score(r) >= best - 1e-9]
        first = min(min(calls_to_reach(r, best), float(r["charged"])) for r in equals)
        total = min(float(r["charged"]) for r in equals)
        own = calls_to_reach(mine, best)
        totals.append(own / total)
        firsts.append(own / first)
    return Reach(tuple(totals), tuple(firsts))


def saved_by_racing(records: Iterable[Record]) -> Mean:
    """Share of example evaluations that racing left out: of all candidates looked at, rows not scored."""
    shares = []
    for record in records:
        whole = record["n_candidates"] * record["n_validation"]
        if whole:
            shares.append(1.0 - record["n_scored"] / whole)
    return mean_of(shares)


def curve_at(record: Record, calls: Sequence[float], *, key: str = "score") -> list[float]:
    """The incumbent's score after so many calls, nan before the first."""
    scores = record["test_curve"] if key == "test" else [p["score"] for p in record["curve"]]
    found = []
    for limit in calls:
        reached = [s for p, s in zip(record["curve"], scores, strict=True) if p["calls"] <= limit]
        found.append(reached[-1] if reached else math.nan)
    return found
