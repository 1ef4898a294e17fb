"""TransformersEngine: exact whoever else asks, one model per process, clear refusals."""

from __future__ import annotations

import copy
import json
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from dspy.lm15 import Config, FunctionTool, Message, Request

from copa_harness.errors import ConfigurationError, ContextOverflowError, OutOfMemoryError, ProviderError
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.local.llama import LlamaDecoder
from copa_harness.testing.tiny_models import ARCHITECTURES, write_tiny_model

WORDS = ["answer", "0.1", "question", "zebra", "field", "2.3", "[[ ## label ## ]]"]


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """A tiny model folder by architecture and seed, written once."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(architecture: str = "llama", seed: int = 0) -> Path:
        path = root / f"{architecture}-{seed}"
        return path if path.exists() else write_tiny_model(path, architecture=architecture, seed=seed)

    return folder


@pytest.fixture
def engine(tiny_folders, tmp_path):
    return TransformersEngine(tiny_folders(), name="hf:tiny", lora_dir=tmp_path)


def words(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def make_requests(n: int, *, seed: int = 0, max_tokens: int = 12, **config) -> list[Request]:
    """Requests behind two system prompts, with suffixes and limits of all lengths, some without a system prompt."""
    rng = random.Random(seed)
    systems = [words(rng, 30), words(rng, 20), None]
    return [
        Request(
            model="hf:tiny",
            system=rng.choice(systems),
            messages=(Message.user(words(rng, rng.randint(1, 20))),),
            config=Config(max_tokens=rng.randint(1, max_tokens), **config),
        )
        for _ in range(n)
    ]


def ask_together(engine, requests, *, threads: int, seeds=None):
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda request, seed: engine.complete(request, seed=seed), requests, seeds or [0] * 99))


def plain_generate(folder: Path, request: Request) -> tuple[str, int]:
    """Text and number of tokens by transformers alone, one request, no cache of ours."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": request.messages[0].text}]
    if request.system is not None:
        messages.insert(0, {"role": "system", "content": request.system})
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    n_prompt = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    generated = model.generate(**inputs, max_new_tokens=request.config.max_tokens, do_sample=False)[0, n_prompt:]
    return tokenizer.decode(generated, skip_special_tokens=True), len(generated)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_of_a_mixed_batch_equal_plain_one_request_generate(architecture, tiny_folders, tmp_path):
    folder = tiny_folders(architecture)
    engine = TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path)
    requests = make_requests(24)
    responses = ask_together(engine, requests, threads=24)
    assert [(r.text, r.usage.output_tokens) for r in responses] == [plain_generate(folder, q) for q in requests]
    assert len({r.text for r in responses}) > 8  # noise, but not the same noise


@pytest.mark.parametrize("seed", [1, 2])
def test_answers_do_not_depend_on_order_threads_or_company(seed, tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setattr("copa_harness.lm.local.scheduler.MAX_BATCH", 7)
    engine = TransformersEngine(tiny_folders("qwen2", seed), name="hf:tiny", lora_dir=tmp_path)
    requests = make_requests(20, seed=seed)
    one_by_one = [engine.complete(request, seed=0).text for request in requests]
    shuffled = random.Random(seed).sample(range(20), 20)
    for threads in (3, 20):
        together = ask_together(engine, [requests[i] for i in shuffled], threads=threads)
        assert [response.text for response in together] == [one_by_one[i] for i in shuffled]


def test_concurrent_requests_share_batches_and_prefixes(tiny_folders, tmp_path):
    engine = TransformersEngine(tiny_folders("llama", 3), name="hf:tiny", lora_dir=tmp_path)
    requests = [
        Request(
            model="hf:tiny",
            system=words(random.Random(0), 40),
            messages=(Message.user(f"case {i}"),),
            config=Config(max_tokens=4),
        )
        for i in range(32)
    ]
    ask_together(engine, requests, threads=32)
    assert engine.generator.n_rows == 32
    assert engine.generator.n_batches <= 8
    assert engine.generator.prefixes.n_prefilled == 1


def test_every_prompt_of_a_repeat_draws_for_itself():
    from copa_harness.lm.local.engine import rules_of

    (request,) = make_requests(1, temperature=1.0)
    seeds = {rules_of(request, 1, prompt=prompt, context=64).seed for prompt in ([1, 2], [1, 3], [2])}
    assert len(seeds) == 3
    assert rules_of(request, 1, prompt=[2], context=64).seed in seeds


def test_a_sampled_answer_depends_on_its_own_seed_only(engine):
    requests = make_requests(12, temperature=1.0)
    seeds = list(range(12))
    together = [r.text for r in ask_together(engine, requests, threads=12, seeds=seeds)]
    alone = [engine.complete(request, seed=seed).text for request, seed in zip(requests, seeds, strict=True)]
    assert together == alone
    other = [engine.complete(request, seed=seed + 1).text for request, seed in zip(requests, seeds, strict=True)]
    assert other != alone


def test_greedy_and_sampled_requests_share_a_batch_without_touching_each_other(engine):
    greedy, sampled = make_requests(8), make_requests(8, temperature=0.9, top_p=0.8)
    mixed = [request for pair in zip(greedy, sampled, strict=True) for request in pair]
    together = ask_together(engine, mixed, threads=16)
    assert [r.text for r in together] == [engine.complete(request, seed=0).text for request in mixed]


def test_a_tiny_top_p_is_greedy(engine):
    request = make_requests(1, max_tokens=8)[0]
    sampled = Request(
        model=request.model,
        system=request.system,
        messages=request.messages,
        config=Config(max_tokens=request.config.max_tokens, temperature=1.5, top_p=1e-6),
    )
    assert engine.complete(sampled, seed=5).text == engine.complete(request, seed=0).text


def test_usage_counts_real_tokens_and_no_padding(engine):
    short = Request(model="hf:tiny", messages=(Message.user("0.1"),), config=Config(max_tokens=3))
    long = Request(model="hf:tiny", messages=(Message.user(words(random.Random(0), 50)),), config=Config(max_tokens=9))
    first, second = ask_together(engine, [short, long], threads=2)
    ids = engine.tokenizer("<|user|>0.1<|assistant|>", add_special_tokens=False)["input_ids"]
    assert first.usage.input_tokens == len(ids)
    assert (first.usage.output_tokens, second.usage.output_tokens) == (3, 9)
    assert first.finish_reason == "length"


def test_an_end_token_ends_the_answer_and_is_not_in_its_text(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders(), tmp_path / "ends")
    request = Request(model="hf:tiny", messages=(Message.user("question"),), config=Config(max_tokens=20))
    probe = TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path)
    full = probe.complete(request, seed=0)
    ids = probe.tokenizer(full.text, add_special_tokens=False)["input_ids"]
    config = json.loads((folder / "config.json").read_text())
    ending = shutil.copytree(folder, tmp_path / "ends2")
    (ending / "config.json").write_text(json.dumps({**config, "eos_token_id": ids[2]}))
    (ending / "generation_config.json").unlink(missing_ok=True)
    response = TransformersEngine(ending, name="hf:tiny", lora_dir=tmp_path).complete(request, seed=0)
    position = ids.index(ids[2])
    assert response.finish_reason == "stop"
    assert response.usage.output_tokens == position + 1
    assert full.text.startswith(response.text)


def test_a_stop_string_ends_the_answer_and_is_cut_from_it(engine):
    base = {"model": "hf:tiny", "messages": (Message.user("question zebra"),)}
    full = engine.complete(Request(**base, config=Config(max_tokens=24)), seed=0).text
    stop = full[6:9]
    response = engine.complete(Request(**base, config=Config(max_tokens=24, stop=(stop,))), seed=0)
    assert response.text == full[: full.index(stop)]
    assert response.finish_reason == "stop"
    assert response.usage.output_tokens < 24


def test_what_does_not_fit_the_context_is_an_error_that_names_the_numbers(tmp_path):
    folder = write_tiny_model(tmp_path / "short", context_length=64)
    engine = TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path)
    request = Request(model="hf:tiny", messages=(Message.user("zebra " * 100),), config=Config(max_tokens=10))
    n_prompt = len(
        engine.tokenizer("<|user|>" + "zebra " * 100 + "<|assistant|>", add_special_tokens=False)["input_ids"]
    )
    with pytest.raises(ContextOverflowError, match=rf"{n_prompt} tokens and max_tokens=10 .* context holds 64"):
        engine.complete(request, seed=0)


def test_without_max_tokens_an_answer_may_fill_the_context(tmp_path):
    folder = write_tiny_model(tmp_path / "short", context_length=32)
    engine = TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path)
    response = engine.complete(Request(model="hf:tiny", messages=(Message.user("0.1"),)), seed=0)
    assert response.usage.input_tokens + response.usage.output_tokens <= 32


def test_a_model_without_chat_template_says_how_to_give_one(tmp_path):
    folder = write_tiny_model(tmp_path / "bare", chat_template=None)
    request = Request(model="hf:tiny", messages=(Message.user("x"),), config=Config(max_tokens=2))
    with pytest.raises(ConfigurationError, match=r"chat_template\.jinja"):
        TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path).complete(request, seed=0)
    given = TransformersEngine(
        folder, name="hf:tiny", lora_dir=tmp_path, chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    assert given.complete(request, seed=0).usage.input_tokens == 1


def test_a_template_without_system_role_gets_the_system_text_in_the_first_user_message(tiny_folders, tmp_path):
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    engine = TransformersEngine(tiny_folders(), name="hf:tiny", lora_dir=tmp_path, chat_template=template)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert engine.chat.text(messages, answer_next=True) == "<|user|>S\n\nU<|assistant|>"


def test_a_fingerprint_needs_no_torch(tiny_folders, tmp_path):
    code = (
        "import sys; from pathlib import Path; from copa_harness.lm.local.engine import TransformersEngine\n"
        f"engine = TransformersEngine({str(tiny_folders())!r}, name='hf:tiny', lora_dir=Path({str(tmp_path)!r}))\n"
        "print(engine.fingerprint('hf:tiny')); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == TransformersEngine(tiny_folders(), name="hf:tiny", lora_dir=tmp_path).fingerprint("hf:tiny")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_a_fingerprint_changes_with_every_file_that_shapes_answers(name, tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders(), tmp_path / "copy")
    engine = TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path)
    before = engine.fingerprint("hf:tiny")
    assert before == TransformersEngine(tiny_folders(), name="hf:other", lora_dir=tmp_path).fingerprint("hf:other")
    with (folder / name).open("ab") as file:
        file.write(b" ")
    assert engine.fingerprint("hf:tiny") != before


def test_a_fingerprint_tells_dtypes_and_chat_templates_apart(tiny_folders, tmp_path):
    options = [{}, {"dtype": "bfloat16"}, {"chat_template": "{{ messages }}"}]
    engines = [TransformersEngine(tiny_folders(), name="m", lora_dir=tmp_path, **option) for option in options]
    assert len({engine.fingerprint("m") for engine in engines}) == 3


def test_engines_on_one_folder_share_the_model_in_memory(tiny_folders, tmp_path):
    engines = [TransformersEngine(tiny_folders(), name=name, lora_dir=tmp_path) for name in ("a", "b")]
    assert engines[0].model is engines[1].model
    assert copy.deepcopy(engines[0]) is engines[0]


@pytest.mark.parametrize("model", ["gpt-4", "hf:tiny@nothex", "other@0123456789ab", "hf:tiny@0123456789ab"])
def test_a_name_the_engine_does_not_have_is_a_clear_error(model, engine):
    with pytest.raises(ConfigurationError, match=r"expected|remedy"):
        engine.fingerprint(model)


def test_pickled_weights_are_refused(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders(), tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match="safetensors"):
        TransformersEngine(folder, name="m", lora_dir=tmp_path).fingerprint("m")


def test_code_that_comes_with_a_model_is_never_run(tiny_folders, tmp_path):
    folder = tmp_path / "own-code"
    shutil.copytree(tiny_folders("llama", 5), folder)
    mark = tmp_path / "it-ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    engine = TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="without trust_remote_code"):
        engine.complete(make_requests(1)[0], seed=0)
    assert not mark.exists()


def test_a_path_that_is_no_model_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigurationError, match="folder"):
        TransformersEngine(tmp_path / "nowhere", name="m", lora_dir=tmp_path).fingerprint("m")


def test_what_a_local_model_cannot_take_is_refused_instead_of_ignored(engine):
    message = Message.user("x")
    tool = FunctionTool(name="f", description="d", parameters={"type": "object", "properties": {}})
    with pytest.raises(ConfigurationError, match=r"native tools= .*remedy: let DSPy write the tools into the prompt"):
        engine.complete(Request(model="hf:tiny", messages=(message,), tools=(tool,)), seed=0)
    json = Config(response_format={"type": "json_object"})
    with pytest.raises(ConfigurationError, match="response format"):
        engine.complete(Request(model="hf:tiny", messages=(message,), config=json), seed=0)
    for name, value in (("probabilities", "required"), ("frequency_penalty", 1.0)):
        with pytest.raises(ProviderError, match=name):
            engine.complete(Request(model="hf:tiny", messages=(message,), config=Config(**{name: value})), seed=0)


def test_near_ties_are_answered_alone_and_counted(tiny_folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folders(), tmp_path / "ties")
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    embedding[200:384] = embedding[16:200]  # every such token has a twin with the same logit
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    engine = TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path)
    requests = make_requests(8)
    responses = ask_together(engine, requests, threads=8)
    assert engine.generator.n_near_ties > 0
    assert [r.text for r in responses] == [plain_generate(folder, q)[0] for q in requests]


def test_a_batch_too_large_for_memory_is_halved_and_one_prompt_too_large_is_an_error(
    tiny_folders, tmp_path, monkeypatch
):
    engine = TransformersEngine(tiny_folders("llama", 9), name="hf:tiny", lora_dir=tmp_path)
    requests = make_requests(8)
    expected = [engine.complete(request, seed=0).text for request in requests]
    read, limit = LlamaDecoder.read, 2

    def little_memory(decoder, ids, **kwargs):
        if len(ids) > limit:
            raise RuntimeError("CUDA out of memory")
        return read(decoder, ids, **kwargs)

    monkeypatch.setattr(LlamaDecoder, "read", little_memory)
    assert [r.text for r in ask_together(engine, requests, threads=8)] == expected
    limit = 0
    with pytest.raises(OutOfMemoryError, match="CUDA out of memory"):
        engine.complete(requests[0], seed=0)


def test_a_failing_model_is_a_provider_error_for_everyone_in_the_batch(tiny_folders, tmp_path, monkeypatch):
    engine = TransformersEngine(tiny_folders("llama", 8), name="hf:tiny", lora_dir=tmp_path)

    def broken(*args, **kwargs):
        raise RuntimeError("device-side assert")

    assert engine.generator.model.decoder is not None
    monkeypatch.setattr(LlamaDecoder, "read", broken)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(engine.complete, request, seed=0) for request in make_requests(4)]
    for future in futures:
        with pytest.raises(ProviderError, match="device-side assert"):
            future.result()


def test_an_id_that_could_not_be_fetched_is_not_asked_for_again(monkeypatch, tmp_path):
    from copa_harness.lm.local.sources.source import ModelSource

    asked = []

    def directory(source):
        asked.append(source.place)
        raise ConfigurationError("could not be fetched; remedy: check the connection")

    monkeypatch.setattr(ModelSource, "directory", directory)
    engine = TransformersEngine("nobody/nothing", name="hf:nobody/nothing", lora_dir=tmp_path)
    for _ in range(3):
        with pytest.raises(ConfigurationError, match="check the connection"):
            engine.fingerprint("hf:nobody/nothing")
    assert asked == ["nobody/nothing"]
