"""SmolLM2-135M-Instruct beside llama.cpp and transformers; `bench_engine.py --only smollm2` runs it.

Four loads, taken in turn by every contender, each figure the best of the rounds:

* shared: prompts of 626 shared and 113 own tokens, 24 new ones, all requests at once;
* unshared: 174 tokens in, 128 out, all requests at once;
* alone: the same, one request after the other;
* labels: a classification prompt with three demonstrations, 24 new tokens, one request after the other.

Prompts are pieces of this repository's guides, others in every round, since llama.cpp keeps what it has read. It is the
server in the wheel `xllamacpp` (AVX2), with 8 slots and its prompt cache, on the file's own Q4_1 and on Q8_0 made from
it; everybody generates to the given number of tokens. The floor: FLOPs over the rate of large float32 products.

Ratios are of CPU seconds: the processes of others stretch wall time, most of all where threads wait for each other.
"""

from __future__ import annotations

import importlib.util
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from copa_harness.lm.local.chat_template import ChatTemplate, PromptTokens
from copa_harness.lm.local.decoding import DecodingRules
from copa_harness.lm.local.executor import Prompt
from copa_harness.lm.local.model import LocalModel
from copa_harness.lm.local.scheduler import BatchGenerator
from copa_harness.lm.local.sources.names import named_place
from copa_harness.lm.local.sources.source import ModelSource
from copa_harness.lm.local.tokenizer import read_tokenizer

N_SLOTS = 8
TARGETS = {"labels": 1.0, "alone": 1.0, "shared": 3.5, "unshared": 2.0}
FIELD = "Respond with `[[ ## intent ## ]]`, and then end with the marker for `[[ ## completed ## ]]`."
ANSWERS = {
    "what is on my account": "balance",
    "get me to rome": "book_flight",
    "my visa does not work": "card_declined",
}
QUESTIONS = (
    "how much money do i have",
    "why is my card refused",
    "i want to see paris",
    "my card was rejected",
    "am i rich",
)


@dataclass(frozen=True)
class Load:
    """Requests: prompts, how many first tokens they share, new tokens each, and how many are under way at once."""

    prompts: list[list[int]]
    n_shared: int
    n_new: int
    at_once: int


def loads(tokenizer, turn, n_requests):
    guides = Path(__file__).parents[2]
    text = "".join((guides / path).read_text() for path in ("copa_harness/README.md", "suites/README.md"))
    ids = tokenizer(text)["input_ids"][1000 * turn :]
    own = [ids[626 + 100 * i :] for i in range(n_requests)]

    def chat(question):
        turns = [{"role": "system", "content": f"{turn}. Your input is `text`, your output `intent`."}]
        for asked, answer in ANSWERS.items():
            turns.append({"role": "user", "content": f"[[ ## text ## ]]\n{asked}\n\n{FIELD}"})
            turns.append({"role": "assistant", "content": f"[[ ## intent ## ]]\n{answer}\n\n[[ ## completed ## ]]\n"})
        return [*turns, {"role": "user", "content": f"[[ ## text ## ]]\n{question}\n\n{FIELD}"}]

    template = ChatTemplate(tokenizer, name="smollm2")
    labels = [template.prompt(chat(question)) for question in QUESTIONS]
    return {
        "shared": Load([ids[:626] + one[:113] for one in own], 626, 24, n_requests),
        "unshared": Load([one[:174] for one in own], 0, 128, n_requests),
        "alone": Load([one[:174] for one in own[-2:]], 0, 128, 1),
        "labels": Load([list(prompt.ids) for prompt in labels], labels[0].n_prefix, 24, 1),
    }


class NoChat:
    def decode(self, ids):
        return ""


def ours(generator, load):
    generator.prefixes.__init__()

    def one(ids):
        with generator.arriving():
            job = generator.submit(
                Prompt(PromptTokens(tuple(ids), load.n_shared), DecodingRules(load.n_new), None, NoChat(), frozenset())
            )
        return list(generator.wait(job).ids)

    with ThreadPoolExecutor(load.at_once) as pool:
        return list(pool.map(one, load.prompts))


def one_by_one(model, load):
    """transformers' `generate`, of one request only."""
    answers = []
    for prompt in load.prompts[:1]:
        ids = torch.tensor([prompt])
        got = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=load.n_new,
            max_new_tokens=load.n_new,
            do_sample=False,
        )
        answers.append(got[0, len(prompt) :].tolist())
    return answers


class LlamaServer:
    """llama.cpp's server in this process."""

    def __init__(self, path, threads):
        import xllamacpp

        given = xllamacpp.CommonParams()
        given.model.path = str(path)
        given.n_parallel, given.n_ctx = N_SLOTS, N_SLOTS * 2048
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = threads
        given.cache_prompt, given.kv_unified, given.verbosity = True, True, -1
        self._server = xllamacpp.Server(given)

    def answers(self, load):
        def one(ids):
            return self._server.handle_completions(
                {"prompt": ids, "max_tokens": load.n_new, "temperature": 0.0, "ignore_eos": True, "cache_prompt": True}
            )

        with ThreadPoolExecutor(min(load.at_once, N_SLOTS)) as pool:
            got = list(pool.map(one, load.prompts))
        if wrong := [one for one in got if one["usage"]["completion_tokens"] != load.n_new]:
            raise RuntimeError(f"llama.cpp answered {wrong[0]}")
        return got


def write_q8_0(source: Path, target: Path) -> Path:
    """A GGUF file with its matrices in Q8_0."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    kinds = gguf.GGMLQuantizationType
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind, inner = field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in reversed(tensor.shape)])
        kind = kinds.Q8_0 if values.ndim == 2 else kinds.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def cpu_gflops(hidden, inner):
    """Most multiply-adds of large float32 products per CPU second, times two, in 1e9."""
    a, b, rates = torch.randn(512, hidden), torch.randn(hidden, inner), []
    for _ in range(9):
        began = time.process_time()
        for _ in range(8):
            a @ b
        rates.append(8 * 2 * 512 * hidden * inner / (time.process_time() - began) / 1e9)
    return max(rates)


def floor_ms(config, load, rate):
    """Least CPU time per request in float32, a shared prefix computed once."""
    hidden, layers, width = (
        config.hidden_size,
        config.num_hidden_layers,
        config.hidden_size // config.num_attention_heads,
    )
    per_token = (
        2 * layers * hidden * (2 * hidden + 2 * config.num_key_value_heads * width + 3 * config.intermediate_size)
    )
    flops = load.n_shared * per_token
    for prompt in load.prompts:
        n_own = len(prompt) - load.n_shared + load.n_new
        flops += n_own * per_token + load.n_new * 2 * hidden * config.vocab_size
        flops += 4 * layers * hidden * n_own * (load.n_shared + n_own / 2)
    return flops / len(load.prompts) / rate / 1e6


def run(*, scratch: Path, threads, rounds, n_requests):
    """Figures by number of threads, load and contender: (wall ms, CPU ms) per request."""
    place = os.environ.get("LLAMA_ARG_MODEL") or named_place("smollm2", option="language model")[0]
    folder = ModelSource(Path(place), keep_in=scratch).directory()
    tokenizer = read_tokenizer(folder)
    work = [loads(tokenizer, turn, n_requests) for turn in range(rounds)]
    library = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    library.generation_config = transformers.GenerationConfig(pad_token_id=0)
    generator = BatchGenerator(LocalModel(folder, device="cpu", dtype="float32"))
    figures = {}
    for n_threads in threads:
        torch.set_num_threads(n_threads)
        contenders = {
            "ours": (lambda load: ours(generator, load)),
            "transformers": (lambda load: one_by_one(library, load)),
        }
        if importlib.util.find_spec("xllamacpp") is None:
            print("  llama.cpp is left out: pip install xllamacpp")
        else:
            for name, path in (("llama.cpp Q4_1", Path(place)), ("llama.cpp Q8_0", scratch / "q8_0.gguf")):
                if not path.is_file():
                    write_q8_0(Path(place), path)
                contenders[name] = LlamaServer(path, n_threads).answers
        rate = cpu_gflops(library.config.hidden_size, library.config.intermediate_size)
        print(f"\nSmolLM2, {n_threads} thread(s); {rate:.0f} GFLOP per CPU second; per request: ms (CPU ms)")
        for kind, target in TARGETS.items():
            took = {name: [] for name in contenders}
            for load in (one[kind] for one in work):
                for name, answer in contenders.items():
                    began, cpu = time.perf_counter(), time.process_time()
                    n = len(answer(load))
                    took[name].append(((time.perf_counter() - began) / n * 1e3, (time.process_time() - cpu) / n * 1e3))
            best = {name: tuple(map(min, zip(*own, strict=True))) for name, own in took.items()}
            figures[f"{n_threads} {kind}"] = best
            floor = floor_ms(library.config, work[0][kind], rate)
            said = ", ".join(f"{name} {wall:.0f} ({cpu:.0f})" for name, (wall, cpu) in best.items())
            others = [cpu for name, (_, cpu) in best.items() if name.startswith("llama")]
            ratio = min(others) / best["ours"][1] if others else float("nan")
            print(
                f"  {kind}: {said}; floor ({floor:.0f}); {ratio:.2f}x the faster llama.cpp, "
                f"{best['ours'][1] / floor:.2f}x the floor (target {target}x: {'met' if ratio >= target else 'MISSED'})"
            )
    return figures
