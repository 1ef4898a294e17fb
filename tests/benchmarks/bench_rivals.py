"""The regression gate beside statgate, evalsig and siggate on the same runs.

    python -m venv rivals && rivals/bin/pip install statgate evalsig siggate      # apart: they pin numpy
    PYTHONPATH=. rivals/bin/python tests/benchmarks/bench_rivals.py --runs 100

Right/wrong scores, margin 0, one-sided at 5 %: how often each says "worse" when nothing changed and when points were
lost. evalsig and siggate look for gains, so the two runs change places. Then what each says of 75 identical answers
where five points may be lost. Rivals that are not installed are left out.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2])]

from copa_harness.judge.noninferiority import noninferiority  # noqa: E402
from copa_harness.judge.paired_tests import PairedScores, paired_difference  # noqa: E402

ALPHA = 0.05
CELLS = (
    (50, 0.1, 0.0), (75, 0.2, 0.0), (100, 0.2, 0.0), (200, 0.3, 0.0), (500, 0.2, 0.0),
    (50, 0.1, 0.1), (75, 0.2, 0.1), (100, 0.2, 0.1), (200, 0.3, 0.1), (200, 0.2, 0.05), (500, 0.2, 0.05),
)  # fmt: skip
"""Rows, share of answers that differ, points lost."""


def copa(before, after):
    pairs = PairedScores([str(i) for i in range(before.size)], before.tolist(), after.tolist())
    found = paired_difference(pairs)
    return found.difference < 0 and found.p_one_sided <= ALPHA


def statgate(before, after, margin=0.0):
    from statgate import EvalRecord, GateSettings, evaluate_gate

    runs = [[EvalRecord(case_id=str(i), score=float(s)) for i, s in enumerate(run)] for run in (before, after)]
    settings = GateSettings(margin=margin, alpha=ALPHA, resamples=2000, permutations=100, seed=0)
    return evaluate_gate(*runs, settings).verdict.name


def evalsig(before, after, margin=0.0):
    import evalsig as package
    from evalsig.types import ItemResult, RunFrame

    def frame(run):
        return RunFrame("r", "m", "t", "acc", [ItemResult(str(i), float(s)) for i, s in enumerate(run)])

    if margin:
        return package.gate(frame(before), frame(after), min_delta=-margin, alpha=ALPHA).verdict
    found = package.compare(frame(after), frame(before), alpha=ALPHA, one_sided=True, n_resamples=2000)
    return found.p_value <= ALPHA and found.delta > 0


def siggate(before, after):
    import siggate as package

    found = package.compare(after.tolist(), before.tolist(), alpha=2 * ALPHA, n_boot=2000)
    return found.label == package.REAL and before.mean() > after.mean()


SAYS_WORSE = {
    "copa": copa,
    "statgate": lambda before, after: statgate(before, after) == "BLOCK",
    "evalsig": evalsig,
    "siggate": siggate,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    names = [name for name in SAYS_WORSE if name == "copa" or find_spec(name) is not None]
    print("says worse, " + f"{options.runs} runs a cell\n  n    d  lost   " + "  ".join(f"{name:>8}" for name in names))
    rng, started = np.random.default_rng(options.seed), time.perf_counter()
    for n, moved, lost in CELLS:
        draws = rng.random((options.runs, n))
        before = np.where(draws < (moved + lost) / 2, 1.0, np.where(draws < moved, 0.0, rng.random(draws.shape) < 0.7))
        after = np.where(draws < moved, 1 - before, before)
        rates = [np.mean([SAYS_WORSE[name](*pair) for pair in zip(before, after, strict=True)]) for name in names]
        print(f"{n:>3} {moved:>4} {lost:>5}   " + "  ".join(f"{rate:>8.2f}" for rate in rates), flush=True)
    same = np.array([1.0] * 60 + [0.0] * 15)
    pairs = PairedScores([str(i) for i in range(75)], same.tolist(), same.tolist())
    print(f"75 identical answers, margin .05: copa {noninferiority(pairs, margin=0.05).verdict.value}", end="")
    for name, gate in (("statgate", statgate), ("evalsig", evalsig)):
        if name in names:
            print(f", {name} {gate(same, same, 0.05)}", end="")
    print(f"; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
