import json

import pytest

from copa_harness.errors import ArtifactError
from copa_harness.store.artifacts import load_artifact, save_artifact

STATE = {
    "predict": {
        "demos": [{"petal": 1.2, "token": "abcd1234efgh5678"}],
        "signature": {"instructions": "Answer."},
        "lm": {"model": "openai/x", "api_key": "abcd1234efgh5678"},
    }
}


@pytest.fixture
def lora(tmp_path):
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 64)
    (folder / "adapter_config.json").write_text('{"r": 16}')
    (folder / ".lock").write_text("")
    return folder


def saved(tmp_path, **more):
    arguments = {"program_state": STATE, "lora_directory": None, "manifest": {"task": "iris", "score": 0.9}} | more
    return save_artifact(tmp_path / "artifacts" / "iris", **arguments)


def test_what_was_saved_is_loaded_and_verified(tmp_path, lora):
    artifact = load_artifact(saved(tmp_path, lora_directory=lora))
    assert artifact.manifest == {"task": "iris", "score": 0.9}
    assert artifact.program_state["predict"]["demos"] == STATE["predict"]["demos"]
    assert artifact.lora_directory == tmp_path / "artifacts" / "iris" / "lora"
    assert sorted(p.name for p in artifact.lora_directory.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [p.name for p in (tmp_path / "artifacts").iterdir()] == ["iris"]


def test_an_artifact_can_be_named_by_its_manifest(tmp_path):
    assert load_artifact(saved(tmp_path) / "manifest.json").lora_directory is None


def test_no_model_settings_and_no_credential_reach_the_disk(tmp_path):
    path = saved(tmp_path, manifest={"lm": "embedded", "headers": {"Authorization": "Bearer xyz"}, "input_tokens": 5})
    text = (path / "program.json").read_text() + (path / "manifest.json").read_text()
    assert "openai/x" not in text
    assert "Bearer xyz" not in text
    assert load_artifact(path).manifest == {"lm": "embedded", "headers": {"Authorization": "***"}, "input_tokens": 5}


def test_a_credential_among_the_programs_settings_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="predict > config > api_key looks like a credential"):
        saved(tmp_path, program_state={"predict": {"config": {"api_key": "k"}}})
    assert list((tmp_path / "artifacts").iterdir()) == [] if (tmp_path / "artifacts").exists() else True


@pytest.mark.parametrize("victim", ["program.json", "lora/adapter_model.safetensors"])
def test_a_changed_or_missing_file_is_named_with_a_remedy(tmp_path, lora, victim):
    path = saved(tmp_path, lora_directory=lora)
    file = path / victim
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(ArtifactError, match=rf"{victim} was changed.*run the suite again"):
        load_artifact(path)
    file.unlink()
    with pytest.raises(ArtifactError, match=rf"{victim} is missing"):
        load_artifact(path)


@pytest.mark.parametrize("name", ["extra.bin", ".hidden.json", "lora/.hidden/model.bin"])
def test_a_file_nobody_wrote_is_refused(tmp_path, name):
    path = saved(tmp_path)
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(b"x")
    with pytest.raises(ArtifactError, match=rf"{name} not in its manifest"):
        load_artifact(path)


@pytest.mark.parametrize("name", ["program.json", "manifest.json", "lora", "lora/adapter_config.json", "more"])
def test_a_link_is_not_followed_whatever_it_leads_to(tmp_path, lora, name):
    path = saved(tmp_path, lora_directory=lora)
    elsewhere = tmp_path / "elsewhere"
    if (path / name).exists():
        (path / name).rename(elsewhere)
    else:
        elsewhere.mkdir()
    (path / name).symlink_to(elsewhere)
    with pytest.raises(ArtifactError, match=rf"{name}: got a link"):
        load_artifact(path)


def test_an_artifact_may_be_named_by_a_link(tmp_path):
    (tmp_path / "mine").symlink_to(saved(tmp_path))
    assert load_artifact(tmp_path / "mine").manifest["task"] == "iris"


def test_a_manifest_that_was_edited_is_refused(tmp_path):
    path = saved(tmp_path)
    document = json.loads((path / "manifest.json").read_text())
    document["files"] = {}
    (path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"manifest\.json was changed"):
        load_artifact(path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "..\\x"])
def test_a_manifest_cannot_lead_outside_the_folder(tmp_path, name):
    path = saved(tmp_path)
    document = json.loads((path / "manifest.json").read_text())
    document["files"][name] = {"sha256": "0", "bytes": 1}
    (path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="outside the folder"):
        load_artifact(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"kind": "copa_harness artifact", "schema": 99}',
        '{"kind": "copa_harness artifact", "schema": 1}',
    ],
)
def test_a_broken_manifest_is_an_artifact_error_with_a_remedy(tmp_path, text):
    path = saved(tmp_path)
    (path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="Next:"):
        load_artifact(path)


def test_no_artifact_at_all_is_said_plainly(tmp_path):
    with pytest.raises(ArtifactError, match="no artifact at"):
        load_artifact(tmp_path / "nowhere")


def test_pickles_among_the_weights_are_refused_and_nothing_is_left(tmp_path, lora):
    (lora / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="may hold a pickle"):
        saved(tmp_path, lora_directory=lora)
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_weights_without_safetensors_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="safetensors"):
        saved(tmp_path, lora_directory=tmp_path / "empty")
    with pytest.raises(ArtifactError, match="no LoRA adapter at"):
        saved(tmp_path, lora_directory=tmp_path / "missing")


def test_an_older_artifact_is_replaced_and_an_equal_one_left_alone(tmp_path):
    path = saved(tmp_path)
    before = (path / "manifest.json").stat().st_mtime_ns
    saved(tmp_path)
    assert (path / "manifest.json").stat().st_mtime_ns == before
    saved(tmp_path, manifest={"score": 0.95})
    assert load_artifact(path).manifest == {"score": 0.95}
    assert [p.name for p in path.parent.iterdir()] == ["iris"]


def test_a_damaged_artifact_is_replaced(tmp_path):
    path = saved(tmp_path)
    (path / "program.json").write_text("{}")
    saved(tmp_path)
    assert load_artifact(path).program_state["predict"]["lm"] is None


def test_a_folder_with_something_else_in_it_is_never_touched(tmp_path):
    target = tmp_path / "artifacts" / "iris"
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="not overwritten"):
        saved(tmp_path)
    assert (target / "thesis.txt").read_text() == "years of work"


def test_the_fingerprint_is_of_the_content_not_of_the_notes(tmp_path):
    one = load_artifact(saved(tmp_path)).fingerprint
    two = load_artifact(saved(tmp_path, manifest={"note": "other"})).fingerprint
    three = load_artifact(saved(tmp_path, program_state={"predict": {}})).fingerprint
    assert one == two
    assert one != three


def test_a_state_without_json_form_is_refused(tmp_path):
    with pytest.raises(TypeError, match="no JSON form"):
        saved(tmp_path, program_state={"x": object()})
