"""The runs of a session in a real local MLflow, and what is said where it takes none."""

import subprocess
import sys
from dataclasses import replace

import pytest

from copa_harness.report.mlflow_tracking import track
from copa_harness.results import Usage
from tests.report.test_tables import run

pytest.importorskip("mlflow")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file:{tmp_path / 'mlruns'}"


def logged(store, task):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store)
    return client, client.search_runs([client.get_experiment_by_name(task).experiment_id], order_by=["start_time ASC"])


def test_a_run_has_its_parameters_scores_with_intervals_costs_and_the_artifact(store, tmp_path):
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    (artifact / "program.json").write_text("{}")
    made = replace(run("p", 57), seed=3, artifact=str(artifact), source="rows.csv", usage=Usage(paid_calls=9, usd=0.25))
    assert track([run("none", 24), made], uri=store, commit="abc") == ""
    client, found = logged(store, made.task)
    last = next(one for one in found if one.info.run_name == "p")
    assert len(found) == 2
    assert last.info.status == "FINISHED"
    assert (last.data.params["strategy"], last.data.params["seed"], last.data.params["rows"]) == ("p", "3", "rows.csv")
    assert last.data.metrics["score"] == made.score
    assert (last.data.metrics["score_low"], last.data.metrics["score_high"]) == (made.interval.low, made.interval.high)
    assert (last.data.metrics["calls"], last.data.metrics["usd"]) == (9, 0.25)
    assert (last.data.tags["verdict"], last.data.tags["mlflow.source.git.commit"]) == ("pass", "abc")
    assert [one.path for one in client.list_artifacts(last.info.run_id, "artifact")] == ["artifact/program.json"]


def test_a_store_that_takes_nothing_is_said_and_nothing_is_lost(tmp_path):
    (tmp_path / "file").write_text("")
    said = track([run("none", 24)], uri=f"file:{tmp_path / 'file'}")
    assert said.startswith("MLflow at file:")
    assert "did not take the runs" in said


SUITE = """
import dspy, pytest
from copa_harness import ScriptedLM, Task

@pytest.fixture(scope="module")
def copa_task():
    rows = [dspy.Example(word=str(i), loud=str(i)).with_inputs("word") for i in range(30)]
    same = lambda example, prediction, trace=None: prediction.loud == example.loud
    return Task("shout", dspy.Predict("word -> loud"), same, rows[:10], rows[10:20], rows[20:])

@pytest.fixture
def copa_base_lm(copa_session):
    return ScriptedLM({"word": {"loud": "21"}}, fingerprint="x", gateway=copa_session.models.gateway)

@pytest.mark.copa(strategy="none")
def test_it(copa_run):
    assert copa_run.score == 0.1
"""


def pytest_in(folder, *arguments, before=""):
    (folder / "test_suite.py").write_text(SUITE)
    (folder / "conftest.py").write_text(before)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_suite_logs_its_runs(store, tmp_path):
    done = pytest_in(tmp_path, f"--copa-mlflow={store}")
    assert done.returncode == 0, done.stdout + done.stderr
    _, (found,) = logged(store, "shout")
    assert found.data.metrics["score"] == 0.1
    assert found.data.tags["test"] == "test_suite.py::test_it"


def test_without_mlflow_the_option_says_what_to_install_before_anything_runs(tmp_path):
    hidden = "import importlib.util as u; find = u.find_spec; "
    hidden += "u.find_spec = lambda name, package=None: None if name == 'mlflow' else find(name, package)"
    done = pytest_in(tmp_path, "--copa-mlflow=file:x", before=hidden)
    assert done.returncode == 4
    assert done.stderr.count("pip install 'copa-harness[mlflow]'") == 1
