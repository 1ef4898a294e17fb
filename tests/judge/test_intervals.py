import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from copa_harness.judge.intervals import mean_interval, rows_to_settle, wilson_interval

graded = st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=40)


@given(n=st.integers(1, 500), data=st.data(), level=st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_wilson_is_scipys_wilson(n, data, level):
    k = data.draw(st.integers(0, n))
    expected = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    got = wilson_interval(k, n, level=level)
    assert got.low == pytest.approx(expected.low, abs=1e-9)
    assert got.high == pytest.approx(expected.high, abs=1e-9)


def test_nothing_observed_says_nothing():
    for interval in (wilson_interval(0, 0), mean_interval([])):
        assert (interval.low, interval.high, interval.method) == (0.0, 1.0, "none")


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, -1)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError, match="expected 0 <= successes <= n"):
        wilson_interval(successes, n)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_that_is_no_probability_is_refused(level):
    with pytest.raises(ValueError, match=r"such as 0\.95"):
        mean_interval([0, 1], level=level)


@pytest.mark.parametrize("scores", [[math.nan], [1.2, 0.5], [-0.1], [math.inf]])
def test_scores_outside_the_unit_interval_are_refused(scores):
    with pytest.raises(ValueError, match=r"expected finite numbers in 0\.\.1"):
        mean_interval(scores)


@settings(deadline=None, max_examples=40)
@given(graded)
def test_a_mean_lies_inside_its_interval_and_the_interval_inside_the_unit_interval(scores):
    interval = mean_interval(scores)
    mean = math.fsum(scores) / len(scores)
    assert 0 <= interval.low <= mean + 1e-9
    assert mean - 1e-9 <= interval.high <= 1


def test_right_wrong_scores_get_wilsons_interval():
    assert mean_interval([1, 1, 0, 1.0]) == wilson_interval(3, 4)


def test_graded_scores_get_the_bootstrap_and_equal_seeds_equal_intervals():
    scores = list(np.random.default_rng(3).beta(4, 2, size=60))
    first, again, other = mean_interval(scores), mean_interval(scores), mean_interval(scores, seed=1)
    assert first.method == "bca"
    assert first == again
    assert other.low == pytest.approx(first.low, abs=0.01)


def test_the_order_of_examples_hardly_matters_to_a_bootstrap():
    scores = list(np.random.default_rng(3).beta(4, 2, size=60))
    assert mean_interval(scores).low == pytest.approx(mean_interval(scores[::-1]).low, abs=0.01)


@pytest.mark.parametrize("scores", [[0.5], [0.5] * 30, [1.0] * 49 + [0.9], [0.2, 0.4, 0.9]])
def test_graded_scores_with_hardly_any_spread_get_the_conservative_bound(scores):
    interval = mean_interval(scores)
    assert interval.method == "wilson-bound"
    assert interval.high - interval.low > 0.05


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth, covered = 4 / 6, 0
    for _ in range(100):
        interval = mean_interval(list(rng.beta(4, 2, size=40)))
        covered += interval.low <= truth <= interval.high
    assert 0.88 <= covered / 100 <= 1.0


@given(score=st.floats(0, 1), threshold=st.floats(0, 1))
def test_rows_to_settle_shrink_with_distance(score, threshold):
    rows = rows_to_settle(score, threshold)
    assert (rows is None) == (abs(score - threshold) < 1e-3)
    if rows is not None and 0 < threshold < score <= 0.99:
        nearer = rows_to_settle((score + threshold) / 2, threshold)
        assert nearer is None or nearer >= rows // 4


def test_the_expansion_for_many_rows_is_the_bootstrap_of_them(monkeypatch):
    rng = np.random.default_rng(0)
    for scores in (rng.beta(0.3, 3, 2500), np.where(rng.random(2500) < 0.01, rng.random(2500), 0.0)):
        expanded = mean_interval(scores)
        with monkeypatch.context() as patch:
            patch.setattr("copa_harness.judge.intervals.MANY_ROWS", 10_000)
            resampled = mean_interval(scores)
        width = resampled.high - resampled.low
        assert expanded.method == resampled.method == "bca"
        assert expanded.low == pytest.approx(resampled.low, abs=0.04 * width)
        assert expanded.high == pytest.approx(resampled.high, abs=0.04 * width)
