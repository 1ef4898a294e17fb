import pytest

from copa_harness.judge.flaky import flaky_report, min_pass_all
from copa_harness.judge.gates import judge
from copa_harness.judge.intervals import mean_interval, wilson_interval
from copa_harness.judge.options import Gates
from copa_harness.judge.paired_gates import JudgedRun
from copa_harness.results import EvaluationResult, ExampleResult, Verdict

REPEATS = {"a": (1, 1, 1), "b": (1, 0, 0), "c": (0, 0, 0), "d": (1, 1, 0), "e": (1, None, 1)}


def test_examples_are_counted_by_how_often_they_pass():
    report = flaky_report(REPEATS)
    assert (report.n, report.k, report.n_pass_all, report.n_pass_none, report.n_incomplete) == (4, 3, 1, 1, 1)
    assert [row.example_id for row in report.flaky] == ["b", "d"]
    assert report.pass_all_interval == wilson_interval(1, 4)


def test_graded_scores_pass_at_the_score_asked_for():
    assert flaky_report({"a": (0.9, 0.7)}, pass_score=0.7).n_pass_all == 1
    assert flaky_report({"a": (0.9, 0.7)}).n_pass_none == 1


def test_unequal_repeats_are_refused():
    with pytest.raises(ValueError, match="the same number"):
        flaky_report({"a": (1, 1), "b": (1,)})


def test_the_gate_holds_the_share_that_passes_every_repeat():
    report = flaky_report({"a": (1, 1), "b": (1, 1), "c": (1, 0)})
    assert min_pass_all(report, 0.6).verdict is Verdict.PASS
    failed = min_pass_all(report, 0.9)
    assert failed.verdict is Verdict.FAIL
    for words in ("got 0.667", "2 of 3 examples passed all 2 repeats", "c: 1 of 2", "Next:"):
        assert words in failed.message


def test_one_repeat_cannot_show_stability():
    rows = (ExampleResult("a", 1.0),)
    evaluation = EvaluationResult("test", "lm", rows, mean_interval([1]))
    (answer,) = [g for g in judge(JudgedRun(evaluation), Gates(min_pass_all=0.5)) if g.gate.startswith("min_pass_all")]
    assert answer.verdict is Verdict.UNDECIDED
    assert "--copa-repeat" in answer.message


def test_no_examples_show_nothing():
    assert min_pass_all(flaky_report({}), 0.5).verdict is Verdict.UNDECIDED
