import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copa_harness.judge.power import chance_to_fail
from copa_harness.judge.sequential.alpha_spending import SPENDING_POWER, SpendingSignTest


def watched(rows, *, alpha=0.05, n_rows=None):
    rows = np.atleast_2d(np.asarray(rows, dtype=float))
    test = SpendingSignTest(n_rows or rows.shape[1], alpha=alpha, n_runs=rows.shape[0])
    for column in rows.T:
        test.add(column)
    return test


@given(
    moved=st.lists(st.booleans(), min_size=1, max_size=10).filter(any),
    alpha=st.sampled_from([0.05, 0.2, 0.4]),
)
def test_over_every_possible_run_the_error_is_what_was_spent_and_never_more_than_allowed(moved, alpha):
    where = np.flatnonzero(moved)
    runs = np.zeros((2 ** len(where), len(moved)))
    runs[:, where] = list(itertools.product([-1.0, 1.0], repeat=len(where)))
    test = watched(runs, alpha=alpha)
    assert (test.rejected_at <= len(moved)).mean() == pytest.approx(test.spent[0])
    for t in range(1, len(moved) + 1):
        assert (test.rejected_at <= t).mean() <= alpha * (t / len(moved)) ** SPENDING_POWER + 1e-9


@given(moved=st.lists(st.booleans(), min_size=1, max_size=9).filter(any))
def test_its_p_value_is_the_share_of_runs_that_stop_as_early_or_end_as_low(moved):
    where = np.flatnonzero(moved)
    runs = np.zeros((2 ** len(where), len(moved)))
    runs[:, where] = list(itertools.product([-1.0, 1.0], repeat=len(where)))
    test = watched(runs, alpha=0.3)
    for level in np.unique(test.p_values):
        assert (test.p_values <= level + 1e-12).mean() == pytest.approx(level)


def test_a_single_row_is_a_single_look():
    rows = [-1.0] * 4
    test = SpendingSignTest(1, alpha=0.6)
    test.add(np.array([-1.0]))
    assert test.rejected_at[0] == 1
    assert watched([rows]).rejected_at[0] == 5  # four losses in a row happen by chance in 1 of 16 runs
    assert watched([rows]).p_values[0] == pytest.approx(1 / 2**4)


def test_runs_side_by_side_are_what_each_is_alone():
    rows = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], p=[0.2, 0.7, 0.1], size=(20, 80))
    together = watched(rows)
    alone = [watched([row]) for row in rows]
    assert together.rejected_at.tolist() == [test.rejected_at[0] for test in alone]
    assert together.p_values == pytest.approx(np.concatenate([test.p_values for test in alone]))


def simulated(n, *, drop, disagreement, seed=0, n_runs=1000):
    """How often looking after every row finds a drop, and after how many rows in the mean."""
    draws = np.random.default_rng(seed).random((n_runs, n))
    test = watched(np.where(draws < (disagreement + drop) / 2, -1.0, np.where(draws < disagreement, 1.0, 0.0)))
    return (test.rejected_at <= n).mean(), np.minimum(test.rejected_at, n).mean()


@pytest.mark.parametrize("disagreement", [0.2, 0.3])
def test_a_large_drop_is_found_in_little_more_than_half_the_rows_at_hardly_any_power(disagreement):
    found, rows = simulated(300, drop=0.1, disagreement=disagreement)
    assert rows <= 0.6 * 300
    assert found >= chance_to_fail(300, drop=0.1, disagreement=disagreement) - 0.06


def test_an_unchanged_program_alarms_in_at_most_five_percent_however_often_one_looks():
    found, _ = simulated(200, drop=0.0, disagreement=0.2, seed=3)
    assert found <= 0.05 + 2.4 * np.sqrt(0.05 * 0.95 / 1000)


def test_more_rows_than_on_offer_are_refused():
    test = watched([[0.0, 1.0]])
    with pytest.raises(ValueError, match="beyond the 2"):
        test.add(np.array([0.0]))
    with pytest.raises(ValueError, match="at least 1"):
        SpendingSignTest(0, alpha=0.05)
