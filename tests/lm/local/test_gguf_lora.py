"""LoRA adapters as GGUF files: with the base in GGUF they make the merged model; what does not fit is refused."""

from __future__ import annotations

import json
import shutil

import pytest

from copa_harness.cli import main
from copa_harness.errors import ConfigurationError
from copa_harness.lm.local.files import write_manifest
from copa_harness.lm.local.sources.gguf_lora import write_gguf_lora
from copa_harness.store.artifacts import save_artifact
from copa_harness.testing.tiny_models import write_tiny_model
from tests.lm.local.gguf_files import write_tiny_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=3)


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", folder)


def tuned(folder, target, **settings):
    """An adapter with random weights of a model in GGUF, and the folder of the model it is merged into."""
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    from copa_harness.lm.local.model import silence_peft

    with silence_peft():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
        model = peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        model.save_pretrained(target / "lora")
        merged = shutil.copytree(folder, target / "merged")
        state = model.merge_and_unload().state_dict()
        names = load_file(folder / "model.safetensors")  # tied weights stand once
        save_file({name: state[name].contiguous() for name in names}, merged / "model.safetensors")
    return target / "lora", merged


def signed(lora, base):
    write_manifest(lora, base_fingerprint="b", details={"base": base})
    return lora


def tensors(file):
    import gguf

    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_base_and_adapter_in_gguf_make_the_merged_model(settings, folder, base, tmp_path):
    import gguf
    import numpy as np

    lora, merged = tuned(folder, tmp_path, **settings)
    file = tmp_path / "adapter.gguf"
    write_gguf_lora(signed(lora, f"gguf:{base}"), file)
    fields = gguf.GGUFReader(file).fields
    assert [fields[name].contents() for name in ("general.type", "general.architecture", "adapter.type")] == [
        "adapter",
        "llama",
        "lora",
    ]
    parts, was, expected = tensors(file), tensors(base), tensors(write_tiny_gguf(tmp_path / "merged.gguf", merged))
    changed = [name for name in was if f"{name}.lora_a" in parts]
    assert len(parts) == 2 * len(changed) == 2 * 2 * 7
    for name in changed:
        scale = fields["adapter.lora.alpha"].contents() / len(parts[f"{name}.lora_a"])
        made = was[name] + scale * parts[f"{name}.lora_b"] @ parts[f"{name}.lora_a"]
        np.testing.assert_allclose(made, expected[name], atol=1e-5)


def test_an_adapter_of_another_model_or_of_another_kind_is_refused_and_nothing_is_written(folder, base, tmp_path):
    lora, _ = tuned(folder, tmp_path)
    file = tmp_path / "adapter.gguf"
    with pytest.raises(ConfigurationError, match=r"of 'hf:org/m', which is no GGUF file here; .*--base"):
        write_gguf_lora(signed(lora, "hf:org/m"), file)
    gemma = tmp_path / "gemma.gguf"
    gemma.write_bytes(base.read_bytes().replace(b"llama", b"gemma"))
    with pytest.raises(ConfigurationError, match="the architecture 'gemma'"):
        write_gguf_lora(lora, file, base=gemma)
    smaller = tmp_path / "smaller.gguf"
    smaller.write_bytes(base.read_bytes().replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))
    with pytest.raises(ConfigurationError, match=r"layers.1.mlp.up_proj.lora_A.*no weight it fits"):
        write_gguf_lora(lora, file, base=smaller)
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"q_proj": 2}}))
    with pytest.raises(ConfigurationError, match=r"rank_pattern.*one rank only"):
        write_gguf_lora(signed(lora, ""), file, base=base)
    assert {path.name for path in tmp_path.iterdir()} == {"lora", "merged", "gemma.gguf", "smaller.gguf"}


def test_the_command_exports_an_artifacts_adapter(folder, base, tmp_path, capsys):
    lora, _ = tuned(folder, tmp_path)
    given = {"program_state": {}, "manifest": {"task": "t"}}
    artifact = save_artifact(tmp_path / "a", lora_directory=signed(lora, f"gguf:{base}"), **given)
    assert main(["export", str(artifact), str(tmp_path / "x.gguf")]) == 0
    assert capsys.readouterr().out.startswith(f"written: {tmp_path / 'x.gguf'}, ")
    assert main(["export", str(artifact), str(tmp_path / "nowhere" / "x.gguf")]) == 2
    assert "cannot write" in capsys.readouterr().err
    plain = save_artifact(tmp_path / "b", lora_directory=None, **given)
    assert main(["export", str(plain), str(tmp_path / "y.gguf"), "--base", str(base)]) == 2
    assert "expected one with a LoRA adapter" in capsys.readouterr().err
