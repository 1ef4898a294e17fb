"""COPA's search beside DSPy's optimizers at equal numbers of calls, on the embedded model.

    python tests/benchmarks/bench_search.py --quick                   # two minutes: one task, one seed, 100 calls
    python tests/benchmarks/bench_search.py                           # the whole grid, then the report
    python tests/benchmarks/bench_search.py --part 0 2 & ... --part 1 2   # the same by two processes
    python tests/benchmarks/bench_search.py --report-only
    python tests/benchmarks/bench_search.py --budgets 200 400 --methods "p, written" "p, one round"
    python tests/benchmarks/bench_search.py --recorded                # SmolLM2's recorded answers: minutes, no model

Tasks x seeds x budgets x methods; each cell is one optimization through `COPA`, metered alike, its test score taken
afterwards and outside of the budget. Finished cells are kept in `--out`/cells under the hash of the sources they depend
on, so the same command goes on where it was stopped. Writes report.txt, report.json and curves.png into `--out`.

Nothing is collected by pytest. The prompt LM of GEPA and MIPROv2 is a script (see `search.writer`): the embedded model
cannot write instructions.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

SCRATCH = tempfile.TemporaryDirectory(prefix="bench_search_")
os.environ["DSPY_CACHEDIR"] = SCRATCH.name
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from search.cells import BUDGETS, METHODS, PARTS, RIVALS, SEEDS, TASKS, Cell, Store, grid, part_of  # noqa: E402

from copa_harness.errors import CopaError  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/bench_search"))
    parser.add_argument("--cache", type=Path, help="answers and LoRA weights; default: cache inside --out")
    parser.add_argument("--quick", action="store_true", help="iris and staged_wine, seed 0, 100 calls")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--budgets", nargs="+", type=int)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *PARTS], default=list(METHODS))
    parser.add_argument("--part", nargs=2, type=int, metavar=("I", "N"), default=(0, 1), help="this process's share")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of this process")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after so many minutes")
    parser.add_argument("--curves", action="store_true", help="also test the incumbents of the largest budget's runs")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--older-rivals", action="store_true", help="report on DSPy's cells of older sources as well")
    parser.add_argument("--recorded", action="store_true", help="samplers and racing on recorded answers; --seeds N")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    if options.recorded:
        return options
    quick = (["iris", "staged_wine"], [0], [100])
    whole = (list(TASKS), list(SEEDS), list(BUDGETS))
    for name, default in zip(("tasks", "seeds", "budgets"), quick if options.quick else whole, strict=True):
        setattr(options, name, getattr(options, name) or default)
    return options


def main() -> None:
    options = arguments()
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    logging.getLogger("dspy").setLevel(logging.ERROR)  # says of every truncated answer that it was truncated
    logging.getLogger("copa_harness").setLevel(logging.INFO if options.verbose else logging.WARNING)
    if options.recorded:
        from search.recorded import report

        (n_seeds,) = options.seeds or (200,)
        print(report(options.out, budgets=options.budgets or (50, 100, 200, 400), n_seeds=n_seeds))
        return
    store = Store(options.out)
    cells = grid(tasks=options.tasks, seeds=options.seeds, budgets=options.budgets, methods=options.methods)
    if not options.report_only:
        part, n_parts = options.part
        run_all(part_of(cells, part=part, n_parts=n_parts), store, options)
    write_report(cells, store, options)


def run_all(cells: list[Cell], store: Store, options: argparse.Namespace) -> None:
    import torch
    from search.running import Bench

    torch.set_num_threads(options.threads)
    bench = Bench(options.cache or options.out / "cache")
    began = time.monotonic()
    for number, cell in enumerate(cells, 1):
        record = store.get(cell)
        wants_curve = options.curves and cell.budget == max(options.budgets)
        if record is None:
            if time.monotonic() - began > 60 * options.minutes:
                print(f"stopped before cell {number} of {len(cells)}: {options.minutes:g} minutes are over", flush=True)
                return
            try:
                record = bench.run(cell)
            except CopaError as error:
                print(f"[{number}/{len(cells)}] {cell.name}: FAILED, {type(error).__name__}: {error}", flush=True)
                continue
            store.put(cell, record)
            tested = sum(record["test"].values()) / len(record["test"])
            print(
                f"[{number}/{len(cells)}] {cell.name}: validation {record['validation']:.3f}, test {tested:.3f}, "
                f"{record['charged']} calls ({record['paid']} paid), {record['n_trials']} trials, {record['stopped']}; "
                f"CPU {record['cpu_s']:.0f} + {record['cpu_test_s']:.0f} s, wall {record['wall_s']:.0f} s",
                flush=True,
            )
        if wants_curve and "test_curve" not in record:
            record.pop("version", None)
            store.put(cell, {**record, "test_curve": bench.test_curve(cell, record)})


def write_report(cells: list[Cell], store: Store, options: argparse.Namespace) -> None:
    from search.report import write

    found = [store.get(cell, any_version=options.older_rivals and cell.method in RIVALS) for cell in cells]
    records = [record for record in found if record is not None]
    if not records:
        print("no finished cells: nothing to report")
        return
    print(write(records, n_cells=len(cells), directory=options.out))


if __name__ == "__main__":
    main()
