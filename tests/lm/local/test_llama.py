"""The forward of our own: which models it computes, what it says of others, and that it gives transformers' logits."""

from __future__ import annotations

import json
import random

import pytest

from copa_harness.lm.embedded import embedded_model_path
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.local.llama import library_shape, read_shape
from copa_harness.lm.local.model import LocalModel
from copa_harness.testing.tiny_models import write_tiny_model


def tiny(folder, architecture="llama", **settings):
    """A tiny model with settings written into its config.json."""
    write_tiny_model(folder, architecture=architecture)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


def loaded(folder, **given):
    return LocalModel(folder, **{"device": "cpu", "dtype": "float32", **given})


def largest_difference(model, *, n_prefix=20, lengths=(3, 9, 6), seed=5):
    """Of the logits of rows that share a prefix, by our own forward, to those of each row alone by the library's."""
    import torch

    from copa_harness.lm.local.decoding import Row, next_logits

    draw = random.Random(seed)
    prefix, *tails = [[draw.randrange(10, 380) for _ in range(n)] for n in (n_prefix, *lengths)]
    with torch.inference_mode():
        states = (model.decoder.prefill(prefix),)
        rows = [Row(tail, shared=states, n_shared=n_prefix) for tail in tails[:-1]] + [Row(tails[-1])]
        together = next_logits(model.decoder, rows, device=model.device, pad_id=model.pad_id)
        prompts = [prefix + tail for tail in tails[:-1]] + [tails[-1]]
        alone = torch.stack([model.model(torch.tensor([ids])).logits[0, -1] for ids in prompts])
    return float((together - alone).abs().max() / alone.abs().max())


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"_model_name_or_path": "somewhere/model", "is_llama_config": True, "rope_interleaved": False}),
        ("llama", {"transformers.js_config": {"dtype": "q4"}, "torch_dtype": "bfloat16"}),
        ("qwen2", {"_name_or_path": "/home/somebody/model", "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {"use_flash_attn": True, "auto_map": {}}),
    ],
)
def test_what_shapes_nothing_in_transformers_does_not_keep_a_model_from_our_own_forward(
    architecture, settings, tmp_path
):
    model = loaded(tiny(tmp_path / "m", architecture, **settings))
    assert model.decoder is not None, model.why_library
    assert largest_difference(model) < 1e-5
    assert model.describe().endswith(", own forward")


ROTARIES = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
]


@pytest.mark.parametrize("rope", ROTARIES, ids=lambda rope: rope["rope_type"])
def test_scaled_rotary_positions_are_computed(rope, tmp_path):
    folder = tiny(tmp_path / "m", "llama", rope_parameters={"rope_theta": 10000.0, **rope})
    plain = loaded(tiny(tmp_path / "plain"))
    model = loaded(folder)
    assert model.decoder is not None, model.why_library
    assert model.decoder.shape.layers != plain.decoder.shape.layers
    assert largest_difference(model, n_prefix=90) < 1e-5


def test_an_old_spelling_of_scaled_rotary_positions_is_understood_as_transformers_does(tmp_path):
    folder = tiny(tmp_path / "m", "llama", rope_scaling=ROTARIES[1], rope_theta=500000.0)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    model = loaded(folder)
    assert model.decoder is not None, model.why_library
    assert largest_difference(model, n_prefix=90) < 1e-5


def test_mistral_without_a_window_and_gemma_without_windows_are_computed(tmp_path):
    for architecture, settings in (
        ("mistral", {"sliding_window": None}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 2}),
    ):
        model = loaded(tiny(tmp_path / architecture, architecture, **settings))
        assert model.decoder is not None, model.why_library
        assert largest_difference(model) < 1e-5


def test_biases_are_computed(tmp_path):
    import torch
    import transformers

    folder = tiny(tmp_path / "m", "llama", attention_bias=True, mlp_bias=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.5, generator=draw)
    model.save_pretrained(folder)
    found = loaded(folder)
    assert found.decoder is not None, found.why_library
    assert largest_difference(found) < 1e-5


def test_weights_in_several_files_are_computed(tmp_path):
    import transformers

    folder = tiny(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert loaded(folder).decoder is not None


@pytest.mark.parametrize(
    ("architecture", "settings", "why"),
    [
        ("llama", {"hidden_act": "relu"}, "the activation 'relu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "share a batch"),
        ("gemma3_text", {"attn_logit_softcapping": 30.0, "layer_types": ["full_attention"] * 2}, "softcapping=30.0"),
        ("gpt2", {}, "GPT2LMHeadModel is not among LlamaForCausalLM"),
    ],
)
def test_another_model_goes_through_transformers_and_the_description_says_why(architecture, settings, why, tmp_path):
    model = loaded(tiny(tmp_path / "m", architecture, **settings))
    assert model.decoder is None
    assert "transformers' forward (" in model.describe()
    assert why in model.describe()


def test_arithmetic_that_is_not_ours_is_named(tmp_path):
    assert "(the own one is for float32 on CPUs)" in loaded(tiny(tmp_path / "m"), dtype="bfloat16").describe()


def test_a_forward_that_differs_from_transformers_is_not_used(tmp_path, monkeypatch):
    from copa_harness.lm.local import llama

    monkeypatch.setattr(llama, "_ACTIVATIONS", {"silu": "gelu_tanh"})
    model = loaded(tiny(tmp_path / "m"))
    assert model.decoder is None
    assert "other logits" in model.describe()


def test_weights_that_are_not_known_are_not_left_out_in_silence(tmp_path, monkeypatch):
    import torch

    model = loaded(tiny(tmp_path / "m")).model
    model.model.layers[1].register_parameter("gate", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(Exception, match=r"not known here: model\.layers\.1\.gate"):
        library_shape(model)


def test_the_shipped_models_shape_is_what_transformers_says_of_it():
    import transformers

    folder = embedded_model_path()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert read_shape(folder) == library_shape(model)


def test_the_engines_line_says_which_forward_answered(tmp_path):
    from dspy.lm15 import Config, Message, Request

    engine = TransformersEngine(tiny(tmp_path / "m"), name="hf:tiny", lora_dir=tmp_path)
    engine.complete(Request(model="hf:tiny", messages=(Message.user("a"),), config=Config(max_tokens=1)), seed=0)
    assert "own forward, cascade" in engine.description
