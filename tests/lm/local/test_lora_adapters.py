"""Base model and LoRA adapters asked at once: every answer is the one plain peft and transformers give alone."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from dspy.lm15 import Config, Message, Request

from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.local.files import write_manifest
from copa_harness.testing.tiny_models import write_tiny_model


def write_lora(engine, folder, seed, **settings):
    """A LoRA adapter with random weights, large enough to change answers; returns the fine-tuned model's name."""
    import peft
    import torch

    from copa_harness.lm.local.model import share_weights, silence_peft

    with silence_peft():
        config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})
        tuned = peft.get_peft_model(share_weights(engine.model), config)
        draw = torch.Generator().manual_seed(seed)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
        tuned.save_pretrained(folder)
    write_manifest(folder, base_fingerprint=engine.fingerprint("hf:tiny"), details={})
    return engine.add_lora(folder)


def plain_answers(folder, requests, adapters):
    """By the libraries alone, one request at a time."""
    import peft
    import torch
    import transformers

    from copa_harness.lm.local.model import silence_peft

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    modules = {"hf:tiny": transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)}
    for name, directory in adapters.items():
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with silence_peft():
            modules[name] = peft.PeftModel.from_pretrained(base, directory).eval()
    answers = []
    for request in requests:
        messages = [{"role": "system", "content": request.system}] if request.system else []
        messages.append({"role": "user", "content": request.messages[0].text})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = inputs["input_ids"]
        out = modules[request.model].generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.config.max_tokens,
            do_sample=False,
        )
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


@pytest.mark.parametrize(("architecture", "seed"), [("llama", 0), ("qwen2", 1), ("gpt_neox", 2), ("gemma3_text", 3)])
def test_base_and_two_adapters_asked_at_once_answer_as_each_alone(architecture, seed, tmp_path):
    folder = write_tiny_model(tmp_path / "tiny", architecture=architecture, seed=seed)
    engine = TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path)
    adapters = {write_lora(engine, tmp_path / f"lora{i}", i): tmp_path / f"lora{i}" for i in range(2)}
    draw = random.Random(seed)
    systems = ["zebra 0.1 question " * 9, "answer 2.3 " * 8, None]
    requests = [
        Request(
            model=draw.choice(["hf:tiny", *adapters]),
            system=draw.choice(systems),
            messages=(Message.user("field " * draw.randint(1, 12) + str(i)),),
            config=Config(max_tokens=draw.randint(1, 12)),
        )
        for i in range(30)
    ]
    expected = plain_answers(folder, requests, adapters)
    for threads in (30, 3):
        draw.shuffle(order := list(range(30)))
        with ThreadPoolExecutor(threads) as pool:
            answers = dict(
                zip(order, pool.map(lambda i: engine.complete(requests[i], seed=0).text, order), strict=True)
            )
        assert [answers[i] for i in range(30)] == expected
    assert len(set(expected)) > 10


def ask(engine, models, *, system="zebra 0.1 question " * 9):
    requests = [
        Request(model=model, system=system, messages=(Message.user(f"field {i}"),), config=Config(max_tokens=6))
        for i, model in enumerate(models)
    ]
    with engine.generator.arriving(), ThreadPoolExecutor(len(requests)) as pool:
        return requests, list(pool.map(lambda request: engine.complete(request, seed=0).text, requests))


def test_adapters_of_several_kinds_and_the_base_share_one_batch(tmp_path):
    folder = write_tiny_model(tmp_path / "tiny")
    engine = TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path)
    engine.generator._batcher._window_s = 1.0
    kinds = [{"r": 3, "use_rslora": True}, {"target_modules": ["v_proj", "up_proj"], "lora_alpha": 5}]
    folders = [tmp_path / f"lora{i}" for i in range(len(kinds))]
    adapters = {write_lora(engine, to, i, **kinds[i]): to for i, to in enumerate(folders)}
    requests, answers = ask(engine, ["hf:tiny", *adapters] * 4)
    assert answers == plain_answers(folder, requests, adapters)
    assert engine.generator.n_batches <= 2
    assert engine.generator.prefixes.n_prefilled == 3


def test_an_adapter_beyond_low_rank_updates_is_left_to_peft(tmp_path):
    folder = write_tiny_model(tmp_path / "tiny")
    engine = TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path)
    kinds = [{"use_dora": True}, {"alpha_pattern": {"q_proj": 9}}, {"modules_to_save": ["norm"]}]
    folders = [tmp_path / f"lora{i}" for i in range(len(kinds))]
    adapters = {write_lora(engine, to, i, **kinds[i]): to for i, to in enumerate(folders)}
    assert [engine.generator.model.fused(engine._lora(name)) for name in adapters] == [None] * 3
    requests, answers = ask(engine, list(adapters) * 2)
    assert answers == plain_answers(folder, requests, adapters)
