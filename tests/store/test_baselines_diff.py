import json
from dataclasses import replace

import pytest

from copa_harness.errors import ArtifactError
from copa_harness.judge.intervals import mean_interval
from copa_harness.judge.paired_tests import PairedScores, paired_difference
from copa_harness.results import EvaluationResult, ExampleResult
from copa_harness.store.baselines import (
    Baseline,
    baseline_text,
    diff_baselines,
    digests,
    list_baselines,
    load_baseline,
    read_baseline,
    save_baseline,
)

FINGERPRINTS = {"data": "d" * 64, "split": "test", "metric": "m" * 64}


def accepted(scores, **more):
    rows = tuple(ExampleResult(key, score) for key, score in scores)
    evaluation = EvaluationResult("test", "embedded", rows, mean_interval([score for _, score in scores]))
    arguments = {"task": "iris", "name": "joint", "fingerprints": FINGERPRINTS} | more
    return Baseline.from_evaluation(evaluation, **arguments)


BEFORE = accepted([("a", 1.0), ("b", 0.0), ("c", 1.0), ("d", 0.5)], versions={"dspy": "3.4.0"}, commit="1" * 40)
AFTER = accepted([("a", 0.0), ("b", 0.25), ("c", 1.0), ("e", 1.0)], versions={"dspy": "3.4.1"}, commit="2" * 40)


def test_a_diff_names_what_moved_what_is_gone_and_what_is_new():
    diff = diff_baselines(BEFORE, AFTER)
    assert diff.worse == (("a", 1.0, 0.0),)
    assert diff.better == (("b", 0.0, 0.25),)
    assert (diff.only_before, diff.only_after) == (("d",), ("e",))
    assert diff.versions == {"dspy": ("3.4.0", "3.4.1")}
    assert set(diff.settings) == {"commit"}
    assert diff.comparable


def test_the_difference_is_the_paired_one_over_the_examples_in_common():
    expected = paired_difference(PairedScores(["a", "b", "c"], [1.0, 0.0, 1.0], [0.0, 0.25, 1.0]), level=0.9)
    assert diff_baselines(BEFORE, AFTER).difference == expected


@pytest.mark.parametrize("part", ["data", "metric"])
def test_another_metric_or_data_is_said_and_scores_of_another_metric_are_not_compared(part):
    other = replace(AFTER, fingerprints={**AFTER.fingerprints, part: "x" * 64})
    diff = diff_baselines(BEFORE, other)
    assert not diff.comparable
    assert (diff.difference is None) == (part == "metric")
    assert f"not comparable as a whole: {part} changed" in diff.text()


def test_the_text_tells_scores_difference_and_examples():
    text = diff_baselines(BEFORE, AFTER).text()
    for words in (
        "score   0.625 -> 0.562",
        "3 examples in common",
        "1 better, 1 worse",
        "worse   a  1.000 -> 0.000",
        "gone    1 example: d",
        "new     1 example: e",
        "version dspy 3.4.0 -> 3.4.1",
    ):
        assert words in text


def test_equal_baselines_say_so():
    assert diff_baselines(BEFORE, BEFORE).text().endswith("nothing changed")
    assert "nothing changed" not in diff_baselines(BEFORE, replace(BEFORE, commit="other")).text()


def test_long_lists_are_cut_and_counted():
    many = accepted([(f"x{i:02}", 1.0) for i in range(30)])
    none = accepted([(f"x{i:02}", 0.0) for i in range(30)])
    assert "and 25 more" in diff_baselines(many, none).text(n_shown=5)


def test_the_diff_is_plain_json():
    document = json.loads(json.dumps(diff_baselines(BEFORE, AFTER).as_reported(), allow_nan=False))
    assert document["worse"] == [["a", 1.0, 0.0]]
    assert document["comparable"] is True


def test_a_baseline_is_shown_with_score_model_fingerprints_and_versions():
    text = baseline_text(BEFORE)
    for words in (
        "iris (joint), commit 1111111111",
        "score   0.625 on 4 test examples",
        "model   embedded",
        "dspy 3.4.0",
    ):
        assert words in text


def test_baselines_are_listed_and_damaged_ones_are_not_hidden(tmp_path):
    save_baseline(tmp_path, BEFORE)
    save_baseline(tmp_path, accepted([("a", 1.0)], task="wine", name="none"))
    (tmp_path / "wine" / "broken.json").write_text("{")
    entries = list_baselines(tmp_path)
    assert [entry.path.name for entry in entries] == ["joint.json", "broken.json", "none.json"]
    assert [entry.baseline is None for entry in entries] == [False, True, False]
    assert "git checkout" in entries[1].problem
    assert next(entry.path.name for entry in list_baselines(tmp_path, task="iris")) == "joint.json"
    assert list_baselines(tmp_path / "nowhere") == ()


def test_reading_a_file_that_is_not_there_says_how_to_make_one(tmp_path):
    with pytest.raises(ArtifactError, match="--copa-bless"):
        read_baseline(tmp_path / "x.json")


def test_repeats_are_kept_and_shown(tmp_path):
    repeated = accepted([("a", 0.5), ("b", 1.0)], repeats={"a": (1.0, 0.0), "b": (1.0, 1.0)})
    text = save_baseline(tmp_path, repeated).read_text()
    assert '{"id": "a", "score": 0.5, "repeats": [1.0, 0.0]}' in text
    loaded = load_baseline(tmp_path, task="iris", name="joint")
    assert loaded is not None
    assert loaded.repeats == repeated.repeats
    assert "repeats 2 per example" in baseline_text(repeated)


def test_an_example_that_occurs_twice_keeps_both_scores():
    assert accepted([("a", 1.0), ("a", 0.0)]).scores == {"a": 1.0, "a#2": 0.0}


def test_examples_of_one_group_are_exchanged_together_as_the_gate_does(tmp_path):
    ids = [f"x{i:02}" for i in range(24)]
    groups = digests({key: f"speaker {i // 6}" for i, key in enumerate(ids)})
    before, after = (replace(accepted([(key, score) for key in ids]), groups=groups) for score in (1.0, 0.0))
    save_baseline(tmp_path, before)
    kept = load_baseline(tmp_path, task="iris", name="joint")
    assert kept.groups == groups
    assert "speaker" not in json.dumps(kept.groups)
    assert diff_baselines(kept, after).difference.p_one_sided == 1 / 2**4
