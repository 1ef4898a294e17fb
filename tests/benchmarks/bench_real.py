"""Strategies and DSPy's optimizers on a pretrained model: six intents of CLINC150 that are close to one another.

    COPA_CLINC150=data_small.json python tests/benchmarks/bench_real.py --out /tmp/real
    COPA_CLINC150=data_small.json python tests/benchmarks/bench_real.py --out /tmp/real --strategies miprov2 --seeds 0

24 training, 24 validation and 100 test rows, 150 calls. Finished cells lie in `--out`/cells.jsonl, answers and adapters
beside them, so the same command goes on where it was stopped. Nothing is collected by pytest.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

SCRATCH = tempfile.TemporaryDirectory(prefix="bench_real_")
os.environ["DSPY_CACHEDIR"] = SCRATCH.name
sys.path.insert(0, str(Path(__file__).parents[2]))

import dspy  # noqa: E402
from tabulate import tabulate  # noqa: E402

INTENTS = {
    "card": [
        "new_card",
        "replacement_card_duration",
        "report_lost_card",
        "damaged_card",
        "card_declined",
        "expiration_date",
    ],
    "bill": ["bill_balance", "bill_due", "pay_bill", "min_payment", "balance", "transfer"],
}

MAX_TOKENS = 24


def rows(data, task, split, n_each, seed):
    generator, found = random.Random(f"{split}{seed}{task}"), []
    for intent in INTENTS[task]:
        texts = [text for text, label in data[split] if label == intent]
        generator.shuffle(texts)
        found += [(text, intent) for text in texts[:n_each]]
    generator.shuffle(found)
    return [dspy.Example(utterance=text, concern=intent).with_inputs("utterance") for text, intent in found]


def metric(example, prediction, trace=None):
    return float(str(prediction.concern).strip().casefold() == example.concern)


def cell(lm, data, task, strategy, seed, *, budget):
    from copa_harness import COPA
    from copa_harness.evaluate import evaluate
    from copa_harness.lm.call_context import open_scope

    began = time.monotonic()
    program = dspy.Predict(dspy.Signature("utterance -> concern", "What is the caller's concern?"))
    copa = COPA(metric=metric, strategy=strategy, budget=budget, lm=lm, seed=seed)
    train, val = (rows(data, task, split, 4, seed) for split in ("train", "val"))
    found = copa.compile(program, trainset=train, valset=val)
    result, seconds = found.copa_result, time.monotonic() - began
    with open_scope("test"):
        test = evaluate(found, rows(data, task, "test", 17, 99)[:100], metric=metric, split="test", lm=lm)
    return {
        "cell": [task, seed, strategy],
        "test": sum(one.score or 0.0 for one in test.results) / len(test.results),
        "validation": result.score_after,
        "calls": result.charged_calls,
        "steps": result.usage.train_steps,
        "seconds": round(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lm", default="smollm2")
    parser.add_argument("--tasks", nargs="+", choices=INTENTS, default=list(INTENTS))
    parser.add_argument("--strategies", nargs="+", default=["w", "p", "p -> w", "joint"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=150)
    options = parser.parse_args()
    from copa_harness.lm import Gateway, ResponseCache
    from copa_harness.lm.factory import build_lm

    options.out.mkdir(parents=True, exist_ok=True)
    data = json.loads(Path(os.environ["COPA_CLINC150"]).read_text(encoding="utf-8"))
    gateway = Gateway(cache=ResponseCache(options.out / "responses"))
    lm = build_lm(options.lm, gateway=gateway, cache_dir=options.out, max_tokens=MAX_TOKENS)
    kept = options.out / "cells.jsonl"
    known = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {tuple(one["cell"]): one for one in known}
    wanted = [(t, s, name) for s in options.seeds for t in options.tasks for name in options.strategies]
    for task, seed, strategy in wanted:
        if (task, seed, strategy) not in done:
            record = cell(lm, data, task, strategy, seed, budget=options.budget)
            done[task, seed, strategy] = record
            with kept.open("a") as file:
                file.write(json.dumps(record) + "\n")
        print(done[task, seed, strategy], flush=True)
    columns = [(task, seed) for task in options.tasks for seed in options.seeds]
    table = [[name, *(done[task, seed, name]["test"] for task, seed in columns)] for name in options.strategies]
    print(tabulate(table, headers=["test score", *(f"{task}, draw {seed}" for task, seed in columns)], floatfmt=".2f"))


if __name__ == "__main__":
    main()
