"""The regression gate on real logs: systems of the embedded model that answered the same rows (`gate_logs.json`).

    python tests/benchmarks/bench_gates_logs.py               about two minutes on one core
    python tests/benchmarks/bench_gates_logs.py --json f.json

A pool of rows answered by two systems is a population whose true difference is known: its mean over the pool. Test
splits of n rows are drawn from it with replacement, row by row with both answers, so that whatever dependence there is
between the two systems is kept. False alarms are counted where the truth is "nothing dropped":

    A/A        two repeats of one program at temperature 1; of every row a coin says which of the two is "before", so
               the true difference is exactly 0
    no drop    any two systems (other demonstrations, instruction, weights), before and after exchanged by a coin row by
               row: disagreement as between real systems, true difference 0
    a rise     any two systems of which the second is better on the pool

and power where it dropped: all pairs of which the second is worse on the pool, by the size of the drop. Beside
copa-harness: "any drop fails", "more than 2 points fails", and the power that the formula of `power.py` promises.
"""

import argparse
import itertools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from bench_gates import ALPHA, any_drop, copa_p_values, sequential, two_points

from copa_harness.judge.power import chance_to_fail

LOGS = Path(__file__).with_name("gate_logs.json")
SIZES = (50, 100, 200, 500)
RUNS = 60
BINS = ((0.0, 0.03), (0.03, 0.07), (0.07, 0.15), (0.15, 0.4))


def load():
    """By pool: right (1) or wrong (0) per system [n_rows]."""
    document = json.loads(LOGS.read_text(encoding="utf-8"))
    return {
        pool: {name: np.array(list(answers), dtype=int) for name, answers in found["right"].items()}
        for pool, found in document["pools"].items()
    }


def pairs_of(systems):
    """(kind, difference per row) of every ordered pair of systems."""
    for one, other in itertools.permutations(systems, 2):
        repeats = one.startswith("sampled") and other.startswith("sampled")
        if repeats:
            yield "A/A", systems[other] - systems[one]
        elif not (one.startswith("sampled") or other.startswith("sampled")):
            yield "systems", systems[other] - systems[one]


def judged(differences):
    """Share of splits on which each gate alarms, and rows used by sequential mode."""
    p_values = copa_p_values("right/wrong", differences)
    sequential_rate, rows = sequential("right/wrong", differences, p_values)
    return {
        "any drop": any_drop(differences),
        "> 2 points": two_points(differences),
        "copa": (p_values <= ALPHA).mean(),
        "copa sequential": sequential_rate,
        "rows": rows,
    }


def cells(rng, *, runs):
    """{(case, n): [figures of each pair]}."""
    found = defaultdict(list)
    for systems in load().values():
        for kind, row_differences in pairs_of(systems):
            truth, disagreement = float(row_differences.mean()), float((row_differences != 0).mean())
            if not disagreement:
                continue
            for n in SIZES:
                drawn = row_differences[rng.integers(0, row_differences.size, (runs, n))].astype(float)
                coins = rng.choice([-1.0, 1.0], drawn.shape)
                found["A/A" if kind == "A/A" else "no drop", n].append(judged(drawn * coins) | {"d": disagreement})
                if kind == "A/A":
                    continue
                if truth >= 0:
                    found["a rise", n].append(judged(drawn) | {"d": disagreement})
                    continue
                case = next(f"{100 * a:.0f}-{100 * b:.0f} points lost" for a, b in BINS if a <= -truth < b or b == 0.4)
                promised = chance_to_fail(n, drop=-truth, disagreement=disagreement)
                found[case, n].append(judged(drawn) | {"d": disagreement, "promised": promised})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS, help="splits drawn per pair and size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = cells(np.random.default_rng(arguments.seed), runs=arguments.runs)
    names = ("any drop", "> 2 points", "copa", "copa sequential", "promised", "d", "rows")
    print("share of splits that alarm, mean over pairs; d = mean disagreement, rows = used by sequential mode")
    print(f"{'truth':<18} {'n':>4} {'pairs':>6} " + " ".join(f"{name:>15}" for name in names) + f" {'worst pair':>11}")
    rows = []
    order = ("A/A", "no drop", "a rise", *(f"{100 * a:.0f}-{100 * b:.0f} points lost" for a, b in BINS))
    for (case, n), pairs in sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        means = {name: float(np.mean([pair[name] for pair in pairs])) for name in names if name in pairs[0]}
        worst = max(pair["copa"] for pair in pairs)
        rows.append({"case": case, "n": n, "pairs": len(pairs), "worst": float(worst), **means})
        cells_ = " ".join(f"{means[name]:>15.3f}" if name in means else f"{'-':>15}" for name in names)
        print(f"{case:<18} {n:>4} {len(pairs):>6} {cells_} {worst:>11.3f}")
    alarms = {name: max(row[name] for row in rows if row["case"] in order[:3]) for name in ("copa", "copa sequential")}
    gap = max(abs(row["copa"] - row["promised"]) for row in rows if "promised" in row)
    print(
        f"\nhighest share of false alarms: {100 * alarms['copa']:.1f} % looking once, "
        f"{100 * alarms['copa sequential']:.1f} % looking after every row (at most 5 % wanted)"
    )
    print(f"largest gap between power and what the formula promises: {100 * gap:.1f} points")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
