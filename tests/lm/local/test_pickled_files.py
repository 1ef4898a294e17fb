"""Pickled weights: refused; for a user who insists read once and restrictedly, and from then on safetensors."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from dspy.lm15 import Config, Message, Request
from safetensors.torch import load_file

from copa_harness.errors import ConfigurationError
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local import files as local_files
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.local.sources.source import ModelSource
from copa_harness.testing.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=21)


@pytest.fixture
def pickled(folder, tmp_path):
    """The same model with its weights as a pickle."""
    copy = tmp_path / "old" / "tiny"
    shutil.copytree(folder, copy)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    return copy


class Malicious:
    """A pickle that runs a command when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def build(folder, cache, **given):
    return build_lm(f"hf:{folder}", gateway=Gateway(cache=None), cache_dir=cache, max_tokens=6, **given)


def test_without_insisting_they_are_refused_and_the_error_names_both_ways_out(pickled, tmp_path):
    with pytest.raises(ConfigurationError, match=r"save_pretrained\(folder\).*--copa-allow-pickled-weights"):
        build(pickled, tmp_path / "cache")("zebra")
    assert not (tmp_path / "cache" / "safetensors").exists()


def test_one_who_insists_gets_the_same_answers_from_a_copy_in_safetensors(folder, pickled, tmp_path):
    lm = build(pickled, tmp_path / "cache", allow_pickled_weights=True)
    assert lm("zebra") == build(folder, tmp_path / "other")("zebra")
    copy = lm.engine.directory
    assert copy.parent == tmp_path / "cache" / "safetensors"
    assert (copy / "tokenizer.json").read_bytes() == (pickled / "tokenizer.json").read_bytes()
    assert not list(copy.glob("*.bin"))
    assert [path.name for path in copy.parent.iterdir() if path.name.endswith(".partial")] == []


def test_the_pickle_is_read_once_and_another_one_at_its_place_anew(pickled, tmp_path, monkeypatch):
    reads = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **given: reads.append(given) or real(*args, **given))
    first = ModelSource(pickled, keep_in=tmp_path / "kept", allows_pickled=True).directory()
    assert ModelSource(pickled, keep_in=tmp_path / "kept", allows_pickled=True).directory() == first
    assert [given["weights_only"] for given in reads] == [True]
    changed = {name: tensor + 1 for name, tensor in load_file(first / "model.safetensors").items()}
    torch.save(changed, pickled / "pytorch_model.bin")
    assert ModelSource(pickled, keep_in=tmp_path / "kept", allows_pickled=True).directory() != first


def test_a_pickle_that_holds_more_than_tensors_is_refused_and_runs_nothing(pickled, tmp_path):
    mark = tmp_path / "it-ran"
    weights = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, "surprise": Malicious(mark)}, pickled / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match=r"hold more than tensors .*it names .*system") as first:
        build(pickled, tmp_path / "cache", allow_pickled_weights=True)("zebra")
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(mark), protocol=2))
    with pytest.raises(ConfigurationError, match=r"more than tensors|could not load the pickled weights") as second:
        build(pickled, tmp_path / "cache", allow_pickled_weights=True)("zebra")
    assert "weights_only" not in str(first.value) + str(second.value)  # torch's advice to read it unrestricted
    assert not mark.exists()
    assert [path for path in (tmp_path / "cache" / "safetensors").iterdir() if path.is_dir()] == []


def test_safetensors_are_preferred_and_no_copy_is_made(folder, tmp_path):
    assert ModelSource(folder, keep_in=tmp_path / "kept", allows_pickled=True).directory() == folder.resolve()
    assert not (tmp_path / "kept").exists()


def test_only_a_model_whose_weights_are_here_can_be_insisted_on(tmp_path):
    with pytest.raises(ConfigurationError, match="got allow_pickled_weights=True for 'openai/gpt-4o'"):
        build_lm("openai/gpt-4o", gateway=Gateway(cache=None), cache_dir=tmp_path, allow_pickled_weights=True)


def test_pickles_of_the_hub_are_fetched_only_when_there_is_nothing_else_and_somebody_insists(
    folder, pickled, tmp_path, monkeypatch
):
    import huggingface_hub

    asked = []

    def snapshot_download(spec, *, allow_patterns, local_files_only=False):
        asked.append((local_files_only, "pytorch_model*.bin" in allow_patterns))
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hub = pickled
    assert ModelSource("org/old").directory() == pickled
    assert not any(with_pickles for _, with_pickles in asked)
    copy = ModelSource("org/old", keep_in=tmp_path / "kept", allows_pickled=True).directory()
    assert copy.parent == tmp_path / "kept"
    hub, asked = folder, []
    assert ModelSource("org/new", keep_in=tmp_path / "kept", allows_pickled=True).directory() == folder
    assert asked == [(True, False)]


def test_a_download_that_broke_off_goes_on_instead_of_being_taken_for_the_model(folder, tmp_path, monkeypatch):
    import huggingface_hub

    broken = tmp_path / "broken"
    broken.mkdir()
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    (broken / "m-1.safetensors").touch()
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda spec, *, allow_patterns, local_files_only=False: str(broken if local_files_only else folder),
    )
    assert ModelSource("org/model").directory() == folder


def test_a_copy_answers_under_its_own_fingerprint(pickled, tmp_path):
    engine = TransformersEngine(
        ModelSource(pickled, keep_in=tmp_path / "kept", allows_pickled=True), name="hf:tiny", lora_dir=tmp_path
    )
    assert engine.fingerprint("hf:tiny") == local_files.base_fingerprint(engine.directory, dtype="float32")
    request = Request(model="hf:tiny", messages=(Message.user("zebra"),), config=Config(max_tokens=2))
    assert engine.complete(request, seed=0).usage.output_tokens > 0
    assert isinstance(engine.directory, Path)
