"""Local generation: milliseconds per request of several ways to answer the same requests, taken in turn in one run.

    python tests/benchmarks/bench_engine.py                     # both sizes, 1 and 2 threads: some minutes
    python tests/benchmarks/bench_engine.py --quick             # the small model, 2 threads
    python tests/benchmarks/bench_engine.py --sizes 2M --threads 1 --rounds 3

Random Llama models made on the spot; a prefix of 600 tokens (12 demonstrations) shared by all requests, suffixes of
30-50 tokens, 8-24 new tokens. Rows: one-by-one `generate`; padded `generate`; transformers' continuous batching with
prefix sharing; this package's stock path and cascade path, through the engine's queue from as many threads as
requests; llama-cpp-python where it is installed (see `bench_engine_llama`). Beside each figure the floor: the
arithmetic a method cannot avoid (FLOPs over the GEMM rate measured here), with the prefix computed once, or once per
request where a method does so. Also a second LoRA adapter, bf16, evaluation through dspy, start-up. Answers are
compared with one-by-one `generate`. SmolLM2, a real model, beside llama.cpp's server: see `bench_engine_smollm2`.
`--only labels`: answers out of 150 allowed values.

Nothing is collected by pytest. Absolute figures depend on the machine; ratios are of medians over rounds in one run.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
SCRATCH = tempfile.TemporaryDirectory(prefix="bench_engine_")
os.environ["DSPY_CACHEDIR"] = f"{SCRATCH.name}/dspy"
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import bench_engine_llama  # noqa: E402
import bench_engine_smollm2  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from copa_harness.lm.local.chat_template import PromptTokens  # noqa: E402
from copa_harness.lm.local.decoding import DecodingRules  # noqa: E402
from copa_harness.lm.local.executor import Prompt  # noqa: E402
from copa_harness.lm.local.model import LocalModel  # noqa: E402
from copa_harness.lm.local.scheduler import BatchGenerator  # noqa: E402

SIZES = {
    "2M": {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 5354,
    },
    "100M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 16000,
    },
}
N_REQUESTS = {"2M": 128, "100M": 16}
N_ALONE = {"2M": 16, "100M": 2}
PREFIX_TOKENS = 600


def write_model(size: str) -> Path:
    folder = Path(SCRATCH.name) / size
    config = transformers.LlamaConfig(
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
        **SIZES[size],
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Workload:
    """Prompts and their numbers of new tokens."""

    def __init__(self, size: str, n_requests: int | None = None) -> None:
        draw, vocabulary = random.Random(0), SIZES[size]["vocab_size"]
        self.prefix = [draw.randrange(5, vocabulary) for _ in range(PREFIX_TOKENS)]
        lengths = (draw.randint(30, 50) for _ in range(n_requests or N_REQUESTS[size]))
        self.suffixes = [[draw.randrange(5, vocabulary) for _ in range(length)] for length in lengths]
        self.n_new = [draw.randint(8, 24) for _ in self.suffixes]

    def __len__(self) -> int:
        return len(self.suffixes)

    def ids(self, i: int) -> list[int]:
        return self.prefix + self.suffixes[i]


def alone(model, work, indices):
    answers = []
    for i in indices:
        ids = torch.tensor([work.ids(i)])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=work.n_new[i],
            do_sample=False,
            pad_token_id=0,
        )
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def padded(model, work, *, batch_size):
    answers = []
    for start in range(0, len(work), batch_size):
        rows = [work.ids(i) for i in range(start, min(start + batch_size, len(work)))]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        limits = work.n_new[start : start + batch_size]
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max(limits), do_sample=False, pad_token_id=0
        )
        answers += [row[width : width + n].tolist() for row, n in zip(out, limits, strict=True)]
    return answers


def continuous(model, work):
    """transformers' own, with blocks for this workload (its default took 5x as long here); answers are cut afterwards,
    since there is one limit of new tokens for all requests."""
    config = transformers.GenerationConfig(
        max_new_tokens=max(work.n_new), do_sample=False, pad_token_id=0, eos_token_id=-1
    )
    page = 32
    blocks = PREFIX_TOKENS // page + 2 + len(work) * (80 // page + 3) + 4 * (700 // page + 1)
    batching = transformers.ContinuousBatchingConfig(
        page_size=page, num_blocks=blocks, max_batch_tokens=128, max_requests_per_batch=8
    )
    found = model.generate_batch(
        [work.ids(i) for i in range(len(work))],
        generation_config=config,
        continuous_batching_config=batching,
        warmup=False,
        progress_bar=False,
    )
    answers = sorted(found.values(), key=lambda one: int(str(one.request_id).rsplit("_", 1)[-1]))
    return [list(one.generated_tokens)[:n] for one, n in zip(answers, work.n_new, strict=True)]


class NoChat:
    """Stands for tokenizer and template, which are not measured here."""

    def decode(self, ids):
        return ""


def ours(generator, work, *, cascades, indices=None, loras=None, warm=False):
    """Through the engine's queue, from one thread per request, with no prefix known unless `warm`."""
    generator.cascades = cascades
    if not warm:
        generator.prefixes.__init__()
    chat = NoChat()

    def one(i):
        with generator.arriving():
            tokens = PromptTokens(tuple(work.ids(i)), PREFIX_TOKENS)
            lora = loras[i % len(loras)] if loras else None
            job = generator.submit(
                Prompt(
                    tokens=tokens,
                    rules=DecodingRules(work.n_new[i]),
                    lora=lora,
                    chat=chat,
                    eos_ids=frozenset(),
                )
            )
        return list(generator.wait(job).ids)

    indices = range(len(work)) if indices is None else indices
    with ThreadPoolExecutor(len(indices)) as pool:
        return list(pool.map(one, indices))


def gemm_gflops(hidden, inner, rows):
    a, b = torch.randn(rows, hidden), torch.randn(hidden, inner)
    rates = []
    for _ in range(7):
        began = time.perf_counter()
        for _ in range(8):
            a @ b
        rates.append(8 * 2 * rows * hidden * inner / (time.perf_counter() - began) / 1e9)
    return max(rates)


def floor_ms(size, work, *, shares):
    """Least time per request: multiply-adds of weights and attention over the best GEMM rate of this machine."""
    shape = SIZES[size]
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    per_token = 2 * layers * (4 * hidden**2 + 3 * hidden * inner)
    head = 2 * hidden * shape["vocab_size"]
    flops = 0.0
    for suffix, n_new in zip(work.suffixes, work.n_new, strict=True):
        prompt = len(suffix) + (0 if shares else PREFIX_TOKENS)
        flops += (prompt + n_new) * per_token + n_new * head
        context = PREFIX_TOKENS + len(suffix)
        own_pairs = (len(suffix) + n_new) * context + (0 if shares else PREFIX_TOKENS**2 / 2)
        flops += 4 * layers * hidden * own_pairs
    if shares:
        flops += PREFIX_TOKENS * per_token + 4 * layers * hidden * PREFIX_TOKENS**2 / 2
    rate = max(gemm_gflops(hidden, inner, rows) for rows in (64, 512))
    return flops / len(work) / rate / 1e6, rate


def resident_mb():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


class Peak:
    """Largest resident memory while a block runs, above what was resident before, in MB."""

    def __enter__(self):
        import threading

        gc.collect()
        self.before = self.most = resident_mb()
        self._stop = threading.Event()

        def watch():
            while not self._stop.wait(0.01):
                self.most = max(self.most, resident_mb())

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()
        self.mb = self.most - self.before


def methods(size, work, alone_model, generator, llama):
    """Name -> (function giving answers, indices answered, whether the prefix is computed once)."""
    every = list(range(len(work)))
    some = every[: N_ALONE[size]]
    n_rows = 16 if size == "2M" else 8
    rows = {
        "generate, one by one": (lambda: alone(alone_model, work, some), some, False),
        f"generate, padded, {n_rows} rows": (lambda: padded(alone_model, work, batch_size=n_rows), every, False),
        "continuous batching": (lambda: continuous(alone_model, work), every, True),
        "ours, stock": (lambda: ours(generator, work, cascades=False), every, True),
        "ours, cascade": (lambda: ours(generator, work, cascades=True), every, True),
    }
    if llama is not None:
        rows["llama-cpp-python"] = (lambda: llama.answers(work), every, True)
    return rows


def llama_cpp_of(model, size, work, threads):
    """The same weights in llama.cpp, or None with a line that says why not."""
    if absent := bench_engine_llama.missing():
        print(f"  the row of llama-cpp-python is left out: {' and '.join(absent)} not installed")
        return None
    file = bench_engine_llama.write_gguf(model, Path(SCRATCH.name) / f"{size}.gguf")
    n_own = max(len(suffix) + n for suffix, n in zip(work.suffixes, work.n_new, strict=True))
    return bench_engine_llama.LlamaCpp(file, threads=threads, n_prefix=PREFIX_TOKENS, n_own=n_own)


def speed(size, threads, rounds):
    torch.set_num_threads(threads)
    folder, work = write_model(size), Workload(size)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    generator = BatchGenerator(LocalModel(folder, device="cpu", dtype="float32"))
    floors = {shares: floor_ms(size, work, shares=shares) for shares in (True, False)}
    print(f"\n{size}, {threads} thread(s), {len(work)} requests; GEMM {floors[True][1]:.0f} GFLOP/s")
    llama = llama_cpp_of(model, size, work, threads)
    rows = methods(size, work, model, generator, llama)
    expected = alone(model, work, range(N_ALONE[size]))
    times, memory, exact = {name: [] for name in rows}, {}, {}
    for turn in range(rounds):
        for name, (answer, indices, _) in list(rows.items()):
            with Peak() as peak, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                began = time.perf_counter()
                try:
                    got = answer()
                except Exception as error:  # noqa: BLE001 - a method that cannot run is reported as such
                    print(f"  {name}: failed: {type(error).__name__}: {str(error)[:200]}")
                    del rows[name]
                    continue
                times[name].append((time.perf_counter() - began) / len(indices) * 1e3)
            if turn == 0:
                memory[name], exact[name] = peak.mb, got[: len(expected)] == expected
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    base = medians["generate, one by one"]
    print(f"  {'':28}{'ms/request':>11}{'floor':>8}{'vs one':>8}{'memory':>10}  tokens as one by one")
    for name, median in medians.items():
        floor = floors[rows[name][2]][0]
        print(f"  {name:28}{median:11.1f}{floor:8.1f}{base / median:7.1f}x{memory[name]:8.0f}MB  {exact[name]}")
    mine = medians["ours, cascade"]
    others = {name: value for name, value in medians.items() if not name.startswith("ours")}
    best = min(others, key=others.get)
    target = {"2M": 8, "100M": 5}[size]
    verdict = "met" if base / mine >= target else "MISSED"
    print(
        f"  cascade: {base / mine:.1f}x one by one (target {target}x: {verdict}); {others[best] / mine:.1f}x the "
        f"best other, {best}; near-ties answered alone: {generator.n_near_ties}"
    )
    if llama is not None:
        llama.close()
    return {
        "size": size,
        "threads": threads,
        "ms": medians,
        "floor_ms": {str(k): v[0] for k, v in floors.items()},
        "memory_mb": memory,
        "exact": exact,
    }


def write_lora(folder: Path, base: LocalModel, seed: int):
    import peft

    from copa_harness.lm.local.files import base_fingerprint, write_manifest
    from copa_harness.lm.local.model import share_weights, silence_peft

    with silence_peft():
        settings = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        tuned = peft.get_peft_model(share_weights(base.model), settings)
        torch.manual_seed(seed)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.02)
        tuned.save_pretrained(folder)
    return write_manifest(folder, base_fingerprint=base_fingerprint(base.directory, dtype="float32"), details={})


def second_adapter(size, threads, rounds, n_requests):
    """The same requests by one adapter, and by two in turn (each request the other one)."""
    torch.set_num_threads(threads)
    folder, work = write_model(size), Workload(size, n_requests)
    generator = BatchGenerator(LocalModel(folder, device="cpu", dtype="float32"))
    loras = [write_lora(Path(SCRATCH.name) / f"{size}-lora-{i}", generator.model, i) for i in range(2)]
    plans = {"base model": None, "one adapter": loras[:1], "two adapters": loras}
    times = {name: [] for name in plans}
    for chosen in plans.values():
        ours(generator, work, cascades=True, loras=chosen)
    for _ in range(rounds):
        for name, chosen in plans.items():
            began = time.perf_counter()
            ours(generator, work, cascades=True, loras=chosen, warm=True)
            times[name].append((time.perf_counter() - began) / len(work) * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    extra = medians["two adapters"] / medians["one adapter"] - 1
    print(
        f"\nadapters, {size}, {threads} thread(s), {len(work)} requests in flight, prefixes known: "
        + ", ".join(f"{name} {value:.2f} ms/request" for name, value in medians.items())
        + f"; the second costs {extra:+.0%} (target +10%: {'met' if extra <= 0.10 else 'MISSED'})"
    )
    return medians


def precision(size, threads):
    """bfloat16 beside float32 on this CPU."""
    torch.set_num_threads(threads)
    folder, work = write_model(size), Workload(size)
    took = {}
    for dtype in ("float32", "bfloat16"):
        generator = BatchGenerator(LocalModel(folder, device="cpu", dtype=dtype))
        ours(generator, work, cascades=True)
        began = time.perf_counter()
        ours(generator, work, cascades=True)
        took[dtype] = (time.perf_counter() - began) / len(work) * 1e3
    print(f"\nprecision, {size}, {threads} thread(s): " + ", ".join(f"{k} {v:.1f} ms/request" for k, v in took.items()))
    return took


def through_dspy(rounds):
    """75 Iris rows with 12 demonstrations on the embedded model: dspy and our evaluation beside the engine alone."""
    import dspy

    from copa_harness.evaluate import evaluate
    from copa_harness.lm.factory import build_lm
    from copa_harness.lm.gateway import Gateway
    from copa_harness.tasks import iris

    torch.set_num_threads(2)
    task = iris()
    program = task.program.deepcopy()
    program.demos = list(task.trainset[:12])
    times = {"engine": [], "dspy": []}
    requests = []
    for _ in range(rounds + 1):
        lm = build_lm("embedded", gateway=Gateway(cache=None), cache_dir=Path(SCRATCH.name))
        complete = lm.engine.complete
        if not requests:

            def noted(request, *, seed, complete=complete):
                requests.append(request)
                return complete(request, seed=seed)

            lm.engine.complete = noted
        lm.engine.model  # loaded before the clock starts
        lm.engine.generator.prefixes.__init__()
        with dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
            began = time.perf_counter()
            evaluate(program, task.testset, metric=task.metric, split="test", lm=lm)
            times["dspy"].append(time.perf_counter() - began)
        lm.engine.generator.prefixes.__init__()
        with ThreadPoolExecutor(32) as pool:
            began = time.perf_counter()
            list(pool.map(lambda request, ask=complete: ask(request, seed=0), requests))
            times["engine"].append(time.perf_counter() - began)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    ratio = medians["dspy"] / medians["engine"]
    print(
        f"\n75 Iris rows, 12 demonstrations, 2 threads: engine {medians['engine']:.2f} s, through dspy "
        f"{medians['dspy']:.2f} s: {ratio:.2f}x (target 1.5x: {'met' if ratio <= 1.5 else 'MISSED'})"
    )
    return medians


def long_list(threads, n_rows):
    """Constrained answers with the 150 labels of CLINC150 (`COPA_CLINC150` names its file) on SmolLM2."""
    from copa_harness.evaluate import evaluate
    from copa_harness.lm.factory import build_lm
    from copa_harness.lm.gateway import Gateway
    from copa_harness.tasks import clinc150

    torch.set_num_threads(threads)
    task = clinc150(intents=150, n_train=150, n_val=150, n_test=n_rows)
    name = f"gguf:{os.environ['LLAMA_ARG_MODEL']}" if "LLAMA_ARG_MODEL" in os.environ else "smollm2"
    lm = build_lm(name, gateway=Gateway(cache=None), cache_dir=Path(SCRATCH.name), constrain=True)
    lm.engine.generator  # loaded before the clock starts
    with Peak() as peak:
        began, cpu = time.perf_counter(), time.process_time()
        evaluate(task.program, task.testset, metric=task.metric, split="test", lm=lm)
        took = [(now - then) / n_rows for now, then in ((time.perf_counter(), began), (time.process_time(), cpu))]
    print(
        f"\n150 labels, {n_rows} rows, {threads} thread(s): {took[0]:.1f} s a row ({took[1]:.1f} CPU s), "
        f"{peak.mb:.0f} MB beyond the model"
    )
    return {"seconds": took, "mb": peak.mb}


START_UP = """
import time; began = time.perf_counter()
from pathlib import Path
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.embedded import embedded_model_path
engine = TransformersEngine(embedded_model_path(), name="embedded", lora_dir=Path("."))
engine.chat; engine.generator
print(time.perf_counter() - began)
from dspy.lm15 import Config, Message, Request
request = Request(model="embedded", messages=(Message.user("x"),), config=Config(max_tokens=4))
engine.complete(request, seed=0)
print(time.perf_counter() - began)
"""


def start_up():
    """Seconds from an empty process to a model that answers."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    took = []
    for _ in range(3):
        ran = subprocess.run(
            [sys.executable, "-c", START_UP], capture_output=True, text=True, check=True, env=environment
        )
        took.append(tuple(map(float, ran.stdout.split())))
    ready, answered = zip(*took, strict=True)
    print(
        f"\nstart-up of the embedded model in a fresh process: ready after {min(ready):.1f}-{max(ready):.1f} s "
        f"(target 3 s: {'met' if statistics.median(ready) <= 3 else 'MISSED'}), first answer, with dspy imported, "
        f"after {min(answered):.1f}-{max(answered):.1f} s"
    )
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small model, 2 threads")
    parser.add_argument("--sizes", nargs="+", default=["2M", "100M"], choices=SIZES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64, help="of SmolLM2's shared prefix")
    parser.add_argument("--only", choices=["speed", "adapters", "precision", "dspy", "start-up", "smollm2", "labels"])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.threads = ["2M"], [2]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    figures = {}

    def wanted(part):
        return options.only in (None, part)

    if wanted("start-up"):
        figures["start_up_s"] = start_up()
    for size in options.sizes:
        if wanted("speed"):
            rounds = options.rounds if size == "2M" else max(1, options.rounds // 2)
            figures[f"speed {size}"] = [speed(size, threads, rounds) for threads in options.threads]
        if wanted("adapters"):
            for n in (64, 128) if size == "2M" else (N_REQUESTS[size],):
                rounds = max(options.rounds, 7) if size == "2M" else options.rounds
                figures[f"adapters {size} {n}"] = second_adapter(size, options.threads[0], rounds, n)
    if wanted("precision"):
        figures["precision"] = precision(options.sizes[-1], options.threads[-1])
    if wanted("smollm2"):
        figures["smollm2"] = bench_engine_smollm2.run(
            scratch=Path(SCRATCH.name),
            threads=options.threads,
            rounds=options.rounds,
            n_requests=options.requests,
        )
    if options.only == "labels":
        figures["labels"] = long_list(options.threads[0], 8)
    if wanted("dspy"):
        figures["dspy"] = through_dspy(options.rounds)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
