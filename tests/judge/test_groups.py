import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from copa_harness.judge.exact_tests import clustered_bounded_p_value, skewed_t_p_value
from copa_harness.judge.intervals import clustered_mean_interval, group_labels, grouped, mean_interval
from copa_harness.judge.noninferiority import noninferiority
from copa_harness.judge.paired_gates import JudgedRun
from copa_harness.judge.paired_tests import PairedScores, clustered_difference_interval, paired_difference
from copa_harness.results import Verdict


def names(n):
    return tuple(f"e{i:03}" for i in range(n))


def clusters(n, size):
    return {key: str(i // size) for i, key in enumerate(names(n))}


def test_examples_that_share_no_group_are_not_clustered():
    assert group_labels(names(3), None) is None
    assert group_labels(names(3), {"e000": "a", "e001": "b"}) is None
    assert group_labels(names(3), {"e000": "a", "e001": "a"}) == ("group a", "group a", "id e002")


def test_a_group_named_like_an_example_is_not_that_example():
    labels = group_labels(("a", "b", "c"), {"b": "a", "c": "a"})
    assert labels is not None
    assert len(set(labels)) == 2


def test_totals_and_sizes_are_counted_by_group():
    groups = grouped(np.array([1.0, 0.0, 0.5, 1.0]), ["x", "y", "x", "x"])
    assert groups.totals.tolist() == [2.5, 0.0]
    assert groups.sizes.tolist() == [3, 1]
    assert groups.effective_n == pytest.approx(16 / 10)


def test_values_without_a_group_each_are_refused():
    with pytest.raises(ValueError, match="one group per value"):
        grouped(np.zeros(3), ["a"])


def test_answers_that_agree_within_groups_say_no_more_than_the_groups():
    scores = [float(c % 2) for c in range(40) for _ in range(10)]
    labels = [str(c) for c in range(40) for _ in range(10)]
    few, many = mean_interval(scores, groups=labels), mean_interval(scores)
    assert few.method == "cluster-bca"
    assert few.high - few.low > 2.5 * (many.high - many.low)


def test_single_examples_as_groups_change_nothing():
    scores = [1.0, 0.0, 1.0]
    assert mean_interval(scores, groups=["a", "b", "c"]) == mean_interval(scores)


def test_few_groups_get_a_bound_as_wide_as_that_of_so_many_examples():
    scores, labels = np.array([1.0] * 40 + [0.0] * 10), [str(i // 10) for i in range(50)]
    interval = clustered_mean_interval(scores, labels)
    assert interval.method == "cluster-bound"
    assert interval == pytest.approx(clustered_mean_interval(scores, labels))
    assert interval.high - interval.low > 0.5


def test_the_cluster_bootstrap_is_scipys_on_groups_of_equal_size():
    rng = np.random.default_rng(4)
    means = rng.normal(0, 0.2, 40)
    differences = np.repeat(means, 5)
    got = clustered_difference_interval(differences, [str(i // 5) for i in range(200)])
    expected = stats.bootstrap((means,), np.mean, method="BCa", rng=np.random.default_rng(1)).confidence_interval
    assert got.low == pytest.approx(expected.low, abs=0.006)
    assert got.high == pytest.approx(expected.high, abs=0.006)


def test_clustered_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, covered, runs = np.random.default_rng(3), 0, 120
    labels = [str(i // 10) for i in range(300)]
    for _ in range(runs):
        lean = rng.uniform(0.3, 1.0, 30)
        scores = (rng.random(300) < np.repeat(lean, 10)).astype(float)
        interval = clustered_mean_interval(scores, labels)
        covered += interval.low <= 0.65 <= interval.high
    assert covered / runs >= 0.88


def test_the_t_test_of_groups_of_equal_size_is_the_t_test_of_their_means():
    means = np.random.default_rng(2).normal(-0.02, 0.1, 30)
    means = np.concatenate([means, 2 * -0.02 - means])  # symmetric: nothing to correct
    found = skewed_t_p_value(means * 5, np.full(60, 5.0), mean=-0.05, alternative="greater")
    assert found == pytest.approx(stats.ttest_1samp(means, -0.05, alternative="greater").pvalue)


def grouped_pairs(lost_in_each, *, n_groups=20, size=10):
    ids = names(n_groups * size)
    after = tuple(float(i % size >= lost_in_each) for i in range(len(ids)))
    return PairedScores(ids, (1.0,) * len(ids), after, clusters(len(ids), size))


def test_groups_that_each_lose_two_of_ten_fail():
    answer = noninferiority(grouped_pairs(2), margin=0.05)
    assert answer.verdict is Verdict.FAIL
    assert answer.p_any_drop < 0.001


def test_groups_in_which_nothing_moves_need_as_many_groups_as_rows_would_be_needed():
    answer = noninferiority(grouped_pairs(0, n_groups=40), margin=0.05)
    assert answer.verdict is Verdict.UNDECIDED
    assert answer.rows_to_decide == pytest.approx(590, abs=10)


def test_the_approximate_test_of_groups_passes_an_unchanged_program_and_keeps_its_level_at_the_margin():
    rng, runs = np.random.default_rng(5), 400
    sizes = np.full(40, 10.0)
    passed = {0.0: 0, -0.05: 0}
    for mean in passed:
        for _ in range(runs):
            lean = rng.normal(mean, 0.06, 40)
            totals = rng.normal(lean[:, None], 0.2, (40, 10)).sum(axis=1)
            passed[mean] += skewed_t_p_value(totals, sizes, mean=-0.05, alternative="greater") <= 0.05
    assert passed[0.0] / runs > 0.9
    assert passed[-0.05] / runs <= 0.05 + 2.4 * math.sqrt(0.05 * 0.95 / runs)


def test_whole_groups_that_move_alarm_in_at_most_five_percent_of_runs():
    rng, runs = np.random.default_rng(9), 200
    ids, groups = names(100), clusters(100, 10)
    clustered = ignored = 0
    for seed in range(runs):
        sign = np.repeat(np.where(rng.random(10) < 0.5, -1.0, 1.0), 10)
        moved = rng.random(100) < 0.4
        before = np.where(moved & (sign < 0), 1.0, 0.0)
        after = np.where(moved & (sign > 0), 1.0, 0.0)
        pairs = PairedScores(ids, tuple(before), tuple(after))
        result = paired_difference(PairedScores(ids, pairs.before, pairs.after, groups), seed=seed)
        clustered += result.p_value <= 0.1 and result.difference < 0
        ignored += (
            paired_difference(PairedScores(ids, pairs.before, pairs.after)).p_value <= 0.1 and result.difference < 0
        )
    assert clustered / runs <= 0.05 + 2.4 * math.sqrt(0.05 * 0.95 / runs)
    assert ignored / runs > 0.15


def test_the_bounded_test_treats_groups_as_rows():
    differences = np.zeros(60)
    labels = [str(i // 10) for i in range(60)]
    p_value = clustered_bounded_p_value(differences, labels, difference=-0.2, alternative="greater")
    assert p_value == pytest.approx(0.8**6, abs=0.015)


def test_a_regression_over_groups_says_how_many_there_were():
    ids = names(60)
    pairs = PairedScores(ids, (1.0,) * 60, (0.0,) * 40 + (1.0,) * 20, clusters(60, 4))
    answer = noninferiority(pairs, margin=0.02)
    assert answer.paired.n_groups == 15
    assert answer.paired.method == "paired permutation of groups"
    assert answer.verdict is Verdict.FAIL


def test_few_groups_leave_open_what_as_many_examples_would_decide():
    ids = names(60)
    pairs = PairedScores(ids, (1.0,) * 60, (0.0,) * 15 + (1.0,) * 45)
    assert noninferiority(pairs, margin=0.02).verdict is Verdict.FAIL
    assert noninferiority(replace(pairs, groups=clusters(60, 15)), margin=0.02).verdict is Verdict.UNDECIDED


def test_a_threshold_gate_shows_the_interval_of_the_groups():
    from copa_harness.judge.gates import judge
    from copa_harness.judge.options import Gates
    from copa_harness.results import EvaluationResult, ExampleResult

    scores = [1.0] * 40 + [0.0] * 20
    rows = tuple(ExampleResult(key, score) for key, score in zip(names(60), scores, strict=True))
    evaluation = EvaluationResult("test", "lm", rows, mean_interval(scores))
    alone, grouped_gate = (
        judge(JudgedRun(evaluation, groups=groups), Gates(min_score=0.5))[1].details
        for groups in (None, clusters(60, 10))
    )
    assert grouped_gate["low"] < alone["low"] - 0.1
