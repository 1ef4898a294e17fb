"""How often does a regression gate cry wolf, and what does it catch? A simulation with known truth.

    python tests/benchmarks/bench_gates.py            about five minutes on one core, eight with statgate
    python tests/benchmarks/bench_gates.py --quick    about one minute, coarser
    python tests/benchmarks/bench_gates.py --json gates.json

Two runs over the same n examples; a share d of them comes out differently; the true mean drops by 0, 3, 5 or 10
points. Right/wrong and graded scores, independent examples and clusters of ten, looked at once and after every row.
Every gate answers "did it drop?" at a nominal 5 % (no margin); a second table tests margins at the exact margin,
where a wrong pass is as bad as a wrong failure. Cells in which a rate of ours is above 5 % though nothing changed are
run again with fresh data, oftener, with the exact binomial interval: chance does not come twice. Beside copa-harness:
"any drop fails", "more than 2 points fails", an unpaired z-test, McNemar peeked at every ten rows, and the package
statgate when it is installed.
"""

import argparse
import functools
import itertools
import json
import math
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2]))

from copa_harness.judge.exact_tests import bounded_mean_p_value, clustered_bounded_p_value, exact_share_p_value
from copa_harness.judge.intervals import grouped
from copa_harness.judge.noninferiority import noninferiority
from copa_harness.judge.options import Gates
from copa_harness.judge.paired_gates import JudgedRun
from copa_harness.judge.paired_tests import PairedScores, permutation_p_value
from copa_harness.judge.power import chance_to_fail, chance_to_pass
from copa_harness.judge.sequential.alpha_spending import SpendingSignTest
from copa_harness.judge.sequential.betting import FRACTIONS
from copa_harness.judge.sequential.monitors import ThresholdMonitor
from copa_harness.judge.sequential.stopping import SequentialJudge
from copa_harness.results import Verdict

ALPHA = 0.05
SIZES = (50, 100, 200, 500)
DISAGREEMENTS = (0.05, 0.1, 0.2, 0.3)
DROPS = (0.0, 0.03, 0.05, 0.1)
CLUSTER = 10
ACCURACY = 0.7


@dataclass
class Plan:
    """How many runs of each kind; `noise` is what a rate may lie above 5 % by chance alone."""

    binary: int = 4000
    graded: int = 1000
    clustered: int = 1000
    power: int = 300
    margins: int = 600
    thresholds: int = 400
    statgate: int = 60
    again: int = 5000


QUICK = Plan(binary=1000, graded=200, clustered=200, power=60, margins=150, thresholds=60, statgate=15, again=2000)


@dataclass
class Cell:
    kind: str
    n: int
    disagreement: float
    drop: float
    runs: int
    rates: dict = field(default_factory=dict)
    rows: float | None = None
    beside_statgate: float | None = None  # our rate on the few runs that statgate saw


# -- what happens -----------------------------------------------------------------------------------------------


def binary_differences(rng, runs, n, disagreement, drop):
    draws = rng.random((runs, n))
    return np.where(draws < (disagreement + drop) / 2, -1.0, np.where(draws < disagreement, 1.0, 0.0))


MEAN_CHANGE = 0.75


def graded_differences(rng, runs, n, disagreement, drop):
    """A share moves by Beta(3, 1); how many of those are losses makes the mean drop. Exchangeable at a drop of 0."""
    moved = rng.random((runs, n)) < disagreement
    share_lost = 0.5 + drop / (2 * MEAN_CHANGE * disagreement)
    sign = np.where(rng.random((runs, n)) < share_lost, -1.0, 1.0)
    return np.where(moved, sign * np.round(rng.beta(3, 1, (runs, n)), 2), 0.0)


COHERENCE = 0.9


def clustered_differences(rng, runs, n, disagreement, drop):
    """Clusters of ten: each leans to loss or gain as a whole, and nine in ten of its moves follow."""
    clusters = n // CLUSTER
    share_losing = 0.5 + drop / (2 * disagreement * (2 * COHERENCE - 1))
    leaning = np.where(rng.random((runs, clusters)) < share_losing, -1.0, 1.0)
    sign = np.repeat(leaning, CLUSTER, axis=1)
    sign = np.where(rng.random((runs, n)) < COHERENCE, sign, -sign)
    return np.where(rng.random((runs, n)) < disagreement, sign, 0.0)


def is_possible(kind, disagreement, drop):
    reach = {"right/wrong": 1.0, "graded": MEAN_CHANGE, "clustered": 2 * COHERENCE - 1}[kind]
    return drop <= disagreement * reach + 1e-12


# -- the gates --------------------------------------------------------------------------------------------------


@functools.cache
def mcnemar(gained, lost):
    """The exact test of "no drop" that conditions on how many rows moved."""
    return float(stats.binom.cdf(gained, gained + lost, 0.5))


def mcnemar_p_values(differences):
    gained, lost = (differences > 0).sum(axis=-1), (differences < 0).sum(axis=-1)
    return np.array([mcnemar(int(g), int(lo)) for g, lo in zip(gained.ravel(), lost.ravel(), strict=False)]).reshape(
        gained.shape
    )


def any_drop(differences):
    return (differences.mean(axis=1) < -1e-12).mean()


def two_points(differences):
    return (differences.mean(axis=1) < -0.02 - 1e-12).mean()


def unpaired_z(rng, differences):
    """A two-sample z-test of the two means, as if they were of different examples, at 70 % accuracy."""
    n = differences.shape[1]
    before = ACCURACY
    after = np.clip(before + differences.mean(axis=1), 0, 1)
    pooled = (before + after) / 2
    z = (before - after) / np.sqrt(np.maximum(2 * pooled * (1 - pooled) / n, 1e-12))
    return (z > stats.norm.ppf(1 - ALPHA)).mean()


def peeked_mcnemar(differences, every=10):
    gained, lost = np.cumsum(differences > 0, axis=1), np.cumsum(differences < 0, axis=1)
    looks = np.arange(every - 1, differences.shape[1], every)
    alarms = np.zeros(differences.shape[0], dtype=bool)
    for look in looks:
        alarms |= np.array(
            [mcnemar(int(g), int(lo)) <= ALPHA for g, lo in zip(gained[:, look], lost[:, look], strict=False)]
        )
    return alarms.mean()


def first_crossing(values, *, low, level):
    """First row (from 1) at which the e-process against "the mean is at most 0" reaches 1 / level; n + 1 for never.

    The same numbers as `betting.MeanAbove(0, low=low, ...)`, for many runs at once.
    """
    wealth = np.zeros(values.shape)
    for fraction in FRACTIONS:
        logs = np.cumsum(np.log1p(fraction * values / -low), axis=1)
        wealth += np.exp(np.minimum(logs, 700.0)) / len(FRACTIONS)
    crossed = wealth >= 1 / level
    return np.where(crossed.any(axis=1), crossed.argmax(axis=1) + 1, values.shape[1] + 1)


@functools.cache
def no_drop(gained, lost, n):
    if gained + lost == 0:
        return 1.0
    return exact_share_p_value(gained, lost, n, difference=0.0, alternative="less")


def copa_p_values(kind, differences):
    """What the gate `max_regression=0` computes on all rows."""
    if kind == "right/wrong":
        gained, lost, n = (differences > 0).sum(axis=1), (differences < 0).sum(axis=1), differences.shape[1]
        return np.array([no_drop(int(g), int(lo), n) for g, lo in zip(gained, lost, strict=True)])
    if kind == "graded":
        return np.array([permutation_p_value(row, alternative="less", seed=i) for i, row in enumerate(differences)])
    totals = differences.reshape(differences.shape[0], -1, CLUSTER).sum(axis=2)
    return np.array([permutation_p_value(row, alternative="less", seed=i) for i, row in enumerate(totals)])


def sequential(kind, differences, p_values):
    """Alarm rate and rows used of sequential mode.

    Right/wrong: the exact test looked at after every row. All else: half of alpha while looking, half at the end.
    """
    if kind == "right/wrong":
        watched = SpendingSignTest(differences.shape[1], alpha=ALPHA, n_runs=len(differences))
        for column in differences.T:
            watched.add(column)
        rows = np.minimum(watched.rejected_at, differences.shape[1])
        return (watched.rejected_at <= differences.shape[1]).mean(), float(rows.mean())
    values = -differences
    unit = 1
    if kind == "clustered":
        values, unit = values.reshape(values.shape[0], -1, CLUSTER).sum(axis=2) / CLUSTER, CLUSTER
    at = first_crossing(values, low=-1.0, level=ALPHA / 2)
    stopped = at <= values.shape[1]
    alarms = stopped | (p_values <= ALPHA / 2)
    return alarms.mean(), float(np.minimum(at * unit, differences.shape[1]).mean())


def sprt(differences, *, disagreement, drop):
    """Power and rows of Wald's one-sided test for exactly this drop and disagreement: what nobody knows beforehand."""
    gain = np.log(max(disagreement - drop, 1e-9) / disagreement)
    loss = np.log1p(drop / disagreement)
    wealth = np.where(differences < 0, loss, np.where(differences > 0, gain, 0.0)).cumsum(axis=1)
    crossed = wealth >= np.log(1 / ALPHA)
    rows = np.where(crossed.any(axis=1), crossed.argmax(axis=1) + 1, differences.shape[1])
    return crossed.any(axis=1).mean(), float(rows.mean())


def statgate_alarms(differences):
    from statgate import EvalRecord, GateSettings, evaluate_gate
    from statgate import Verdict as Theirs

    settings = GateSettings(margin=0.0, alpha=ALPHA, resamples=2000, permutations=100, seed=0)
    alarms = 0
    for row in differences:
        before = [EvalRecord(case_id=str(i), score=0.0 if d > 0 else 1.0) for i, d in enumerate(row)]
        after = [EvalRecord(case_id=str(i), score=(0.0 if d > 0 else 1.0) + float(d)) for i, d in enumerate(row)]
        alarms += evaluate_gate(before, after, settings).verdict is Theirs.BLOCK
    return alarms / len(differences)


# -- the tables -------------------------------------------------------------------------------------------------


MAKE = {"right/wrong": binary_differences, "graded": graded_differences, "clustered": clustered_differences}
OURS = ("copa", "copa sequential")


def run_again(cells, plan, rng):
    """Fresh runs of the cells that alarmed above 5 % though nothing changed: (cell, name, rate, its exact interval)."""
    found = []
    print(f"\nnothing changed, cells above 5 %: run again {plan.again:,} times [exact 95 % interval]")
    for cell in cells:
        if cell.drop > 0 or max(cell.rates[name] for name in OURS) <= ALPHA:
            continue
        differences = MAKE[cell.kind](rng, plan.again, cell.n, cell.disagreement, 0.0)
        p_values = copa_p_values(cell.kind, differences)
        rates = (float((p_values <= ALPHA).mean()), sequential(cell.kind, differences, p_values)[0])
        for name, rate in zip(OURS, rates, strict=True):
            bounds = stats.binomtest(round(rate * plan.again), plan.again).proportion_ci(0.95)
            found.append((cell, name, rate, bounds))
            print(
                f"  {cell.kind}, n = {cell.n}, d = {cell.disagreement}, {name}: {100 * cell.rates[name]:.2f} % of "
                f"{cell.runs:,}; again {100 * rate:.2f} % [{100 * bounds.low:.2f}, {100 * bounds.high:.2f}]",
                flush=True,
            )
    return found


def simulate(plan, rng):
    cells = []
    for kind, draw in MAKE.items():
        for n in SIZES:
            for disagreement in DISAGREEMENTS:
                for drop in DROPS:
                    if not is_possible(kind, disagreement, drop):
                        continue
                    full = {"right/wrong": plan.binary, "graded": plan.graded, "clustered": plan.clustered}[kind]
                    runs = full if drop == 0 or kind == "right/wrong" else plan.power
                    differences = draw(rng, runs, n, disagreement, drop)
                    cell = Cell(kind, n, disagreement, drop, runs)
                    p_values = copa_p_values(kind, differences)
                    cell.rates["any drop"] = any_drop(differences)
                    cell.rates["> 2 points"] = two_points(differences)
                    cell.rates["unpaired z"] = unpaired_z(rng, differences)
                    if kind == "right/wrong":
                        cell.rates["McNemar peeked"] = peeked_mcnemar(differences)
                    if kind == "clustered":
                        cell.rates["McNemar, no groups"] = (mcnemar_p_values(differences) <= ALPHA).mean()
                    cell.rates["copa"] = (p_values <= ALPHA).mean()
                    cell.rates["copa sequential"], cell.rows = sequential(kind, differences, p_values)
                    if kind == "right/wrong":
                        gained, lost = (differences > 0).sum(axis=1), (differences < 0).sum(axis=1)
                        exact = stats.binom.cdf(gained, gained + lost, 0.5) <= ALPHA
                        cell.rates["exact McNemar"] = exact.mean()
                        cell.rates["exact power"] = chance_to_fail(n, drop=drop, disagreement=disagreement)
                    if find_spec("statgate") is not None and (
                        kind == "right/wrong" or (drop == 0 and kind != "graded")
                    ):
                        cell.rates["statgate"] = statgate_alarms(differences[: plan.statgate])
                        cell.beside_statgate = float((p_values[: plan.statgate] <= ALPHA).mean())
                    cells.append(cell)
        print_cells(cells, kind, DROPS)
    return cells


def print_cells(cells, kind, drops):
    chosen = [cell for cell in cells if cell.kind == kind and cell.drop in drops]
    names = list(dict.fromkeys(name for cell in chosen for name in cell.rates))
    print(f"\n{kind}: share of runs that fail, by true drop; rows = mean rows used by copa sequential")
    print(f"{'n':>4} {'d':>5} {'drop':>5} " + " ".join(f"{name:>18}" for name in names) + f" {'rows':>6}")
    for cell in sorted(chosen, key=lambda cell: (cell.drop, cell.n, cell.disagreement)):
        rates = " ".join(f"{cell.rates[name]:>18.3f}" if name in cell.rates else f"{'-':>18}" for name in names)
        print(f"{cell.n:>4} {cell.disagreement:>5.2f} {cell.drop:>5.2f} {rates} {cell.rows:>6.0f}", flush=True)


def skewed_differences(rng, n, margin, share):
    """Mean exactly -margin, all of it in a few rows that fall by 1; the others do not move."""
    return -(rng.random(n) < margin).astype(float) if share == 0 else _lopsided(rng, n, margin, share)


def _lopsided(rng, n, margin, share):
    """A few large losses, many small gains (share of the rows, +0.1): the mean is -margin."""
    large = 0.8
    p_loss = (margin + 0.1 * share) / large
    draws = rng.random(n)
    return np.where(draws < p_loss, -large, np.where(draws < p_loss + share, 0.1, 0.0))


def at_the_margin(plan, rng):
    """Wrong verdicts when the true drop is exactly the margin: passes and failures, each at most 5 %."""
    print("\ntrue drop exactly the margin: share of runs that pass / fail (each must stay at or under 5 %)")
    print(
        f"{'n':>4} {'margin':>6} {'right/wrong':>16} {'graded, few fall by 1':>22} {'graded, lopsided':>18} "
        f"{'clustered':>16}"
    )
    worst = []
    exact = functools.lru_cache(maxsize=None)(exact_share_p_value)
    for n in (50, 100, 200):
        for margin in (0.05, 0.1):
            columns = []
            for kind in ("right/wrong", "few", "lopsided", "clustered"):
                passed = failed = 0
                labels = [str(i // CLUSTER) for i in range(n)]
                for run in range(plan.margins):
                    if kind == "right/wrong":
                        d = binary_differences(rng, 1, n, 0.2, margin)[0]
                        g, lo = int((d > 0).sum()), int((d < 0).sum())
                        p_pass = exact(g, lo, n, difference=-margin, alternative="greater")
                        p_fail = max(exact(g, lo, n, difference=-margin, alternative="less"), mcnemar(g, lo))
                    elif kind == "clustered":
                        d = clustered_differences(rng, 1, n, 0.2, margin)[0]
                        p_pass, p_fail = (
                            clustered_bounded_p_value(d, labels, difference=-margin, alternative=side, seed=run)
                            for side in ("greater", "less")
                        )
                        p_fail = max(p_fail, permutation_p_value(grouped(d, labels).totals, alternative="less"))
                    else:
                        d = skewed_differences(rng, n, margin, 0 if kind == "few" else 0.3)
                        p_pass, p_fail = (
                            bounded_mean_p_value(d, mean=-margin, alternative=side, low=-1.0, high=1.0, seed=run)
                            for side in ("greater", "less")
                        )
                        p_fail = max(p_fail, permutation_p_value(d, alternative="less")) if p_fail <= ALPHA else p_fail
                    passed += p_pass <= ALPHA
                    failed += p_fail <= ALPHA
                columns.append((passed / plan.margins, failed / plan.margins))
            worst += [rate for pair in columns for rate in pair]
            texts = [f"{p:.3f} / {f:.3f}" for p, f in columns]
            print(f"{n:>4} {margin:>6.2f} {texts[0]:>16} {texts[1]:>22} {texts[2]:>18} {texts[3]:>16}", flush=True)
    return worst


def thresholds(plan, rng):
    """min_score in sequential mode: how often an early verdict differs from that of all rows, and rows used."""
    print("\nmin_score=0.8 in sequential mode, 300 examples: wrong early verdicts and rows used, by accuracy")
    worst = []
    for accuracy in (0.65, 0.75, 0.8, 0.85, 0.95):
        wrong, used = 0, []
        for _ in range(plan.thresholds):
            scores = (rng.random(300) < accuracy).astype(float)
            monitor = ThresholdMonitor(0.8, sizes=[1] * 300, alpha=ALPHA)
            position = 0
            for score in scores:
                position += 1
                monitor.add([score])
                if monitor.verdict is not None:
                    break
            wrong += (monitor.verdict is Verdict.PASS) != (scores.mean() >= 0.8 - 1e-9)
            used.append(position)
        worst.append(wrong / plan.thresholds)
        print(f"  accuracy {accuracy:.2f}: wrong {wrong / plan.thresholds:.3f}, rows {np.mean(used):.0f} of 300")
    return worst


def shipped_setting():
    """75 rows, a margin of 5 points, three gates: exact, nothing is simulated."""
    print("\n75 rows, max_regression=.05, 3 gates: chance to pass unchanged, to fail by true drop (exact)")
    lines = []
    for disagreement, least in ((0.1, 0.85), (0.2, 0.43)):
        passes = chance_to_pass(75, disagreement=disagreement, margin=0.05, alpha=ALPHA)
        drops = [drop for drop in (0.0, 0.02, 0.05, 0.1, 0.15) if drop <= disagreement]
        fails = {
            drop: chance_to_fail(75, disagreement=disagreement, drop=drop, margin=0.05, alpha=ALPHA / 3)
            for drop in drops
        }
        print(f"  d = {disagreement}: pass {passes:.3f}; " + ", ".join(f"-{k:g}: {v:.3f}" for k, v in fails.items()))
        lines.append(
            (f"an unchanged gate fails in at most 1.7 %, d = {disagreement}", f"{fails[0.0]:.4f}", fails[0.0] <= 0.017)
        )
        lines.append(
            (f"a true -10 is failed, d = {disagreement}: at least {least}", f"{fails[0.1]:.3f}", fails[0.1] >= least)
        )
    return lines


@functools.cache
def p_any_drop(gained, lost, n):
    return exact_share_p_value(gained, lost, n, difference=0.0, alternative="less") if lost > gained else 1.0


def together(plan, rng):
    """max_regression=.05 with slices and an anchor: how often a program fails that is unchanged, or lost 10 points.

    Runs are draws of one program whose answers flip by chance; the anchor is an earlier one, with one accepted since.
    The error rate is what each of the first two questions has: 5 %, or half of it.
    """

    def fails(differences, level):
        better, worse = int((differences > 0).sum()), int((differences < 0).sum())
        return p_any_drop(better, worse, len(differences)) <= level and worse - better >= 0.05 * len(differences) - 1e-9

    print("\nmax_regression=.05 fails: alone, a slice, since the anchor, any of them; at 5 %, and at 2.5 %")
    for n, disagreement, drop, n_slices in itertools.product((75, 150, 300), (0.1, 0.2), (0.0, 0.1), (2, 4)):
        flips, counts = (1 - math.sqrt(1 - 2 * disagreement)) / 2, np.zeros((2, 4))
        for _ in range(plan.binary // 2):
            right = rng.random(n) < ACCURACY
            anchor, before, after = (np.where(rng.random(n) < flips, ~right, right) for _ in range(3))
            after &= rng.random(n) >= drop / ACCURACY
            change, since = after * 1.0 - before, after * 1.0 - anchor
            for i, level in enumerate((ALPHA, ALPHA / 2)):
                # Holm's first step; its later ones find more slices, and fail no more runs.
                found = [
                    fails(change, level),
                    any(fails(change[k::n_slices], level / n_slices) for k in range(n_slices)),
                    change.sum() < 0 and fails(since, ALPHA / 6),
                ]
                counts[i] += [*found, any(found)]
        shown = "; ".join(" ".join(f"{rate:.3f}" for rate in row) for row in counts / (plan.binary // 2))
        print(f"  n = {n}, d = {disagreement}, -{drop:g}, {n_slices} slices: {shown}", flush=True)


def check_against_real(rng):
    """The vectorized copies above against `SequentialJudge` and `noninferiority` themselves, run by run."""
    ids = tuple(f"e{i:03}" for i in range(120))
    for _ in range(20):
        d = binary_differences(rng, 1, 120, 0.2, 0.1)[0]

        class Before:
            name, origin, fingerprints = "before", "", {}
            scores = {key: float(value <= 0) for key, value in zip(ids, d)}  # noqa: B905

        after = {key: Before.scores[key] + float(value) for key, value in zip(ids, d, strict=False)}
        watch = SequentialJudge(ids, Gates(max_regression=0.0), run=JudgedRun(None, baseline=Before()), seed=1)
        for block in watch.blocks(size=1):
            watch.add({key: after[key] for key in block})
        order = [key for unit in watch.units for key in unit]
        in_order = np.array([[after[key] - Before.scores[key] for key in order]])
        stops = []
        for sign in (1, -1):
            looked = SpendingSignTest(120, alpha=ALPHA)
            for value in in_order[0]:
                looked.add(np.array([sign * value]))
            stops.append(looked.rejected_at[0])
        assert watch.n_used == min(*stops, 120), (watch.n_used, stops)
        pairs = PairedScores(ids, tuple(Before.scores[key] for key in ids), tuple(after[key] for key in ids))
        fails = noninferiority(pairs, margin=0.0).verdict is Verdict.FAIL
        assert fails == (copa_p_values("right/wrong", d[None])[0] <= ALPHA)


def report_targets(cells, again, margin_rates, threshold_rates, shipped, plan):
    """The targets of the gate, each with its figure."""

    def worst(name, kinds):
        nothing = [cell for cell in cells if cell.drop == 0 and cell.kind in kinds]
        return max(nothing, key=lambda cell: cell.rates[name] - noise(cell.runs, len(nothing)))

    def noise(runs, looks):
        return stats.norm.ppf(1 - 0.01 / looks) * math.sqrt(ALPHA * (1 - ALPHA) / runs)

    everything = ("right/wrong", "graded", "clustered")
    lines = []
    for name, label in (("copa", "looking once"), ("copa sequential", "looking after every row")):
        cell = worst(name, everything)
        tolerance = noise(cell.runs, 48)
        highest = max((c for c in cells if c.drop == 0), key=lambda c: c.rates[name])
        lines.append(
            (
                f"false alarms at most 5 % in every cell, {label}",
                f"highest {100 * highest.rates[name]:.1f} % of {highest.runs:,} runs ({highest.kind}, n = {highest.n}; "
                f"simulation error {100 * math.sqrt(ALPHA * (1 - ALPHA) / highest.runs):.1f})",
                cell.rates[name] <= ALPHA + tolerance,
            )
        )
    if again:
        cell, name, rate, bounds = max(again, key=lambda entry: entry[2])
        lines.append(
            (
                "cells above 5 % at first, run again: 5 % is in or above the interval of each",
                f"highest {100 * rate:.2f} % of {plan.again:,} [{100 * bounds.low:.2f}, {100 * bounds.high:.2f}] "
                f"({cell.kind}, n = {cell.n}, {name})",
                all(entry[3].low <= ALPHA for entry in again),
            )
        )
    tolerance = noise(plan.margins, len(margin_rates))
    lines.append(
        (
            "wrong verdicts at the exact margin at most 5 % each",
            f"highest {100 * max(margin_rates):.1f} %",
            max(margin_rates) <= ALPHA + tolerance,
        )
    )
    lines.append(
        (
            "early threshold verdicts differ from those of all rows in at most 5 %",
            f"highest {100 * max(threshold_rates):.1f} %",
            max(threshold_rates) <= ALPHA,
        )
    )
    changed = [c for c in cells if c.kind == "right/wrong" and c.drop > 0]
    for name, ours in (("exact McNemar", lambda c: c.rates["copa"]), ("statgate", lambda c: c.beside_statgate)):
        beside = [(ours(c) - c.rates[name], c) for c in changed if name in c.rates]
        if not beside:
            continue
        gap, cell = min(beside, key=lambda pair: pair[0])
        lines.append(
            (
                f"power without a margin at least that of {name} in every cell, on the same runs",
                f"least lead {100 * gap:.1f} points (n = {cell.n}, d = {cell.disagreement}, -{cell.drop:g}; "
                f"{plan.statgate if name == 'statgate' else cell.runs} runs)",
                gap >= 0,
            )
        )
    cost = max(c.rates["copa"] - c.rates["copa sequential"] for c in changed)
    print(f"\nsequential mode costs at most {100 * cost:.0f} points of power in any right/wrong cell")
    rng = np.random.default_rng(11)
    for disagreement in (0.1, 0.2, 0.3):
        differences = binary_differences(rng, plan.binary, 300, disagreement, 0.1)
        p_values = copa_p_values("right/wrong", differences)
        power, rows = sequential("right/wrong", differences, p_values)
        oracle_power, oracle_rows = sprt(differences, disagreement=disagreement, drop=0.1)
        lines.append(
            (
                f"sequential saves at least 40 % on a 10-point drop at n = 300, d = {disagreement}",
                f"{100 * (1 - rows / 300):.0f} % saved; found in {100 * power:.1f} % (all rows: "
                f"{100 * (p_values <= ALPHA).mean():.1f} %; Wald's test that knows d and the drop: "
                f"{100 * (1 - oracle_rows / 300):.0f} % saved, found in {100 * oracle_power:.1f} %)",
                1 - rows / 300 >= 0.4,
            )
        )
    lines += shipped
    print("\ntargets")
    for target, figure, met in lines:
        print(f"  {'met   ' if met else 'MISSED'}  {target}: {figure}")
    return [{"target": target, "figure": figure, "met": bool(met)} for target, figure, met in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute, coarser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else Plan()
    start = time.perf_counter()
    rng = np.random.default_rng(arguments.seed)
    check_against_real(rng)
    if find_spec("statgate") is None:
        print("statgate is not installed: left out")
    cells = simulate(plan, rng)
    again = run_again(cells, plan, np.random.default_rng([arguments.seed, 1]))
    margin_rates = at_the_margin(plan, rng)
    threshold_rates = thresholds(plan, rng)
    together(plan, rng)
    targets = report_targets(cells, again, margin_rates, threshold_rates, shipped_setting(), plan)
    print(f"\n{time.perf_counter() - start:.0f} s")
    if arguments.json:
        rows = [{**vars(cell), "rates": {name: float(rate) for name, rate in cell.rates.items()}} for cell in cells]
        arguments.json.write_text(json.dumps({"targets": targets, "cells": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
