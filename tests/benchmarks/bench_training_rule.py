"""The rule for LoRA settings on a pretrained model: rows x learning rates, and what each training costs elsewhere.

    COPA_CLINC150=data_small.json COPA_GSM8K=test.jsonl python tests/benchmarks/bench_training_rule.py \\
        --model smollm2 --rows 20 60 200 --rates rule 1e-3 3e-4

Every cell is one training on so many rows of CLINC150's ten intents, rendered bare, by the rule (`suited` in
`tune/options.py`) with its early stopping, the learning rate aside, and then the score of free answers to test rows.
Forgetting is measured twice: on the general answers of `tune/forgetting.py`, and as the loss on worked solutions of
GSM8K, both in nats a token, before and after. Cells are kept in `--out`, so the same command goes on where it was
stopped; so does a training, at its last epoch. Nothing is collected by pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from tabulate import tabulate

from copa_harness import build_lm, tasks
from copa_harness.atomic_files import write_atomic
from copa_harness.documents import canonical_json
from copa_harness.evaluate import evaluate
from copa_harness.evaluate.runner import default_adapter
from copa_harness.lm import Gateway, ResponseCache
from copa_harness.tune.dspy_provider import suited_to, train_lora
from copa_harness.tune.options import LoraSettings
from copa_harness.tune.rows import RowDemos, TrainingRow, encode_row, render_rows

N_SOLUTIONS = 16


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as --copa-lm")
    parser.add_argument("--rows", nargs="+", type=int, default=[20, 60, 200], help="training rows")
    parser.add_argument("--rates", nargs="+", default=["rule", "1e-3", "3e-4"], help="learning rates")
    parser.add_argument("--test", type=int, default=100, help="test rows")
    parser.add_argument("--seed", type=int, default=0, help="of the rows and of the training")
    parser.add_argument("--precision", default="float32", help="of the training: float32 or bfloat16")
    parser.add_argument("--out", type=Path, default=Path("reports/training_rule"))
    return parser.parse_args()


def main():
    options = arguments()
    lm = build_lm(options.model, gateway=Gateway(cache=ResponseCache(options.out / "responses")), cache_dir=options.out)
    name = re.sub(r"\W+", "_", options.model)
    cells = [(n_rows, rate) for n_rows in options.rows for rate in options.rates]
    records = []
    for n_rows, rate in [(max(options.rows), None), *cells]:
        kind = f"{n_rows}-{rate}-{options.precision}" if rate else "base"
        path = options.out / "cells" / f"{name}-{kind}-seed{options.seed}-test{options.test}.json"
        if not path.exists():
            write_atomic(path, canonical_json(cell(lm, n_rows, rate, options)))
        records.append(json.loads(path.read_text("utf-8")))
        print(json.dumps(records[-1]), flush=True)
    print(table(records))


def cell(lm, n_rows, rate, options):
    """The record of one training; of the model as it is without a rate."""
    task = tasks.clinc150(seed=options.seed, n_train=n_rows, n_test=options.test)
    if rate is None:
        return {"rows": 0, "solutions": solutions_loss(lm, None), **scored(lm, task)}
    (rows,) = render_rows(
        task.program, task.trainset, demos=RowDemos("none", seed=options.seed), adapter=default_adapter()
    ).values()
    own = {} if rate == "rule" else {"learning_rate": float(rate)}
    settings = LoraSettings(seed=options.seed, precision=options.precision).replaced(
        {**suited_to(lm, n_rows=n_rows, with_demos=False), **own}
    )
    chosen = np.random.default_rng([options.seed, 606]).permutation(n_rows)  # as a weights step holds rows out
    held_out = set(chosen[: round(settings.held_out_share * n_rows)].tolist())
    began, cpu = time.perf_counter(), time.process_time()
    adapter = train_lora(
        lm,
        [row for i, row in enumerate(rows) if i not in held_out],
        directory=options.out / "lora",
        served_with="none",
        settings=settings,
        held_out=[row for i, row in enumerate(rows) if i in held_out],
    )
    record = {
        "rows": n_rows,
        "learning_rate": settings.learning_rate,
        "batch_size": settings.batch_size,
        "epochs": settings.epochs,
        "precision": settings.precision,
        "kept_epoch": adapter.epoch,
        "steps": adapter.train_steps,
        "held_out_loss": round(adapter.final_loss, 4),
        "general": adapter.general_losses,
        "training_s": round(time.perf_counter() - began),
        "training_cpu_s": round(time.process_time() - cpu) if adapter.steps_now == adapter.train_steps else None,
    }
    return {**record, "solutions": solutions_loss(lm, adapter), **scored(lm.copy(model=adapter.model), task)}


def scored(lm, task):
    result = evaluate(task.program, task.testset, metric=task.metric, split="test", lm=lm)
    low, high = result.interval.low, result.interval.high
    return {"test": result.score, "low": low, "high": high, "unparsed": result.n_unparsed}


def solutions_loss(lm, adapter):
    """Mean loss on worked solutions of GSM8K, nats a token; None where its file is not named."""
    if not (file := os.environ.get("COPA_GSM8K")):
        return None
    import peft
    import torch
    import transformers

    from copa_harness.lm.local.chat_template import ChatTemplate
    from copa_harness.lm.local.tokenizer import read_tokenizer

    folder = lm.engine.directory
    chat = ChatTemplate(read_tokenizer(folder), name="bench")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter.directory)
    total = n_tokens = 0
    for line in Path(file).read_text("utf-8").splitlines()[:N_SOLUTIONS]:
        problem = json.loads(line)
        turns = zip(("user", "assistant"), (problem["question"], problem["answer"]), strict=True)
        row = encode_row(
            chat, TrainingRow(tuple({"role": role, "content": text} for role, text in turns)), eos_ids=frozenset()
        )
        ids = torch.tensor([row.ids])
        with torch.inference_mode():
            logits = model.eval()(ids).logits[0, row.n_prompt - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, row.n_prompt :], reduction="sum").item()
        n_tokens += len(row.ids) - row.n_prompt
    return total / n_tokens


def table(records):
    base, *trained = records
    lines = [["-", "-", "-", "-", "-", f"{base['test']:.3f}", base["unparsed"], "-", "-", "-"]]
    for one in trained:
        general = "{1:.2f} ({0:.2f})".format(*one["general"]) if one["general"] else "-"
        solutions = f"{one['solutions']:.2f} ({base['solutions']:.2f})" if one["solutions"] is not None else "-"
        lines.append(
            [
                one["rows"],
                f"{one['learning_rate']:g}",
                one["batch_size"],
                f"{one['kept_epoch']} of {one['epochs']}",
                one["steps"],
                f"{one['test']:.3f} [{one['low']:.2f}, {one['high']:.2f}]",
                one["unparsed"],
                one["losses"][-1],
                general,
                solutions,
            ]
        )
    headers = ["rows", "rate", "batch", "epoch", "steps", "test", "unparsed", "last loss", "general", "solutions"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
