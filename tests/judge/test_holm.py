import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from copa_harness.judge.ranking import holm_adjusted

p_values = st.lists(st.floats(0, 1), max_size=12)


def step_down(values, alpha):
    """Holm's procedure as he wrote it: reject while the i-th smallest is at most alpha / (k - i)."""
    rejected = set()
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        if values[index] > alpha / (len(values) - rank):
            break
        rejected.add(index)
    return rejected


@given(p_values, st.sampled_from([0.01, 0.05, 0.2]))
def test_adjusted_values_reject_what_the_step_down_procedure_rejects(values, alpha):
    adjusted = holm_adjusted(values)
    edge = any(abs(a - alpha) < 1e-9 for a in adjusted)
    if not edge:
        assert {i for i, value in enumerate(adjusted) if value <= alpha} == step_down(values, alpha)


@given(p_values)
def test_adjusted_values_are_never_smaller_and_keep_the_order(values):
    adjusted = holm_adjusted(values)
    assert all(a >= p for a, p in zip(adjusted, values, strict=True))
    for i, j in itertools.combinations(range(len(values)), 2):
        if values[i] < values[j]:
            assert adjusted[i] <= adjusted[j]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_at_least_what_bonferroni_does_and_no_more_than_benjamini_hochberg(values):
    adjusted = np.array(holm_adjusted(values))
    assert np.all(adjusted <= np.minimum(1, len(values) * np.array(values)) + 1e-12)
    assert np.all(adjusted >= stats.false_discovery_control(values) - 1e-12)


def test_a_known_example():
    assert holm_adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))


def test_a_p_value_outside_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match=r"numbers in 0\.\.1"):
        holm_adjusted([0.5, 1.5])
