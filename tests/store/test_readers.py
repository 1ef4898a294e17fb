"""Readers of files: whatever stands in one, it is read, or one clear error or warning says why not."""

import json
import warnings
from dataclasses import replace

import pytest

from copa_harness.documents import hash_file, hash_json, parse_json
from copa_harness.errors import ArtifactError
from copa_harness.report.files import write_reports
from copa_harness.report.history import compare_reports, read_report, report_text
from copa_harness.store.artifacts import load_artifact, save_artifact
from copa_harness.store.baselines import diff_baselines, load_baseline, read_baseline, save_baseline
from copa_harness.store.stages import StageStore
from tests.cli.test_reports import FULL
from tests.store.test_baselines import baseline

HALF = "a\ud83dz"
"""Half of a character, as JSON can say it."""

WRONG = (None, True, -1, 10**400, 1e999, "x", "", HALF, [], [[]], {}, {"a": 1}, [1, "x"])

DEEP = "[" * 100_000


def mutants(document):
    """The document with each of its parts replaced by each of the wrong ones, or left out."""

    def places(value, path=()):
        if path:
            yield path
        for key in value if isinstance(value, dict) else range(min(2, len(value))) if isinstance(value, list) else ():
            yield from places(value[key], (*path, key))

    for path in places(document):
        for wrong in (*WRONG, "left out"):
            copy = json.loads(json.dumps(document))
            place = copy
            for key in path[:-1]:
                place = place[key]
            if wrong == "left out":
                del place[path[-1]]
            else:
                place[path[-1]] = wrong
            yield path, wrong, copy


def check_all(path, use):
    """Write every mutant to `path` and use it; the only error may be ours, and it can be printed."""
    text = path.read_text()
    n_refused = longest = 0
    for place, wrong, mutant in mutants(json.loads(text)):
        path.write_text(json.dumps(mutant).replace("Infinity", "1e999"))
        try:
            use()
        except ArtifactError as error:
            n_refused += 1
            longest = max(longest, len(str(error)))
        except Exception as error:
            raise AssertionError(f"{'.'.join(map(str, place))} = {str(wrong)[:20]!r}") from error
    for broken in (DEEP, '{"kind": ' + DEEP, '{"a": NaN}', "\x00", '"\\ud83d"'):
        path.write_text(broken)
        with pytest.raises(ArtifactError):
            use()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError):
        use()
    assert n_refused > 20
    assert longest < 2000


def test_a_baseline(tmp_path):
    path = save_baseline(tmp_path / "own", baseline(versions={"dspy": "3"}, repeats={"e000": [1.0, 1.0]}))
    other = baseline()

    def use():
        read = read_baseline(path)
        diff_baselines(other, read).text()
        save_baseline(tmp_path / "again", read)

    check_all(path, use)


def test_the_manifest_and_the_program_of_an_artifact(tmp_path):
    folder = save_artifact(
        tmp_path / "a", program_state={"p": {"demos": []}}, lora_directory=None, manifest={"task": "t", "n": [1]}
    )
    check_all(folder / "manifest.json", lambda: load_artifact(folder))
    for text in (DEEP, "[]", "NaN"):
        folder = tmp_path / str(len(text))
        save_artifact(folder, program_state={}, lora_directory=None, manifest={})
        (folder / "program.json").write_text(text)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["program.json"]["sha256"] = hash_file(folder / "program.json")
        manifest["fingerprint"] = hash_json({"program.json": manifest["files"]["program.json"]["sha256"]})
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ArtifactError, match=r"program.json holds no program's state"):
            load_artifact(folder)


def test_a_report(tmp_path):
    write_reports(tmp_path, [FULL], environment={"seed": 1, "commit": "c0ffee", "created": "2026"})
    other = read_report(tmp_path / "latest.json")

    def use():
        read = read_report(tmp_path / "0001.json")
        report_text(read).encode("utf-8", "backslashreplace")
        compare_reports(other, read)

    check_all(tmp_path / "0001.json", use)


def test_a_stage(tmp_path):
    store = StageStore(tmp_path)
    store.put("k", {"result": {"a": [1, {"b": None}]}})
    path = store.path("k")
    text = path.read_text()
    for _, _, mutant in mutants(json.loads(text)):
        path.write_text(json.dumps(mutant))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert StageStore(tmp_path).get("k") in (None, json.loads(text)["value"])
    deep = "[" * 900 + "]" * 900
    for broken in (DEEP, text.replace("null", deep), text.replace("null", "NaN")):
        path.write_text(broken)
        with pytest.warns(RuntimeWarning, match="ignored"):
            assert StageStore(tmp_path).get("k") is None


def test_half_a_character_is_kept_and_read_back(tmp_path):
    store = StageStore(tmp_path)
    store.put("k", {"demo": HALF})
    assert store.get("k") == {"demo": HALF}
    folder = save_artifact(tmp_path / "a", program_state={"demo": HALF}, lora_directory=None, manifest={"task": HALF})
    assert load_artifact(folder).program_state == {"demo": HALF}
    write_reports(tmp_path / "r", [replace(FULL, task=HALF)])
    assert read_report(tmp_path / "r" / "latest.json").runs[0].task == HALF
    assert "&lt;U+D83D&gt;" in (tmp_path / "r" / "latest.html").read_text()
    save_baseline(tmp_path / "b", baseline(task=HALF))
    assert load_baseline(tmp_path / "b", task=HALF, name="p -> w -> p").task == HALF


def test_json_that_is_none_is_refused():
    for text in (DEEP, "NaN", "[Infinity]", "", b"\xff", "{"):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)
