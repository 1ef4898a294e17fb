"""Tokens per second of LoRA training: our loop beside transformers.Trainer and a bare torch loop. Prints ratios.

    python tests/benchmarks/bench_training.py            # some minutes
    python tests/benchmarks/bench_training.py --quick    # the small model only, fewer steps
    python tests/benchmarks/bench_training.py --only 135M --kind labels --against ../other-checkout

Every contender trains the same LoRA (rank 16 on all linear layers, AdamW, clipping, float32 unless it says otherwise)
on the same rows in the same batch, in a process of its own that waits while the others take their turns; a row is its
best step. The first loss of all must agree. Rows have the shape of DSPy prompts: instructions all rows share, then nine
demonstrations of their own, or none; or of a classification whose labels are named at the end of every prompt.
`--against` lets the loop of another checkout of this repository take its turns too. Tokens are those of the rows: what
a loop pads, packs or skips is its own affair. Memory is the peak of the process above what it had with the model
loaded. The floor is what the products of one step would take at the rate one large product runs at, without and with
the shared tokens computed once.

Nothing is collected by pytest. Absolute figures depend on the machine; the ratios are taken side by side on it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, os.environ.get("COPA_BENCH_CHECKOUT") or str(Path(__file__).parents[2]))

RANK = 16


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    name: str
    hidden: int
    layers: int
    heads: int
    inner: int
    batch: int
    steps: int
    kv_heads: int | None = None
    vocabulary: int = 5354


SIZES = {
    "2M": Size("2M", 128, 6, 4, 320, 16, 3),
    "100M": Size("100M", 768, 12, 12, 2048, 4, 1),
    "135M": Size("135M", 576, 30, 9, 1536, 16, 1, kv_heads=3, vocabulary=49152),  # the shape of SmolLM2-135M
}
KINDS = {"demonstrations": (158, 456, 70), "bare": (158, 40, 7), "labels": (224, 130, 20)}
"""Tokens all rows share, tokens of a row's own, answer tokens of a row; taken from the Wine and the CLINC150 suite."""

CONTENDERS = ("ours", "ours bfloat16", "Trainer", "bare loop")
THERE = "other checkout"


def rows_of(size, kind):
    """(token ids, positions to learn) of one batch."""
    draw = random.Random(0)
    n_shared, n_own, n_answer = KINDS[kind]
    shared = [draw.randrange(5, size.vocabulary) for _ in range(n_shared)]
    rows = []
    for _ in range(size.batch):
        own = [draw.randrange(5, size.vocabulary) for _ in range(n_own + draw.randrange(-12, 13))]
        ids = shared + own
        answers = {len(ids) - 1 - j for j in range(7)}  # the answer asked for stands at the end
        answers |= set(draw.sample(range(n_shared, len(ids) - 7), n_answer - 7))
        rows.append((ids, sorted(answers)))
    return rows


def write_model(size, directory):
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads or size.heads,
        intermediate_size=size.inner,
        vocab_size=size.vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


# -- one contender, in a process of its own


def work(contender, directory, size, kind):
    """Read "threads" from stdin, take one step, answer with {seconds, loss, peak}; until stdin ends."""
    warnings.simplefilter("ignore")
    import torch
    import transformers

    from copa_harness.tune.loop import add_lora
    from copa_harness.tune.options import LoraSettings

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.requires_grad_(False)
    settings = LoraSettings(
        rank=RANK,
        alpha=2 * RANK,
        epochs=10_000,
        batch_size=size.batch,
        learning_rate=1e-4,
        precision="bfloat16" if contender.endswith("bfloat16") else "float32",
    )
    model = add_lora(model, settings)
    loaded = resident_mb()
    rows = rows_of(size, kind)
    stepper = {"Trainer": trainer_steps, "bare loop": bare_steps}.get(contender, our_steps)
    stepper(model, rows, settings, answer=lambda seconds, loss: say(seconds, loss, loaded))


def say(seconds, loss, loaded):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("STEP " + json.dumps({"seconds": seconds, "loss": loss, "mb": peak - loaded}), flush=True)


def resident_mb():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def asked_threads():
    """The next command: threads to use; None at the end."""
    import torch

    line = sys.stdin.readline().strip()
    if not line:
        return None
    torch.set_num_threads(int(line))
    return int(line)


def our_steps(model, rows, settings, *, answer):
    from copa_harness.tune.loop import Training
    from copa_harness.tune.progress import Progress
    from copa_harness.tune.rows import EncodedRow

    encoded = [EncodedRow(tuple(ids), answers[-7], demo_targets=tuple(answers[:-7])) for ids, answers in rows]
    training = Training(model, encoded, held_out=(), settings=settings, pad_id=0)
    with Progress(training.n_total) as progress:
        while asked_threads() is not None:
            began = time.perf_counter()
            training.run_epoch(progress)  # one batch is all there is
            answer(time.perf_counter() - began, training.losses[-1])


def padded(rows):
    import torch

    width = max(len(ids) for ids, _ in rows)
    ids, mask, labels = torch.zeros(len(rows), width, dtype=torch.long), None, None
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (row, answers) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        labels[i, answers] = ids[i, answers]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def bare_steps(model, rows, settings, *, answer):
    """What one writes in ten lines."""
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    model.train()
    while asked_threads() is not None:
        began = time.perf_counter()
        loss = model(**padded(rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        answer(time.perf_counter() - began, value)


def trainer_steps(model, rows, settings, *, answer):
    import transformers

    class Turns(transformers.TrainerCallback):
        """Waits before every step for its turn, and says how long it took."""

        began, done = 0.0, False

        def on_step_begin(self, args, state, control, **_):
            if asked_threads() is None:
                os._exit(0)  # nothing of this process is wanted any more
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            self.seconds = time.perf_counter() - self.began

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                answer(self.seconds, logs["loss"])

    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=len(rows),
        max_steps=10_000,
        use_cpu=True,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=padded, callbacks=[Turns()]
    ).train()


# -- all of them in turn


class Worker:
    """A contender's process."""

    def __init__(self, contender, directory, size, kind, *, checkout=None):
        command = [sys.executable, __file__, "--work", contender, str(directory), size.name, kind]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "COPA_BENCH_CHECKOUT": str(checkout or "")},
        )

    def step(self, threads):
        self.process.stdin.write(f"{threads}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("STEP "):
                return json.loads(line[5:])
        raise SystemExit(f"a contender ended with exit status {self.process.wait()}")

    def end(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def gemm_rate(threads):
    """FLOP/s of a large float32 product."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.randn(2048, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2 * left.numel() * 1024 / best


def flops(size, kind, *, shared_once):
    """Of one step: forward, gradients of activations, LoRA's own; causal attention; the output layer where needed."""
    rows = rows_of(size, kind)
    lengths = [len(ids) for ids, _ in rows]
    tokens = sum(lengths) - (len(rows) - 1) * KINDS[kind][0] * shared_once
    kv = (size.kv_heads or size.heads) / size.heads
    linear = size.layers * ((2 + 2 * kv) * size.hidden**2 + 3 * size.hidden * size.inner)
    low_rank = size.layers * RANK * (4 * 2 * size.hidden + 3 * (size.hidden + size.inner))
    attention = sum(7 * length**2 * size.hidden for length in lengths) * size.layers
    answers = sum(len(answers) for _, answers in rows)
    return 4 * linear * tokens + 6 * low_rank * tokens + attention + 4 * size.vocabulary * size.hidden * answers


def compare(size, kind, *, threads, steps, against=None):
    rows = rows_of(size, kind)
    n_tokens = sum(len(ids) for ids, _ in rows)
    rates = {n: gemm_rate(n) for n in threads}
    with tempfile.TemporaryDirectory(prefix="bench_training_") as directory:
        write_model(size, directory)
        workers = {name: Worker(name, directory, size, kind) for name in CONTENDERS}
        if against:
            workers[THERE] = Worker(THERE, directory, size, kind, checkout=against)
        first = {name: worker.step(threads[-1]) for name, worker in workers.items()}
        losses = [each["loss"] for name, each in first.items() if "bfloat16" not in name]
        assert max(losses) - min(losses) < 1e-3 * max(losses), first
        taken = {(name, n): [] for name in workers for n in threads}
        for _ in range(steps):
            for n in threads:
                for name, worker in workers.items():
                    last = worker.step(n)
                    taken[name, n].append(last["seconds"])
                    first[name]["mb"] = last["mb"]
        for worker in workers.values():
            worker.end()
    for n in threads:
        floors = [flops(size, kind, shared_once=once) / rates[n] for once in (False, True)]
        print(
            f"\n{size.name} parameters, {size.batch} rows, {kind}: {n_tokens} tokens a step, {n} thread(s); "
            f"floor {floors[0]:.2f} s, shared tokens once {floors[1]:.2f} s ({rates[n] / 1e9:.0f} GFLOP/s)"
        )
        reference = min(taken["Trainer", n])
        for name in workers:
            best = min(taken[name, n])
            print(
                f"    {name:14s} {best:7.2f} s/step  {n_tokens / best:8.0f} tokens/s  {reference / best:5.2f} x Trainer"
                f"  {best / floors[0]:5.2f} x floor  {first[name]['mb']:6.0f} MB",
                flush=True,
            )
        others = min(min(taken[name, n]) for name in ("Trainer", "bare loop"))
        print(f"    ours / best other: {min(taken['ours', n]) / others:.2f} of its time (at most 1.10 is the target)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small model only, fewer steps")
    parser.add_argument("--only", choices=list(SIZES), help="one model")
    parser.add_argument("--kind", choices=list(KINDS), help="one kind of rows")
    parser.add_argument("--against", type=Path, help="another checkout, whose loop takes its turns")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if options.work:
        contender, directory, size, kind = options.work
        work(contender, directory, SIZES[size], kind)
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for name, size in SIZES.items():
        if options.only not in (None, name) or (options.quick and not options.only and name != "2M"):
            continue
        for kind in KINDS:
            if options.kind in (None, kind):
                compare(size, kind, threads=[1, 2], steps=1 if options.quick else size.steps, against=options.against)


if __name__ == "__main__":
    main()
