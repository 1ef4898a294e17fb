"""Real paired logs for `bench_gates_logs.py`: many systems, answered by the embedded model, on the same test rows.

    python tests/benchmarks/make_gate_logs.py .copa_cache/gate_logs      about ten minutes on two cores; can be resumed

Two pools of test rows: Breast Cancer, and three digits by four principal components. On each, right or wrong per row of

    demos-<k>-<seed>        k demonstrations drawn at random with that seed, greedy
    instruction-<i>         the first three-demonstration program with its instruction put in other words, greedy
    tuned-<seed>            a LoRA adapter trained by COPA's `w` step (that seed), the program as written, greedy
    sampled-<k>-<seed>-<r>  repeat r of the same program at temperature 1: an A/A pair whose true difference is zero

What is written (`gate_logs.json`, beside this file) holds no inputs and no answers. Everything is made by the package's
public code from the seed; the file says from which model, versions and commit.
"""

import argparse
import json
import logging
from pathlib import Path

import dspy
import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from copa_harness import COPA, Task, build_lm
from copa_harness.evaluate.examples import example_ids
from copa_harness.evaluate.runner import evaluate
from copa_harness.lm import repeated
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.gateway import Gateway
from copa_harness.report.provenance import git_commit, versions
from copa_harness.tasks import breast_cancer
from copa_harness.tasks.tabular import exact_match

OUT = Path(__file__).with_name("gate_logs.json")
N_TEST = 300
DEMO_SEEDS = {3: range(4), 6: range(3)}
INSTRUCTIONS = ("Classify the record.", "Which class does this record belong to?")
TUNED_SEEDS = (0, 1)
SAMPLED = ((3, 0),)
N_REPEATS = 4


def digits():
    """Which of three digits a bitmap shows, by four principal components scaled to 0.0-9.9."""
    bunch = load_digits()
    chosen = np.isin(bunch.target, (1, 4, 8))
    values, target = PCA(4, random_state=0).fit_transform(bunch.data[chosen]), bunch.target[chosen]
    order = np.random.default_rng(0).permutation(len(target))
    low, high = values[order[:50]].min(axis=0), values[order[:50]].max(axis=0)
    printed = np.round(np.clip((values - low) / (high - low), 0, 1) * 9.9, 1)
    names, words = ("stroke_one", "stroke_two", "loop_one", "loop_two"), {1: "one", 4: "four", 8: "eight"}
    rows, seen = [], set()
    for i in order:
        inputs = dict(zip(names, (f"{value:.1f}" for value in printed[i]), strict=True))
        if tuple(inputs.values()) not in seen:  # rows that print alike are one row
            seen.add(tuple(inputs.values()))
            rows.append(dspy.Example(**inputs, answer=words[int(target[i])]).with_inputs(*names))
    program = dspy.Predict(
        dspy.Signature(", ".join(names) + " -> answer", "Given features of a bitmap, predict which digit it shows.")
    )
    program.signature = program.signature.with_updated_fields("answer", desc="one, four, or eight")
    return Task("digits", program, exact_match, rows[:50], rows[50:75], rows[75 : 75 + N_TEST])


def pools():
    """The tasks, with more test rows than a suite would pay for."""
    return breast_cancer(seed=0, n_test=N_TEST), digits()


def with_demos(task, k, seed, instruction=None):
    """The task's program with k random demonstrations, and perhaps its instruction in other words."""
    program = task.program.deepcopy()
    chosen = np.random.default_rng([seed, k]).permutation(len(task.trainset))[:k]
    program.demos = [task.trainset[int(i)] for i in chosen]
    if instruction is not None:
        program.signature = program.signature.with_instructions(instruction)
    return program


def systems(task, lm, warm, gateway, folder):
    """(name, program, model, repeat) of everything that is to be run on a pool."""
    for k, seeds in DEMO_SEEDS.items():
        yield from ((f"demos-{k}-{seed}", with_demos(task, k, seed), lm, 0) for seed in seeds)
    for i, text in enumerate(INSTRUCTIONS):
        yield f"instruction-{i}", with_demos(task, 3, 0, text), lm, 0
    for k, seed in SAMPLED:
        yield from ((f"sampled-{k}-{seed}-{r}", with_demos(task, k, seed), warm, r) for r in range(N_REPEATS))
    for seed in TUNED_SEEDS:
        base = build_lm("embedded", gateway=gateway, cache_dir=folder)
        optimizer = COPA(metric=task.metric, strategy="w", budget="light", lm=base, seed=seed)
        yield f"tuned-{seed}", optimizer.compile(task.program, trainset=task.trainset, valset=task.valset), base, 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="folder of the answers; a run that was ended goes on from there")
    arguments = parser.parse_args()
    logging.getLogger("dspy").setLevel(logging.ERROR)  # an answer that runs on is counted as wrong, not news
    cache = ResponseCache(arguments.cache / "responses")
    gateway = Gateway(cache=cache)
    lm = build_lm("embedded", gateway=gateway, cache_dir=arguments.cache)
    warm = build_lm("embedded", gateway=gateway, cache_dir=arguments.cache, temperature=1.0)
    document = {
        "made_by": "python tests/benchmarks/make_gate_logs.py",
        "model": {"name": lm.model, "fingerprint": lm.fingerprint},
        "commit": git_commit(Path(__file__).parent),
        "versions": versions(),
        "pools": {},
    }
    for task in pools():
        scores = {}
        for name, program, model, repeat in systems(task, lm, warm, gateway, arguments.cache):
            with repeated(repeat):
                answer = evaluate(program, task.testset, metric=task.metric, split="test", lm=model)
            scores[name] = "".join(str(int(row.score)) for row in answer.results)
            print(f"{task.name:<14} {name:<16} {answer.score:.3f} on {answer.n}", flush=True)
        document["pools"][task.name] = {"n": len(task.testset), "first_id": example_ids(task.testset)[0]}
        document["pools"][task.name]["right"] = scores
    cache.close()
    OUT.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
