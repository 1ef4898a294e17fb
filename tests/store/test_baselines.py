import json

import pytest

from copa_harness.errors import ArtifactError
from copa_harness.judge.gates import judge, overall
from copa_harness.judge.intervals import mean_interval
from copa_harness.judge.options import Gates
from copa_harness.judge.paired_gates import JudgedRun
from copa_harness.results import EvaluationResult, ExampleResult, Verdict
from copa_harness.store.baselines import Baseline, baseline_path, load_baseline, save_baseline


def evaluation(scores, *, split="test"):
    rows = tuple(
        ExampleResult(f"e{i:03}", s, "provider_error" if s is None else "ok", {"secret_text": "never on disk"})
        for i, s in enumerate(scores)
    )
    return EvaluationResult(split, "embedded", rows, mean_interval([s for s in scores if s is not None]))


def baseline(scores=(1.0, 0.0, 0.5), **more):
    arguments = {
        "task": "iris",
        "name": "p -> w -> p",
        "fingerprints": {"data": "d", "split": "test", "metric": "m"},
    } | more
    return Baseline.from_evaluation(evaluation(scores), **arguments)


def test_what_was_saved_is_loaded(tmp_path):
    accepted = baseline(versions={"dspy": "3.4.1"}, commit="0123456789abcdef", created="2026-01-02")
    path = save_baseline(tmp_path, accepted)
    loaded = load_baseline(tmp_path, task="iris", name="p -> w -> p")
    assert path == baseline_path(tmp_path, task="iris", name="p -> w -> p")
    assert loaded is not None
    assert loaded.scores == accepted.scores
    assert loaded.origin == "2026-01-02, commit 0123456789"
    assert (loaded.fingerprints, loaded.versions) == (accepted.fingerprints, {"dspy": "3.4.1"})


def test_a_baseline_serves_the_regression_gate(tmp_path):
    save_baseline(tmp_path, baseline([1.0] * 60))
    accepted = load_baseline(tmp_path, task="iris", name="p -> w -> p")
    gates = Gates(max_regression=0.05)
    assert overall(judge(JudgedRun(evaluation([0.0] * 60), baseline=accepted), gates)) is Verdict.FAIL
    assert overall(judge(JudgedRun(evaluation([1.0] * 60), baseline=accepted), gates)) is Verdict.PASS


def test_a_diff_shows_only_the_examples_that_changed(tmp_path):
    one = save_baseline(tmp_path / "a", baseline((1.0, 0.0, 0.5), commit="c")).read_text().splitlines()
    two = save_baseline(tmp_path / "b", baseline((1.0, 1.0, 0.5), commit="c")).read_text().splitlines()
    changed = [line for line in two if line not in one]
    assert any('{"id": "e001", "score": 1.0}' in line for line in changed)
    assert all("e000" not in line and "e002" not in line for line in changed)


def test_inputs_and_answers_are_not_kept(tmp_path):
    assert "never on disk" not in save_baseline(tmp_path, baseline()).read_text()


def test_no_baseline_is_none_and_creates_nothing(tmp_path):
    assert load_baseline(tmp_path / "baselines", task="iris", name="p") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scores", [[], [1.0, None]])
def test_an_evaluation_with_failures_is_not_accepted(scores):
    with pytest.raises(ArtifactError, match="not accepted as baseline"):
        baseline(scores)


def edit(path, **changes):
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 99},
        {"kind": "x"},
        {"n": 7},
        {"examples": [{"id": "a"}]},
        {"examples": 3},
        {"interval": {}},
        {"examples": [{"id": "a", "score": 7}], "n": 1},
        {"examples": [{"id": "a", "score": 1}, {"id": "a", "score": 0}], "n": 2},
        {"examples": [{"id": "a", "score": 1, "outcome": "lucky"}], "n": 1},
        {"examples": [{"id": "a", "score": "1"}], "n": 1},
        {"examples": [{"id": "a", "score": True}], "n": 1},
        {"examples": [{"id": "a", "score": 10**400}], "n": 1},
        {"examples": [{"id": 1, "score": 1}], "n": 1},
        {"examples": [{"id": "a", "score": 1, "repeats": [1, 7]}], "n": 1},
        {"examples": [{"id": "a", "score": 1, "repeats": 1}], "n": 1},
        {"interval": {"low": 0.9, "high": 0.1, "level": 0.95, "method": "wilson"}},
        {"interval": {"low": None, "high": 1.0, "level": 0.95, "method": "wilson"}},
        {"interval": {"low": 0.1, "high": 0.9, "level": 95, "method": "wilson"}},
        {"score": 7},
        {"fingerprints": {}},
        {"fingerprints": {"data": "d", "split": "test", "metric": ""}},
    ],
)
def test_a_damaged_baseline_is_an_error_and_not_a_missing_one(tmp_path, changes):
    edit(save_baseline(tmp_path, baseline()), **changes)
    with pytest.raises(ArtifactError, match=r"git checkout.*--copa-bless"):
        load_baseline(tmp_path, task="iris", name="p -> w -> p")


def test_a_baseline_with_merge_conflict_markers_is_an_error(tmp_path):
    path = save_baseline(tmp_path, baseline())
    path.write_text("<<<<<<< HEAD\n" + path.read_text())
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_baseline(tmp_path, task="iris", name="p -> w -> p")


def test_names_that_look_alike_do_not_share_a_file(tmp_path):
    names = ["p -> w -> p", "p w p", "P -> W -> P", "p-w-p", "../p", "", "p/w"]
    paths = {baseline_path(tmp_path, task="iris", name=name) for name in names}
    assert all(path.parent == tmp_path / "iris" for path in paths)
    assert len(paths) >= len(names) - 1  # "p -> w -> p" and "p-w-p" may meet: one is the other's file name
    assert baseline_path(tmp_path, task="iris", name="p -> w -> p").name == "p-w-p.json"


def test_a_file_of_another_run_is_not_taken_for_this_one(tmp_path):
    save_baseline(tmp_path, baseline(name="p -> w -> p"))
    with pytest.raises(ArtifactError, match="is the baseline of iris"):
        load_baseline(tmp_path, task="iris", name="p-w-p")


def test_a_graded_score_survives_exactly(tmp_path):
    save_baseline(tmp_path, baseline([0.1 + 0.2, 1 / 3]))
    loaded = load_baseline(tmp_path, task="iris", name="p -> w -> p")
    assert loaded is not None
    assert list(loaded.scores.values()) == [0.1 + 0.2, 1 / 3]


def test_accepting_the_same_results_again_leaves_nothing_to_review(tmp_path):
    path = save_baseline(tmp_path, baseline(commit="a" * 40, created="2026-01-02"))
    first = path.read_text(encoding="utf-8")
    save_baseline(tmp_path, baseline(commit="b" * 40, created="2026-01-03"))
    assert path.read_text(encoding="utf-8") == first
    save_baseline(tmp_path, baseline((1.0, 1.0, 0.5), commit="b" * 40, created="2026-01-03"))
    assert '"created": "2026-01-03"' in path.read_text(encoding="utf-8")
