"""Records what a real model scores in every point of a joint space, for `bench_search.py --recorded`.

    COPA_CLINC150=data_small.json python tests/benchmarks/record_configurations.py clinc --out /tmp/recorded

A configuration is one of the weights (base, tuned on bare rows, tuned behind demonstrations),
one instruction and one demonstration set: what the harness itself proposes for the task, and `INSTRUCTIONS`. Every one
is scored on all validation rows of its task. Answers and adapters lie in `--out`, so the same command goes on where it
was stopped. The result is `tests/benchmarks/search/recorded/NAME.json.gz`: right or wrong on every row,
prompt tokens, and what the options are. Nothing is collected by pytest.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import gzip
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

SCRATCH = tempfile.TemporaryDirectory(prefix="record_")
os.environ["DSPY_CACHEDIR"] = SCRATCH.name
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

INSTRUCTIONS = (
    "Answer with exactly one of the allowed values and nothing else.",
    "Read the sentence carefully. Think of what the person wants done, then name it with one of the allowed values.",
)
"""Beside what the harness proposes without a prompt model."""

N_TRAIN, N_ROWS, N_DEMO_SETS = 40, 60, 3

N_TRAINED_DEMOS = 3
"""Demonstrations per row of the second training."""

RECORDED = Path(__file__).parent / "search" / "recorded"


def _clinc() -> Any:
    from copa_harness import tasks

    return tasks.clinc150(n_train=N_TRAIN, n_val=N_ROWS, n_test=10)


def _clinc_close() -> Any:
    """Six intents of one domain, whose sentences share words."""
    from copa_harness import tasks

    close = ("bill_balance", "bill_due", "min_payment", "pay_bill", "credit_limit", "interest_rate")
    return tasks.clinc150(intents=close, seed=1, n_train=24, n_val=N_ROWS, n_test=10)


TASKS: Mapping[str, Callable[[], Any]] = {"clinc": _clinc, "clinc_close": _clinc_close}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--lm", default="smollm2")
    parser.add_argument("--out", type=Path, required=True, help="answers and adapters")
    parser.add_argument("--adapters", nargs="+", help="tuned models of --out (model@digits) instead of two trainings")
    options = parser.parse_args()
    from copa_harness.lm.cache.store import ResponseCache
    from copa_harness.lm.call_context import open_scope
    from copa_harness.lm.factory import build_lm
    from copa_harness.lm.gateway import Gateway

    gateway = Gateway(cache=ResponseCache(options.out / "responses"))
    lm = build_lm(options.lm, gateway=gateway, cache_dir=options.out)
    task = TASKS[options.task]()
    with open_scope("recording") as scope:
        document = record(task, lm, scope, adapters=options.adapters)
    document |= {"task": options.task, "model": options.lm}
    RECORDED.mkdir(exist_ok=True)
    place = RECORDED / f"{options.task}.json.gz"
    text = json.dumps(document, ensure_ascii=False)  # the order of dimensions is that of the scores
    place.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    print(
        f"{place}: {len(document['scores'])} configurations x {document['n_rows']} rows, {place.stat().st_size} bytes"
    )


def record(task: Any, lm: Any, scope: Any, *, adapters: Sequence[str] | None = None) -> dict[str, Any]:
    """Scores of all points of the task's space."""
    from copa_harness.optimize.options import SearchOptions
    from copa_harness.optimize.propose.proposer import propose_demos, propose_instructions
    from copa_harness.optimize.search.candidate import Candidate
    from copa_harness.optimize.search.scoring import Validation
    from copa_harness.optimize.search.space import InstructionOption, Space, weights_choice
    from copa_harness.optimize.search.trial_memory import SearchMemory
    from copa_harness.optimize.search_context import SearchContext
    from copa_harness.optimize.step_budget import CallBudget
    from copa_harness.optimize.weights import WeightsJob, train_weights
    from copa_harness.results import Phase

    settings = SearchOptions(seed=0, threads=64, n_demo_sets=N_DEMO_SETS)
    student = Candidate.of(task.program, lm=lm)
    validation = Validation(task.valset, metric=task.metric, threads=64, seed=0, observe=True)
    context = SearchContext(student, task.trainset, validation, task.metric, settings)
    memory, whole = SearchMemory(seed=0), CallBudget(scope, math.inf)
    say(f"baseline {validation.complete(student, allowance=whole, phase=Phase.BASELINE):.3f}")
    named = {name: (lm.copy(model=name),) for name in adapters or ()}
    if adapters is None:
        for what, n_demos in (("tuned on bare rows", 0), ("tuned behind demonstrations", N_TRAINED_DEMOS)):
            trained = train_weights(WeightsJob(context, student, n_demos), best=student)
            say(f"{what}: {trained.note}")
            named[what] = trained.lms
    weights = [weights_choice(student.with_lms(lms)) for lms in named.values()]
    demos = propose_demos(context, student, allowance=whole, memory=memory, seed=(0,))
    proposed = propose_instructions(context, student, allowance=whole, memory=memory)
    (name,) = proposed
    written = [
        InstructionOption(f"written {i}", f"{proposed[name][0].text} {text}") for i, text in enumerate(INSTRUCTIONS)
    ]
    space = Space.around(student, weights=weights, instructions={name: [*proposed[name], *written]}, demos=demos)
    dimensions = space.dimensions
    say(f"{space.size} configurations: { ({key: len(found) for key, found in dimensions.items()}) }")
    scores, tokens = [], []
    began = time.monotonic()
    for number, options in enumerate(product(*dimensions.values()), 1):
        candidate = space.candidate(dict(zip(dimensions, options, strict=True)))
        mean = validation.complete(candidate, allowance=whole, phase=Phase.SEARCH)
        scores.append("".join("1" if score == 1.0 else "0" for score in validation.scores(candidate)))
        tokens.append(validation.cost(candidate).per_answer("prompt_tokens"))
        say(f"{number}/{space.size} {options}: {mean:.3f}, {time.monotonic() - began:.0f} s")
    short = {choice.name: f"weights {i}" for i, choice in enumerate(space.weights)}
    return {
        "dimensions": {
            key.rpartition(".")[2]: [short.get(one, one) for one in found] for key, found in dimensions.items()
        },
        "weights": ["base", *named],
        "instructions": {option.name: option.text for option in space.instructions[name]},
        "demos": {option.name: [dict(demo) for demo in option.demos] for option in space.demos[name]},
        "n_rows": validation.n,
        "scores": scores,
        "prompt_tokens": [None if one is None else round(one) for one in tokens],
    }


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
