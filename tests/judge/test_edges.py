"""The smallest and the strangest data: one example, two, all equal, missing scores, a single group."""

import math

import numpy as np
import pytest

from copa_harness.judge.attribution import attribute_gains
from copa_harness.judge.flaky import repeated_mean
from copa_harness.judge.gates import judge
from copa_harness.judge.intervals import mean_interval
from copa_harness.judge.options import Gates
from copa_harness.judge.paired_gates import JudgedRun
from copa_harness.judge.paired_tests import PairedScores, paired_difference
from copa_harness.judge.ranking import compare_strategies
from copa_harness.judge.sequential.stopping import SequentialJudge
from copa_harness.results import EvaluationResult, ExampleResult, Verdict


class Accepted:
    name, origin, fingerprints = "before", "", {}

    def __init__(self, scores):
        self.scores = scores


def evaluation(scores):
    rows = tuple(
        ExampleResult(key, score, outcome="ok" if score is not None else "provider_error")
        for key, score in scores.items()
    )
    return EvaluationResult("test", "lm", rows, mean_interval([s for s in scores.values() if s is not None]))


def regression(before, after, *, margin=0.05, groups=None, rule=None):
    gates = rule or Gates(max_regression=margin, max_error_rate=1.0)
    answers = judge(
        JudgedRun(evaluation(after), baseline=Accepted(before), groups=groups, opponent=Accepted(before)), gates
    )
    return answers[1]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("old", "new"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.4, 0.6)])
def test_one_or_two_examples_decide_nothing_and_the_message_says_what_would(n, old, new):
    ids = [f"e{i}" for i in range(n)]
    gate = regression(dict.fromkeys(ids, old), dict.fromkeys(ids, new))
    assert gate.verdict is Verdict.UNDECIDED
    assert "would decide it" in gate.message
    assert "Next:" in gate.message
    assert "nan" not in gate.message
    assert "inf " not in gate.message


@pytest.mark.parametrize("scores", [[0.0], [1.0], [0.3], [0.0, 0.0], [1.0, 1.0], [0.5, 0.5], [0.0, 1.0]])
def test_a_mean_of_hardly_any_examples_has_a_wide_interval_around_it(scores):
    found = mean_interval(scores)
    assert 0.0 <= found.low <= np.mean(scores) <= found.high <= 1.0
    assert found.high - found.low > 0.5


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_many_equal_scores_on_both_sides_rule_out_a_drop_without_claiming_certainty(value):
    scores = {f"e{i:03}": value for i in range(200)}
    gate = regression(scores, scores)
    assert gate.verdict is Verdict.PASS
    assert gate.details["low"] < 0 < gate.details["high"]
    assert gate.details["p_value"] == 1.0


def test_a_score_that_is_no_number_is_refused_where_it_comes_in():
    for call in (
        lambda: mean_interval([0.5, math.nan]),
        lambda: paired_difference(PairedScores(["a"], [0.5], [math.nan])),
        lambda: paired_difference(PairedScores(["a"], [math.inf], [0.5])),
    ):
        with pytest.raises(ValueError, match=r"expected finite numbers in 0\.\.1"):
            call()


def test_examples_without_a_score_leave_nothing_to_compare():
    gate = regression({"a": 1.0, "b": None}, {"a": None, "b": 1.0})
    assert gate.verdict is Verdict.NOT_COMPARABLE
    assert "no example with a score is in both" in gate.message
    assert "nan" not in gate.message


def test_a_single_group_is_one_observation_however_many_examples_it_has():
    ids = [f"e{i:03}" for i in range(200)]
    one = dict.fromkeys(ids, "all")
    for before, after in ((1.0, 0.0), (1.0, 1.0), (0.0, 1.0)):
        gate = regression(dict.fromkeys(ids, before), dict.fromkeys(ids, after), groups=one)
        assert gate.verdict is Verdict.UNDECIDED
        assert "in 1 group" in gate.message
        gain = regression(
            dict.fromkeys(ids, before),
            dict.fromkeys(ids, after),
            groups=one,
            rule=Gates(better_than="before", max_error_rate=1.0),
        )
        assert gain.verdict is Verdict.UNDECIDED
    found = paired_difference(PairedScores(ids, [1.0] * 200, [0.0] * 200, one))
    assert (found.p_value, found.n_groups) == (1.0, 1)
    assert found.interval.high - found.interval.low > 0.5


@pytest.mark.parametrize("n", [1, 2])
def test_early_stops_of_one_or_two_examples_use_them_all_and_say_nothing_untrue(n):
    ids = tuple(f"e{i}" for i in range(n))
    watch = SequentialJudge(
        ids, Gates(max_regression=0.05), run=JudgedRun(None, baseline=Accepted(dict.fromkeys(ids, 1.0))), seed=0
    )
    for block in watch.blocks(size=16):
        watch.add(dict.fromkeys(block, 1.0))
    answer = watch.finish(evaluation(dict.fromkeys(ids, 1.0)))
    assert answer.n_used == n
    assert [gate.verdict for gate in answer.gates if gate.gate.startswith("max_reg")] == [Verdict.UNDECIDED]


def test_a_single_group_in_sequential_mode_is_seen_whole_and_stays_undecided():
    ids = tuple(f"e{i:02}" for i in range(30))
    groups = dict.fromkeys(ids, "all")
    watch = SequentialJudge(
        ids,
        Gates(max_regression=0.05),
        run=JudgedRun(None, baseline=Accepted(dict.fromkeys(ids, 1.0)), groups=groups),
        seed=0,
    )
    for block in watch.blocks(size=4):
        assert len(block) == 30
        watch.add(dict.fromkeys(block, 0.0))
    (gate,) = [g for g in watch.finish(evaluation(dict.fromkeys(ids, 0.0))).gates if g.gate.startswith("max_reg")]
    assert gate.verdict is Verdict.UNDECIDED


@pytest.mark.parametrize("n", [1, 2])
def test_strategies_on_one_or_two_examples_are_not_told_apart(n):
    table = {
        name: {"task": {f"e{i}": value for i in range(n)}} for name, value in (("none", 0.0), ("p", 1.0), ("w", 0.5))
    }
    found = compare_strategies(table, reference="none")
    assert all(row.adjusted > 0.05 for row in found.rows)
    assert "No strategy is shown to differ" in found.sentence()


@pytest.mark.parametrize("n", [1, 2])
def test_gains_on_one_or_two_examples_have_intervals_and_no_finding(n):
    cells = [{f"e{i}": value for i in range(n)} for value in (0.0, 0.0, 0.0, 1.0)]
    names = ("base_plain", "base_optimized", "tuned_plain", "tuned_optimized")
    found = attribute_gains(**dict(zip(names, cells, strict=True)))
    assert found.interaction.interval.low < 0 < found.interaction.difference
    assert "cannot be told from simply adding up" in found.sentence()


def test_one_example_repeated_has_a_mean_and_admits_that_it_knows_no_more():
    found = repeated_mean({"a": (1.0, 0.0, 1.0)})
    assert found.mean == pytest.approx(2 / 3)
    assert (found.model_error, found.example_error) == (0.0, 0.0)
    assert found.interval.high - found.interval.low > 0.5
    assert math.isnan(repeated_mean({}).mean)
    assert math.isnan(repeated_mean({"a": (None, None)}).mean)
