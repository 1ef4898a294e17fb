"""LoRA folders: read back as written, refused when damaged."""

from __future__ import annotations

import json

import pytest

from copa_harness.errors import ArtifactError
from copa_harness.lm.local.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    find_lora,
    model_name,
    read_lora,
    split_model_name,
    write_manifest,
)


@pytest.fixture
def lora_folder(tmp_path):
    folder = tmp_path / "loras" / "one"
    folder.mkdir(parents=True)
    (folder / WEIGHTS_FILE).write_bytes(b"weights")
    (folder / CONFIG_FILE).write_text("{}")
    write_manifest(folder, base_fingerprint="base", details={"train_steps": 3})
    return folder


def test_a_lora_directory_reads_back_as_written(lora_folder):
    files = read_lora(lora_folder)
    assert files.base_fingerprint == "base"
    assert files.details["train_steps"] == 3
    assert find_lora(lora_folder.parent, files.fingerprint[:12]) == lora_folder
    assert find_lora(lora_folder.parent, "0" * 12) is None
    assert split_model_name(model_name("hf:a@b", files.fingerprint)) == ("hf:a@b", files.fingerprint[:12])


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CONFIG_FILE])
def test_a_damaged_lora_is_an_artifact_error_with_a_remedy(name, lora_folder):
    read_lora(lora_folder)
    (lora_folder / name).write_bytes(b"broken!")
    with pytest.raises(ArtifactError, match=r"damaged.*remedy: delete"):
        read_lora(lora_folder)


def test_a_lora_without_manifest_or_with_a_forged_one_is_refused(lora_folder):
    path = lora_folder / "manifest.json"
    forged = {**json.loads(path.read_text()), "fingerprint": "f" * 64}
    path.write_text(json.dumps(forged))
    with pytest.raises(ArtifactError, match="does not match itself"):
        read_lora(lora_folder)
    path.unlink()
    with pytest.raises(ArtifactError, match="manifest"):
        read_lora(lora_folder)
