import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copa_harness.judge.sequential.monitors import RegressionMonitor, ThresholdMonitor, random_order
from copa_harness.results import Verdict


def watch(monitor, scores):
    used = 0
    for score in scores:
        monitor.add([score])
        used += 1
        if monitor.verdict is not None:
            break
    return monitor.verdict, used


def test_the_order_depends_on_ids_and_seed_only():
    ids = [f"e{i}" for i in range(30)]
    assert random_order(ids, seed=1) == random_order(ids[::-1], seed=1)
    assert random_order(ids, seed=1) != random_order(ids, seed=2)
    assert sorted(key for unit in random_order(ids, seed=1) for key in unit) == sorted(ids)


def test_examples_of_one_group_are_drawn_together():
    order = random_order(["a", "b", "c", "d"], seed=0, groups={"a": "x", "c": "x"})
    assert sorted(order) == [("a", "c"), ("b",), ("d",)]


def test_repeated_ids_are_refused():
    with pytest.raises(ValueError, match="1 repeated"):
        random_order(["a", "a"], seed=0)


@settings(deadline=None)
@given(scores=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=20), threshold=st.floats(0, 1))
def test_without_error_allowed_the_verdict_is_that_of_all_rows(scores, threshold):
    monitor = ThresholdMonitor(threshold, sizes=[1] * len(scores), alpha=0.0)
    verdict, used = watch(monitor, scores)
    reached = sum(scores) >= threshold * len(scores) - 1e-9
    assert verdict is (Verdict.PASS if reached else Verdict.FAIL)
    assert used <= len(scores)


def test_a_verdict_that_nothing_can_change_comes_at_once():
    assert watch(ThresholdMonitor(1.0, sizes=[1] * 50, alpha=0.0), [1.0, 0.0, 1.0]) == (Verdict.FAIL, 2)
    assert watch(ThresholdMonitor(0.0, sizes=[1] * 50, alpha=0.0), [0.0]) == (Verdict.PASS, 1)


def test_a_clear_score_is_passed_long_before_the_last_row():
    rng = np.random.default_rng(0)
    scores = (rng.random(300) < 0.95).astype(float)
    verdict, used = watch(ThresholdMonitor(0.8, sizes=[1] * 300, alpha=0.05), scores)
    assert verdict is Verdict.PASS
    assert used < 100


def test_early_verdicts_differ_from_those_of_all_rows_in_at_most_alpha():
    rng, runs, wrong = np.random.default_rng(5), 150, 0
    split = np.array([1.0] * 47 + [0.0] * 13)  # just below the threshold of .8
    for _ in range(runs):
        verdict, _ = watch(ThresholdMonitor(0.8, sizes=[1] * 60, alpha=0.05), rng.permutation(split))
        wrong += verdict is not Verdict.FAIL
    assert wrong / runs <= 0.05 + 2.4 * math.sqrt(0.05 * 0.95 / runs)


def test_a_failed_row_counts_against_whatever_is_near():
    monitor = ThresholdMonitor(0.5, sizes=[1] * 4, alpha=0.0)
    monitor.add([1.0])
    monitor.add([None])
    assert monitor.verdict is None
    monitor.add([1.0])
    assert monitor.verdict is Verdict.PASS


def test_a_split_of_failed_rows_only_is_undecided():
    assert watch(ThresholdMonitor(0.5, sizes=[1, 1], alpha=0.05), [None, None])[0] is Verdict.UNDECIDED


def monitor_of(margin, *, largest=1, alpha=0.05, **more):
    return RegressionMonitor(margin, largest=largest, alpha=alpha, alpha_fail=alpha, **more)


@pytest.mark.parametrize("n_units", [None, 200])
@pytest.mark.parametrize(("margin", "shift", "verdict"), [(0.05, -1.0, Verdict.FAIL), (0.0, 1.0, Verdict.PASS)])
def test_a_large_change_is_decided_early(margin, shift, verdict, n_units):
    found, used = watch(monitor_of(margin, n_units=n_units), [shift, 0.0] * 100)
    assert found is verdict
    assert used < 60


@pytest.mark.parametrize("n_units", [None, 300])
def test_a_drop_that_is_shown_fails_only_where_it_is_at_least_the_margin(n_units):
    few = [-1.0, *[0.0] * 14] * 20
    assert watch(monitor_of(0.0, n_units=n_units), few)[0] is Verdict.FAIL
    assert watch(monitor_of(0.1, n_units=n_units), few)[0] is None


def test_whether_a_drop_of_the_margin_is_ruled_out_is_not_looked_for():
    monitor = monitor_of(0.1)
    assert watch(monitor, [0.0] * 300)[0] is None
    assert monitor.left == (0.05, 0.025)
    assert monitor_of(0.0).left == (0.025, 0.025)


def test_a_verdict_is_not_taken_back():
    monitor = monitor_of(0.0)
    watch(monitor, [-1.0] * 60)
    for _ in range(200):
        monitor.add([1.0])
    assert monitor.verdict is Verdict.FAIL


def test_groups_are_one_bet_each():
    together, apart = monitor_of(0.0, largest=5), monitor_of(0.0)
    for _ in range(4):
        together.add([-1.0] * 5)
    for _ in range(20):
        apart.add([-1.0])
    assert together.p_values[1] > apart.p_values[1]
    assert together.p_values[1] == pytest.approx(RegressionCount(4))


def RegressionCount(n):
    monitor = monitor_of(0.0, alpha=0.0)
    for _ in range(n):
        monitor.add([-1.0])
    return monitor.p_values[1]
