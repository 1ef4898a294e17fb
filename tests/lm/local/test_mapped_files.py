"""Weights in memory: float32 ones are the file itself, mapped, and there is one model per process for everybody."""

from __future__ import annotations

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from dspy.lm15 import Config, Message, Request

from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.local.model import LocalModel
from copa_harness.testing.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=31)


@pytest.fixture(scope="module")
def wide(tiny, tmp_path_factory):
    """A folder with 38 MB of float32 weights."""
    folder = tmp_path_factory.mktemp("model") / "wide"
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=4,
        vocab_size=2048,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def mapped_kb(file):
    """How much of a file this process has mapped and in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_stored_as_they_are_used_are_mapped_and_others_are_converted(wide):
    file = wide / "model.safetensors"
    size_kb = file.stat().st_size / 1024
    exact = LocalModel(wide, device="cpu", dtype="float32")
    assert mapped_kb(file) > 0.9 * size_kb
    del exact
    gc.collect()
    half = LocalModel(wide, device="cpu", dtype="bfloat16")
    assert mapped_kb(file) == 0
    assert half.model.dtype is torch.bfloat16


def test_however_many_engines_and_threads_ask_there_is_one_model(tiny, tmp_path):
    def ask(i):
        engine = TransformersEngine(tiny, name=f"hf:{i % 3}", lora_dir=tmp_path / str(i))
        request = Request(model=f"hf:{i % 3}", messages=(Message.user(f"q {i}"),), config=Config(max_tokens=1))
        engine.complete(request, seed=0)
        return engine

    gc.collect()
    before = sum(type(thing) is transformers.LlamaForCausalLM for thing in gc.get_objects())
    with ThreadPoolExecutor(8) as pool:
        engines = list(pool.map(ask, range(16)))
    gc.collect()
    after = sum(type(thing) is transformers.LlamaForCausalLM for thing in gc.get_objects())
    assert after == before + 1
    assert len({id(engine.generator) for engine in engines}) == 1


def test_adapters_and_a_training_share_the_weights_in_memory(tiny, tmp_path):
    from copa_harness.lm.local.model import share_weights
    from copa_harness.tune import LoraSettings, LoraTrainer, TrainingRow

    engine = TransformersEngine(tiny, name="hf:tiny", lora_dir=tmp_path)
    row = TrainingRow(({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}))
    adapter = LoraTrainer(engine, directory=tmp_path).train(
        [row], settings=LoraSettings(rank=2, epochs=1), served_with="none"
    )
    engine.generator.model.serving(engine._lora(adapter.model))
    tree = engine.generator.model._with_loras
    base = {tensor.data_ptr() for tensor in engine.model.parameters()}
    served = {p.data_ptr() for name, p in tree.named_parameters() if "lora_" not in name}
    assert served == base == {p.data_ptr() for p in share_weights(engine.model).parameters()}
