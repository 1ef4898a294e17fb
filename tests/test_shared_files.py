"""Folders that machines share: whole or absent, never outside their place, and never the end of a run."""

import json

import fsspec
import pytest

from copa_harness.errors import ConfigurationError
from copa_harness.shared_files import SharedFiles


@pytest.fixture(params=["folder", "file", "memory"])
def url(request, tmp_path):
    return {"folder": str(tmp_path / "s"), "file": f"file://{tmp_path}/s", "memory": f"memory://{tmp_path.name}"}[
        request.param
    ]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "made"
    (folder / "lora").mkdir(parents=True)
    (folder / "manifest.json").write_text('{"files": {"lora/weights": {}}}')
    (folder / "lora" / "weights").write_bytes(b"\x00\xff" * 1000)
    return folder


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_put_is_got_by_another_machine(url, folder, tmp_path):
    files, there = SharedFiles(url), tmp_path / "there" / "x"
    assert not files.get("a/x", there)
    files.put("a/x", folder)
    assert SharedFiles(url).get("a/x", there)
    assert content(there) == content(folder)
    assert not files.get("a", tmp_path / "a")


def test_a_folder_in_the_way_is_replaced_and_one_that_is_kept_already_stays(url, folder, tmp_path):
    files, there = SharedFiles(url), tmp_path / "there"
    there.mkdir()
    (there / "damaged").write_text("x")
    files.put("x", folder)
    (folder / "lora" / "weights").write_bytes(b"other")
    files.put("x", folder)
    assert files.get("x", there)
    assert content(there) == content(folder) | {"lora/weights": b"\x00\xff" * 1000}


def test_what_was_added_to_a_folder_replaces_it_and_who_reads_meanwhile_has_the_old_one_whole(url, folder, tmp_path):
    files, there = SharedFiles(url), tmp_path / "there"
    files.put("x", folder)
    before = content(folder)
    (folder / "scored").write_text("more")
    files._files.put_file(str(folder / "scored"), f"{files._root}/x/scored")  # the manifest comes last
    assert files.get("x", there)
    assert content(there) == before
    (folder / "manifest.json").write_text('{"files": {"lora/weights": {}, "scored": {}}}')
    files.put("x", folder, anew=True)
    assert files.get("x", there)
    assert content(there) == content(folder)


def test_a_folder_whose_manifest_is_not_there_yet_is_absent(url, folder, tmp_path):
    files = SharedFiles(url)
    (folder / "manifest.json").unlink()
    files.put("x", folder)
    assert not files.get("x", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_place_that_cannot_be_used_is_one_warning_and_ends_nothing(folder, tmp_path):
    (tmp_path / "s").write_text("a file")
    files = SharedFiles(str(tmp_path / "s"))
    with pytest.warns(RuntimeWarning, match="could not be kept"):
        files.put("x", folder)
    files.put("y", folder)
    assert not files.get("x", tmp_path / "there")


@pytest.mark.parametrize("planted", ["../../planted", "/tmp/planted", "a\\..\\planted"])
def test_nothing_is_written_outside_the_folder(planted, folder, tmp_path):
    files, memory = SharedFiles(f"memory://{tmp_path.name}"), fsspec.filesystem("memory")
    files.put("x", folder)
    memory.store[f"/{tmp_path.name}/x/../../planted"] = memory.store[f"/{tmp_path.name}/x/manifest.json"]
    memory.pipe(f"/{tmp_path.name}/x/manifest.json", json.dumps({"files": {planted: {}}}).encode())
    with pytest.warns(RuntimeWarning, match="leads out"):
        assert not files.get("x", tmp_path / "deep" / "there")
    assert not (tmp_path / "planted").exists()
    assert content(tmp_path / "deep") == {}


def test_an_unknown_kind_of_place_is_refused():
    with pytest.raises(ConfigurationError, match="--copa-shared-files=nowhere://x"):
        SharedFiles("nowhere://x")
