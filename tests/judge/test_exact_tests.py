import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from copa_harness.judge.exact_tests import GAMMA, bounded_mean_p_value, exact_share_p_value, tango_statistic


def brute_force(gained, lost, n, difference):
    """Greatest probability, over a fine grid of nuisance values, of a statistic at least as large, by enumeration."""
    observed = tango_statistic(gained, lost, n, difference=difference)
    tables = [(g, lo) for g, lo in itertools.product(range(n + 1), repeat=2) if g + lo <= n]
    extreme = [(g, lo) for g, lo in tables if tango_statistic(g, lo, n, difference=difference) >= observed - 1e-9]
    best = 0.0
    for share_lost in np.linspace(max(0.0, -difference), (1 - difference) / 2, 400):
        share = np.clip([share_lost + difference, share_lost, 1 - 2 * share_lost - difference], 0, 1)
        best = max(best, sum(stats.multinomial.pmf([g, lo, n - g - lo], n, share / share.sum()) for g, lo in extreme))
    return best


@pytest.mark.parametrize(
    ("gained", "lost", "n", "difference"), [(0, 0, 6, -0.3), (2, 1, 7, -0.2), (3, 0, 6, 0.1), (1, 4, 8, -0.4)]
)
def test_the_p_value_is_the_greatest_over_the_nuisance_parameter(gained, lost, n, difference):
    expected = brute_force(gained, lost, n, difference)
    got = exact_share_p_value(gained, lost, n, difference=difference, alternative="greater")
    # The nuisance is searched where the data allow it, so the p-value may be smaller, never larger than GAMMA above.
    assert got <= expected + GAMMA + 1e-6
    assert got >= expected * 0.6


@given(gained=st.integers(0, 10), lost=st.integers(0, 10), same=st.integers(1, 30))
@settings(deadline=None, max_examples=30)
def test_swapping_gains_and_losses_mirrors_the_test(gained, lost, same):
    n = gained + lost + same
    one = exact_share_p_value(gained, lost, n, difference=-0.1, alternative="greater")
    other = exact_share_p_value(lost, gained, n, difference=0.1, alternative="less")
    assert one == pytest.approx(other)


@pytest.mark.parametrize(("n", "margin", "share_lost"), [(25, 0.1, 0.12), (40, 0.05, 0.05), (40, 0.1, 0.25)])
@pytest.mark.parametrize("alternative", ["greater", "less"])
def test_a_true_difference_on_the_margin_is_rejected_in_at_most_five_percent(n, margin, share_lost, alternative):
    size = 0.0
    for lost in range(n + 1):
        weight = stats.binom.pmf(lost, n, share_lost)
        if weight < 1e-7:
            continue
        for gained in range(n - lost + 1):
            chance = weight * stats.binom.pmf(gained, n - lost, (share_lost - margin) / (1 - share_lost))
            if chance > 1e-7:
                p_value = exact_share_p_value(gained, lost, n, difference=-margin, alternative=alternative)
                size += chance * (p_value <= 0.05)
    assert size <= 0.05


@pytest.mark.parametrize(
    ("gained", "lost", "n", "difference"), [(1, 0, 0, 0.1), (-1, 0, 3, 0.1), (2, 2, 3, 0), (0, 0, 3, 1)]
)
def test_impossible_counts_are_refused(gained, lost, n, difference):
    with pytest.raises(ValueError, match="expected counts within n"):
        exact_share_p_value(gained, lost, n, difference=difference, alternative="less")


@given(successes=st.integers(0, 30), failures=st.integers(0, 30), mean=st.sampled_from([0.05, 0.3, 0.5, 0.9]))
@settings(deadline=None, max_examples=25)
def test_for_right_wrong_values_the_bounded_test_is_the_exact_binomial_test(successes, failures, mean):
    n = successes + failures
    if not n:
        return
    values = np.array([1.0] * successes + [0.0] * failures)
    expected = stats.binomtest(successes, n, mean, alternative="greater").pvalue
    got = bounded_mean_p_value(values, mean=mean, alternative="greater", low=0, high=1)
    assert got == pytest.approx(expected, abs=0.02)


def test_rows_that_never_moved_rule_out_a_drop_as_far_as_their_number_allows():
    for n in (20, 60):
        p_value = bounded_mean_p_value(np.zeros(n), mean=-0.05, alternative="greater", low=-1, high=1)
        assert p_value == pytest.approx(0.95**n, abs=0.015)


def test_no_values_prove_nothing():
    assert bounded_mean_p_value(np.zeros(0), mean=0.0, alternative="less", low=-1, high=1) == 1.0


def test_values_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="expected 0"):
        bounded_mean_p_value(np.array([1.2]), mean=0.5, alternative="less", low=0.0, high=1.0)


def test_the_order_of_values_does_not_matter():
    values = np.random.default_rng(0).uniform(-1, 1, 40)
    one, two = (
        bounded_mean_p_value(v, mean=-0.1, alternative="greater", low=-1, high=1) for v in (values, values[::-1])
    )
    assert one == two


@pytest.mark.parametrize("n", [30, 60])
def test_skewed_sparse_differences_pass_at_the_margin_in_at_most_five_percent(n):
    # A few rows fall by .8, many rise by .1: the sample without a fall looks like a gain.
    rng = np.random.default_rng(n)
    runs, passed = 150, 0
    for seed in range(runs):
        draws = rng.random(n)
        values = np.where(draws < 0.1, -0.8, np.where(draws < 0.4, 0.1, 0.0))
        passed += bounded_mean_p_value(values, mean=-0.05, alternative="greater", low=-1, high=1, seed=seed) <= 0.05
    assert passed / runs <= 0.05 + 2.4 * math.sqrt(0.05 * 0.95 / runs)


def test_the_exact_test_meets_the_asymptotic_one_where_it_hands_over():
    from copa_harness.judge.exact_tests import MANY_PAIRS

    n = MANY_PAIRS
    exact = exact_share_p_value(400, 520, n, difference=-0.015, alternative="less")
    asymptotic = exact_share_p_value(400, 520, n + 1, difference=-0.015, alternative="less")
    assert exact == pytest.approx(asymptotic, rel=0.1)


def test_a_clear_answer_is_clear_enough_for_a_hundred_gates_at_once():
    assert exact_share_p_value(0, 60, 300, difference=-0.02, alternative="less") < 0.05 / 100


@pytest.mark.parametrize("mean", [0.0, -0.004, -0.006])
def test_many_different_values_get_the_p_value_on_a_grid_that_they_have_one_by_one(mean, monkeypatch):
    rng = np.random.default_rng(3)
    values = np.clip(rng.normal(-0.002, 0.1, 2500) - rng.exponential(0.02, 2500) + 0.02, -1, 1)
    on_grid = bounded_mean_p_value(values, mean=mean, alternative="greater", low=-1, high=1)
    monkeypatch.setattr("copa_harness.judge.exact_tests._MANY_VALUES", 10_000)
    assert on_grid == pytest.approx(
        bounded_mean_p_value(values, mean=mean, alternative="greater", low=-1, high=1), abs=0.02
    )
