import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from copa_harness.errors import CopaError
from copa_harness.judge.intervals import mean_interval
from copa_harness.report import files
from copa_harness.report.files import gates_to_read, write_reports
from copa_harness.report.provenance import environment, git_commit, versions
from copa_harness.report.records import RunRecord, as_reported
from copa_harness.report.summary import verdict_counts
from copa_harness.results import EvaluationResult, ExampleResult, GateResult, Usage, Verdict

WRITTEN = ["0001.json", "comment.md", "latest.html", "latest.json"]


def record(**more):
    rows = (ExampleResult("a", 1.0), ExampleResult("b", 0.0))
    evaluation = EvaluationResult("test", "embedded", rows, mean_interval([1, 0]), Usage(paid_calls=2))
    arguments = {"test": "t::x", "task": "iris", "strategy": "none", "lm": "embedded", "split": "test"} | more
    return RunRecord.from_evaluation(evaluation, **arguments)


def test_a_report_is_a_page_a_comment_latest_json_and_a_numbered_copy(tmp_path):
    first = write_reports(tmp_path / "reports", [record()], environment={"seed": 0})
    second = write_reports(tmp_path / "reports", [record()])
    assert sorted(os.listdir(tmp_path / "reports")) == [*WRITTEN[:1], "0002.json", *WRITTEN[1:]]
    assert (first.numbered_json.name, second.numbered_json.name) == ("0001.json", "0002.json")
    assert second.latest_json.read_text() == second.numbered_json.read_text()


def test_the_json_has_the_agreed_schema(tmp_path):
    document = json.loads(write_reports(tmp_path, [record()]).latest_json.read_text())
    assert document["schema"] == 1
    assert document["runs"][0]["task"] == "iris"
    assert document["runs"][0]["usage"]["paid_calls"] == 2


def test_what_is_written_are_the_records_as_reported(tmp_path):
    written = [record(), record(strategy="w", artifact="artifacts/iris")]
    document = json.loads(write_reports(tmp_path, written).latest_json.read_text())
    assert document["runs"] == [as_reported(run) for run in written]


def test_an_absolute_artifact_becomes_relative_to_the_report(tmp_path):
    path = write_reports(tmp_path / "reports", [record(artifact=str(tmp_path / "artifacts" / "iris"))]).latest_json
    assert json.loads(path.read_text())["runs"][0]["artifact"] == "../artifacts/iris"


def test_a_number_that_is_taken_is_never_overwritten(tmp_path):
    (tmp_path / "0007.json").write_text("mine")
    assert write_reports(tmp_path, [record()]).numbered_json.name == "0008.json"
    assert (tmp_path / "0007.json").read_text() == "mine"


@pytest.mark.parametrize("links", [True, False])
def test_writers_at_the_same_time_get_a_number_each(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*_):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(files.os, "link", refuse)
    threads = [threading.Thread(target=write_reports, args=(tmp_path, [record(task=f"t{i}")])) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbered = sorted(p for p in tmp_path.iterdir() if p.name[:4].isdigit())
    assert [p.name for p in numbered] == [f"000{i}.json" for i in range(1, 9)]
    tasks = {json.loads(p.read_text())["runs"][0]["task"] for p in numbered}
    assert len(tasks) == 8
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_a_folder_that_cannot_be_written_is_one_error_with_a_remedy(tmp_path):
    (tmp_path / "reports").write_text("a file in the way")
    with pytest.raises(CopaError, match=r"could not be written.*--copa-report-dir") as refusal:
        write_reports(tmp_path / "reports", [record()])
    assert "\n" not in str(refusal.value)


def test_a_full_disk_is_one_error_and_the_earlier_report_is_intact(tmp_path, monkeypatch):
    before = write_reports(tmp_path, [record()]).latest_json.read_text()
    real = os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CopaError, match="No space left on device"):
        write_reports(tmp_path, [record(task="wine")])
    monkeypatch.setattr(os, "fsync", real)
    assert (tmp_path / "latest.json").read_text() == before
    assert sorted(os.listdir(tmp_path)) == WRITTEN


def test_a_report_without_runs_is_still_a_report(tmp_path):
    assert json.loads(write_reports(tmp_path, []).latest_json.read_text())["runs"] == []


def test_credentials_in_the_environment_are_masked(tmp_path):
    paths = write_reports(tmp_path, [], environment={"OPENAI_API_KEY": "abcdef", "seed": 1})
    for path in (paths.latest_json, paths.page, paths.comment):
        assert "abcdef" not in path.read_text()


def test_gates_that_passed_need_no_reading():
    passed = record(gates=(GateResult("a", Verdict.PASS, "fine"),))
    undecided = record(gates=(GateResult("b", Verdict.UNDECIDED, "too few"), GateResult("c", Verdict.PASS, "fine")))
    assert gates_to_read([passed]) == ""
    text = gates_to_read([passed, undecided], width=100)
    assert "iris, none  (t::x)" in text
    assert "b: too few" in text
    assert "fine" not in text
    assert verdict_counts([passed, undecided]) == "1 pass, 1 undecided"


def test_the_environment_names_versions_and_commit(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert git_commit(tmp_path) == ""
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    found = environment(root=tmp_path, seed=7)
    assert len(found["commit"]) == 40
    assert found["seed"] == 7
    assert found["versions"]["scipy"]
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path).endswith("+changes")


def test_a_package_that_is_not_installed_is_left_out():
    assert versions(["no-such-distribution-here"]) == {}


@pytest.mark.parametrize("room", ["judge", "store", "report"])
def test_importing_a_room_loads_nothing_heavy(room):
    program = (
        f"import copa_harness.{room}, sys; "
        "print([m for m in ('numpy', 'scipy', 'tabulate', 'dspy', 'torch', 'pytest') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.strip() == "[]"
