"""The anchor that re-blessing does not move, and the ledger of looks."""

import json
from dataclasses import replace

import pytest

from copa_harness.errors import ArtifactError
from copa_harness.judge.intervals import mean_interval
from copa_harness.judge.paired_gates import JudgedRun, max_regression
from copa_harness.results import EvaluationResult, ExampleResult, Verdict
from copa_harness.store.baselines import Baseline
from copa_harness.store.history import load_anchor, note_accepted

FINGERPRINTS = {"data": "d", "split": "test", "metric": "m"}
IDS = [f"e{i:03}" for i in range(200)]


def evaluated(scores):
    rows = tuple(ExampleResult(key, float(score)) for key, score in zip(IDS, scores, strict=True))
    return EvaluationResult("test", "lm", rows, mean_interval([row.score for row in rows]))


def accepted(scores, commit="c0"):
    more = {"task": "iris", "name": "p", "fingerprints": FINGERPRINTS, "commit": commit, "created": "2026-01-02"}
    return Baseline.from_evaluation(evaluated(scores), **more)


def judged(scores, baseline, anchor):
    return max_regression(
        JudgedRun(
            evaluated(scores),
            fingerprints=FINGERPRINTS,
            baseline=baseline,
            anchor=None if anchor is None else anchor.baseline,
            n_looks=0 if anchor is None else anchor.n_looks,
        ),
        margin=0.05,
        alpha=0.05,
    )


def test_accepting_more_results_moves_the_baseline_and_not_the_anchor(tmp_path):
    for n_wrong in range(4):
        note_accepted(tmp_path, accepted([1.0] * (200 - n_wrong) + [0.0] * n_wrong, commit=f"c{n_wrong}"))
    anchor = load_anchor(tmp_path, task="iris", name="p")
    assert (anchor.baseline.score, anchor.baseline.commit, anchor.n_looks) == (1.0, "c0", 3)
    ledger = (tmp_path / "history" / "iris" / "p.jsonl").read_text().splitlines()
    assert [json.loads(line)["since_anchor"] for line in ledger] == pytest.approx([0, -0.005, -0.01, -0.015])


def test_accepting_the_same_twice_is_one_look(tmp_path):
    for _ in range(3):
        note_accepted(tmp_path, accepted([1.0] * 200))
    assert load_anchor(tmp_path, task="iris", name="p").n_looks == 0


def test_other_data_begin_a_new_history(tmp_path):
    note_accepted(tmp_path, accepted([1.0] * 200))
    note_accepted(tmp_path, accepted([0.0] * 200, commit="c1"))
    note_accepted(tmp_path, replace(accepted([0.5] * 200), fingerprints=FINGERPRINTS | {"data": "other"}))
    anchor = load_anchor(tmp_path, task="iris", name="p")
    assert (anchor.baseline.score, anchor.n_looks) == (0.5, 0)


def test_a_damaged_ledger_is_loud(tmp_path):
    note_accepted(tmp_path, accepted([1.0] * 200))
    (tmp_path / "history" / "iris" / "p.jsonl").write_text("{")
    with pytest.raises(ArtifactError, match="Next: restore it"):
        load_anchor(tmp_path, task="iris", name="p")


def months(directory, changes, *, anchored=True):
    """At which change, from 1, a series of them is stopped if every green one is accepted; None for never."""
    baseline = accepted(changes[0])
    note_accepted(directory, baseline)
    for count, scores in enumerate(changes[1:], start=1):
        anchor = load_anchor(directory, task="iris", name="p") if anchored else None
        if judged(scores, baseline, anchor).verdict is Verdict.FAIL:
            return count
        baseline = accepted(scores, commit=f"c{count}")
        note_accepted(directory, baseline)
    return None


def test_losses_of_a_point_each_are_stopped_once_they_are_the_margin_together(tmp_path):
    changes = [[1.0] * (200 - 2 * lost) + [0.0] * 2 * lost for lost in range(11)]
    assert months(tmp_path / "alone", changes, anchored=False) is None
    assert months(tmp_path / "anchored", changes) in {5, 6}


def test_the_message_says_since_when_and_what_to_do(tmp_path):
    note_accepted(tmp_path, accepted([1.0] * 200))
    baseline = accepted([1.0] * 182 + [0.0] * 18, commit="c1")
    note_accepted(tmp_path, baseline)
    anchor = load_anchor(tmp_path, task="iris", name="p")
    worse = judged([1.0] * 181 + [0.0] * 19, baseline, anchor)
    assert worse.verdict is Verdict.FAIL
    assert (
        worse.message.startswith("Little by little: -0.095 since iris (p)")
        or "Little by little: -0.095" in worse.message
    )
    better = judged([1.0] * 183 + [0.0] * 17, baseline, anchor)
    assert better.verdict is not Verdict.FAIL
