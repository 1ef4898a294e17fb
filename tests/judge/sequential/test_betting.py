import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copa_harness.judge.sequential.betting import FRACTIONS, MeanAbove, MeanBelow


def feed(process, values):
    for value in values:
        process.add(value)
    return process


def test_the_wealth_is_the_average_of_the_bets():
    values = [1.0, 0.0, 1.0, 1.0]
    expected, best = [], 0.0
    for count in range(1, 5):
        bets = [math.prod(1 + f * (v - 0.4) / 0.4 for v in values[:count]) for f in FRACTIONS]
        expected.append(sum(bets) / len(bets))
    best = max(1.0, *expected)
    assert feed(MeanAbove(0.4, low=0, high=1), values).p_value == pytest.approx(1 / best)


def test_under_the_null_the_expected_wealth_is_one_for_every_length():
    # All coin sequences of length 8 at a mean of .5, by enumeration.
    wealth = []
    for values in itertools.product([0.0, 1.0], repeat=8):
        bets = [math.prod(1 + f * (v - 0.5) / 0.5 for v in values) for f in FRACTIONS]
        wealth.append(sum(bets) / len(bets))
    assert np.mean(wealth) == pytest.approx(1.0)


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_looking_after_every_row_is_wrong_in_at_most_alpha_of_all_sequences(alpha):
    crossed = 0
    for values in itertools.product([-1.0, 1.0], repeat=12):
        crossed += feed(MeanAbove(0.0, low=-1, high=1), values).p_value <= alpha
    assert crossed / 2**12 <= alpha


def test_looking_after_every_row_of_a_shuffled_split_is_wrong_in_at_most_alpha_of_all_orders():
    # Mean exactly on the threshold: every order of 10 rows, 5 of them right.
    crossed = [
        feed(MeanAbove(0.5, low=0, high=1, n_rows=10), [float(i in right) for i in range(10)]).p_value <= 0.2
        for right in itertools.combinations(range(10), 5)
    ]
    assert np.mean(crossed) <= 0.2


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=12), st.sampled_from([0.1, 0.5, 0.8]))
@settings(deadline=None)
def test_a_whole_split_above_the_mean_is_certain_and_one_at_or_below_is_not(values, mean):
    process = feed(MeanAbove(mean, low=0, high=1, n_rows=len(values)), values)
    assert process.is_certain == (sum(values) > mean * len(values) + 1e-9)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
@settings(deadline=None)
def test_below_is_above_of_the_negated_rows(values):
    above = feed(MeanAbove(0.0, low=-1, high=1), [-v for v in values])
    below = feed(MeanBelow(0.0, low=-1, high=1), values)
    assert above.p_value == below.p_value


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30))
@settings(deadline=None)
def test_evidence_is_never_taken_back(values):
    process, last = MeanAbove(-0.1, low=-1, high=1), 1.0
    for value in values:
        process.add(value)
        assert process.p_value <= last
        last = process.p_value


def test_a_clear_gain_is_seen_before_the_end():
    assert feed(MeanAbove(0.5, low=0, high=1), [1.0] * 12).p_value <= 0.05


def test_a_mean_at_the_edge_is_refuted_by_the_first_row_off_it():
    process = MeanAbove(0.0, low=0, high=1)
    assert feed(process, [0.0, 0.0]).p_value == 1.0
    assert feed(process, [0.5]).is_certain


def test_rows_and_means_outside_the_range_are_refused():
    with pytest.raises(ValueError, match="expected one inside"):
        MeanAbove(2.0, low=0, high=1)
    with pytest.raises(ValueError, match="got a row of 2"):
        MeanAbove(0.5, low=0, high=1).add(2.0)
    with pytest.raises(ValueError, match="beyond the 1 of the split"):
        feed(MeanAbove(0.5, low=0, high=1, n_rows=1), [0.5, 0.5])
