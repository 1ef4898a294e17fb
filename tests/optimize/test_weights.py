"""Weights steps on a real (tiny, random) local model with real LoRA training."""

import json
from pathlib import Path

import pytest

from copa_harness.lm.door import Door
from copa_harness.lm.local import TransformersEngine
from copa_harness.lm.local_tiny import write_tiny_model
from copa_harness.lm.metered import MeteredLM
from copa_harness.optimize import COPA
from copa_harness.optimize.together import finetunable
from copa_harness.tune.settings import LoraSettings


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def tiny_lm(tiny_folder, tmp_path):
    def make():
        engine = TransformersEngine(tiny_folder, name="hf:tiny", lora_dir=tmp_path / "loras")
        return MeteredLM("hf:tiny", engine=engine, door=Door(cache=None), max_tokens=4)

    return make


def optimized(toy, lm, strategy, **settings):
    optimizer = COPA(
        metric=toy.metric, strategy=strategy, budget=60, lm=lm, max_demos=2,
        lora=LoraSettings(epochs=2, rank=2, alpha=4), **settings,
    )  # fmt: skip
    return optimizer.compile(toy.program(), trainset=toy.train[:8], valset=toy.val[:4])


def manifests(folder: Path):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/manifest.json"))]


def test_a_lora_adapter_is_trained_and_says_what_it_is_served_with(toy, tiny_lm, tmp_path):
    result = optimized(toy, tiny_lm(), "w -> p").copa_result
    (manifest,) = manifests(tmp_path / "loras")
    assert "resample:2 + none:0.2" in json.dumps(manifest)
    assert result.usage.train_steps > 0
    assert result.phases[1].usage.train_steps == result.usage.train_steps


def test_weights_alone_are_trained_on_bare_prompts(toy, tiny_lm, tmp_path):
    program = optimized(toy, tiny_lm(), "w")
    (manifest,) = manifests(tmp_path / "loras")
    assert '"served_with": "none"' in json.dumps(manifest)
    assert program.lm.model.startswith("hf:tiny@")


def test_the_same_training_is_never_done_twice(toy, tiny_lm):
    first = optimized(toy, tiny_lm(), "w").copa_result
    second = optimized(toy, tiny_lm(), "w").copa_result
    assert first.usage.train_steps > 0
    assert second.usage.train_steps == 0
    assert second.model == first.model


def test_rows_can_be_held_out_for_early_stopping(toy, tiny_lm, tmp_path):
    optimized(toy, tiny_lm(), "w", held_out_share=0.25)
    (manifest,) = manifests(tmp_path / "loras")
    assert '"n_held_out": 2' in json.dumps(manifest)
    assert '"n_rows": 6' in json.dumps(manifest)


def test_a_local_model_gets_a_provider_for_dspys_own_finetuning(tiny_lm):
    lm = tiny_lm()
    assert not lm.provider.finetunable
    tuned = finetunable(lm)
    assert tuned.provider.finetunable
    assert tuned.engine is lm.engine
