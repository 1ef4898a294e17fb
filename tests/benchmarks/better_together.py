"""The BetterTogether table: tasks x strategies on one model, at equal numbers of calls.

    python tests/benchmarks/better_together.py --model hf:Qwen/Qwen3-0.6B --device cuda \\
        --tasks hotpotqa gsm8k iris --strategies none p w "w -> p" "p -> w" "p -> w -> p" joint better_together

After Soylu, Potts, Khattab 2024, "Fine-Tuning and Prompt Optimization: Two Great Steps that Work Better Together"
(arXiv 2407.10930). Every cell (task, seed, strategy) is one optimization by `COPA` under the same budget of distinct
calls, and then the scores of its result on the test rows. Finished cells are kept in `--out`/cells, under the hash of
the sources and of what was asked for, so the same command goes on where it was stopped; what a cell had already asked
of the model by then is replayed from the cache. Data come by `datasets`, or as the files that the environment variables
of the tasks name (COPA_HOTPOTQA, COPA_GSM8K). Nothing is collected by pytest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))

from tabulate import tabulate

from copa_harness import COPA, build_lm, tasks
from copa_harness.atomic_files import write_atomic
from copa_harness.documents import canonical_json, hash_json
from copa_harness.errors import CopaError
from copa_harness.evaluate import evaluate
from copa_harness.judge.intervals import mean_interval
from copa_harness.lm import Gateway, ResponseCache
from copa_harness.lm.call_context import open_scope

STRATEGIES = ("none", "p", "w", "w -> p", "p -> w", "p -> w -> p", "joint", "better_together")
SOURCES = ("tasks", "tune", "optimize", "lm/local")
"""Folders of the package that a result depends on; results of different sources never mix."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="as --copa-lm: embedded, smollm2, hf:<path or id>, ...")
    parser.add_argument("--prompt-model", help="writes instructions; without one only those that need no model")
    parser.add_argument("--tasks", nargs="+", default=["hotpotqa", "gsm8k", "iris"], help="of copa_harness.tasks")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the rows and of the search")
    parser.add_argument("--rows", nargs=3, type=int, metavar=("TRAIN", "VAL", "TEST"), help="default: each task's own")
    parser.add_argument("--calls", type=int, default=400, help="distinct calls of one optimization")
    parser.add_argument("--device", help="cuda, cuda:1, cpu")
    parser.add_argument("--dtype", help="float32 (exact), bfloat16, float16")
    parser.add_argument("--constrain", action="store_true", help="the layout of answers is given (--copa-constrain)")
    parser.add_argument("--answer-tokens", type=int, help="ceiling of one answer (--copa-answer-tokens)")
    parser.add_argument("--out", type=Path, default=Path("reports/better_together"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after so many minutes")
    parser.add_argument("--report-only", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    folder = options.out / "cells" / f"{version()}-{hash_json(asked_for(options))[:8]}"
    cells = [(t, seed, s) for t in options.tasks for seed in options.seeds for s in options.strategies]
    if not options.report_only:
        run_all(cells, folder, options)
    records = [json.loads(path.read_text("utf-8")) for cell in cells if (path := path_of(folder, *cell)).exists()]
    text = report(records, options, n_cells=len(cells))
    write_atomic(options.out / "table.txt", text)
    print(text)


def version() -> str:
    """Hash of the sources that a result depends on."""
    digest, package = hashlib.sha256(), Path(__file__).parents[2] / "copa_harness"
    for file in sorted(file for name in SOURCES for file in (package / name).rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]


def asked_for(options: argparse.Namespace) -> dict[str, Any]:
    """What makes one table differ from another, cells aside."""
    names = ("model", "prompt_model", "rows", "calls", "dtype", "constrain", "answer_tokens")
    data = {name: value for name, value in os.environ.items() if name in ("COPA_HOTPOTQA", "COPA_GSM8K")}
    return {**{name: getattr(options, name) for name in names}, **data}


def path_of(folder: Path, task: str, seed: int, strategy: str) -> Path:
    return folder / f"{task}-seed{seed}-{re.sub(r'[^a-z0-9]+', '_', strategy)}.json"


def run_all(cells: list[tuple[str, int, str]], folder: Path, options: argparse.Namespace) -> None:
    gateway, began = Gateway(cache=ResponseCache(options.out / "cache" / "responses")), time.monotonic()
    given = {name: getattr(options, name) for name in ("device", "dtype", "answer_tokens", "constrain")}
    settings = {name: value for name, value in given.items() if value}
    lm = build_lm(options.model, gateway=gateway, cache_dir=options.out / "cache", **settings)
    writer = options.prompt_model and build_lm(options.prompt_model, gateway=gateway, cache_dir=options.out / "cache")
    for number, cell in enumerate(cells, 1):
        path = path_of(folder, *cell)
        if path.exists():
            continue
        if time.monotonic() - began > 60 * options.minutes:
            print(f"stopped before cell {number} of {len(cells)}: {options.minutes:g} minutes are over", flush=True)
            return
        record = run(*cell, lm=lm, prompt_lm=writer or None, options=options)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, canonical_json(record))
        said = record.get("error") or f"test {sum(record['test']) / len(record['test']):.3f}, {record['stopped']}"
        print(f"[{number}/{len(cells)}] {path.stem}: {said}, {record['wall_s']:.0f} s", flush=True)


def run(task_name: str, seed: int, strategy: str, *, lm: Any, prompt_lm: Any, options: argparse.Namespace) -> Any:
    """The record of a cell; where a strategy cannot go on, why."""
    rows = dict(zip(("n_train", "n_val", "n_test"), options.rows, strict=True)) if options.rows else {}
    task = getattr(tasks, task_name)(seed=seed, **rows)
    copa = COPA(metric=task.metric, strategy=strategy, budget=options.calls, seed=seed, lm=lm, prompt_lm=prompt_lm)
    record: dict[str, Any] = {"task": task_name, "seed": seed, "strategy": strategy}
    began = time.perf_counter()
    try:
        program = copa.compile(task.program, trainset=list(task.trainset), valset=list(task.valset))
    except CopaError as error:
        return {**record, "error": f"{type(error).__name__}: {error}", "wall_s": time.perf_counter() - began}
    result, wall_s = program.copa_result, time.perf_counter() - began
    with open_scope("test of the result"):
        found = evaluate(program, task.testset, metric=task.metric, split="test", lm=lm)
    return {
        **record,
        "test": [one.score or 0.0 for one in found.results],
        "groups": [str(task.group(e)) if callable(task.group) else str(i) for i, e in enumerate(task.testset)],
        "unparsed": found.n_unparsed,
        "validation": result.score_after,
        "charged": result.charged_calls,
        "usage": asdict(result.usage),
        "stopped": result.stopped,
        "notes": list(result.notes),
        "wall_s": wall_s,
    }


def report(records: list[dict[str, Any]], options: argparse.Namespace, *, n_cells: int) -> str:
    """One row per task and strategy, seeds together; then the mean of the tasks by strategy."""
    table, means = [], []
    for task in options.tasks:
        for strategy in options.strategies:
            found = [r for r in records if (r["task"], r["strategy"]) == (task, strategy)]
            done = [r for r in found if "error" not in r]
            failed = next((r["error"] for r in found if "error" in r), "")
            if done:
                table.append([task, strategy, *_figures(done), failed.partition(":")[0] or done[0]["stopped"]])
            elif found:
                table.append([task, strategy, *[""] * 8, failed[:60]])
    for strategy in options.strategies:
        found = [r for r in records if r["strategy"] == strategy and "error" not in r]
        if {r["task"] for r in found} == set(options.tasks):
            scores = [[x for r in found if r["task"] == task for x in r["test"]] for task in options.tasks]
            means.append([strategy, f"{sum(sum(s) / len(s) for s in scores) / len(scores):.3f}"])
    headers = ["task", "strategy", "n", "test [95 % interval]", "unparsed", "validation", "calls", "tokens paid"]
    headers += ["train steps", "seconds", "ended"]
    heading = (
        f"{options.model}, {options.calls} distinct calls per optimization, seeds {' '.join(map(str, options.seeds))}: "
        f"{len(records)} of {n_cells} cells; calls are distinct ones of the "
        "optimizations alone; cells share answers, so tokens, steps and seconds are what each added"
    )
    parts = [heading, tabulate(table, headers=headers, disable_numparse=True, stralign="right")]
    if means:
        parts.append(tabulate(means, headers=["strategy", "mean of the tasks"], disable_numparse=True))
    return "\n\n".join(parts) + "\n"


def _figures(found: list[dict[str, Any]]) -> list[str]:
    scores = [score for r in found for score in r["test"]]
    groups = [f"{r['seed']} {group}" for r in found for group in r["groups"]]
    interval = mean_interval(scores, groups=groups)
    usage = [r["usage"] for r in found]
    tokens = sum(u["input_tokens"] + u["output_tokens"] for u in usage)
    validation = [r["validation"] for r in found if r["validation"] is not None]
    return [
        str(len(scores)),
        f"{sum(scores) / len(scores):.3f} [{interval.low:.2f}, {interval.high:.2f}]",
        str(sum(r["unparsed"] for r in found)),
        f"{sum(validation) / len(validation):.3f}" if validation else "-",
        f"{sum(r['charged'] for r in found):,.0f}",
        f"{tokens:,}",
        str(sum(u["train_steps"] for u in usage)),
        f"{sum(r['wall_s'] for r in found):,.0f}",
    ]


if __name__ == "__main__":
    main()
