import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from copa_harness.judge.exact_tests import tango_bounds, tango_statistic
from copa_harness.judge.intervals import mean_interval
from copa_harness.judge.noninferiority import noninferiority
from copa_harness.judge.paired_tests import (
    GATE_LEVEL,
    PairedScores,
    pair_up,
    paired_difference,
    permutation_p_value,
    scores_by_id,
    sign_flip_sums,
)
from copa_harness.results import EvaluationResult, ExampleResult

bits = st.sampled_from([0.0, 1.0])
binary_pairs = st.lists(st.tuples(bits, bits), min_size=1, max_size=60)
graded_pairs = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=25)


def scores_of(pairs, groups=None):
    return PairedScores([f"e{i:04}" for i in range(len(pairs))], [b for b, _ in pairs], [a for _, a in pairs], groups)


def compare(pairs, **more):
    return paired_difference(scores_of(pairs), **more)


@settings(deadline=None, max_examples=20)
@given(binary_pairs, st.sampled_from([0.0, 0.05]))
def test_tables_and_gates_have_one_p_value(pairs, margin):
    """`copa baseline diff`, `copa compare` and the orientation of `not comparable` quote what the gate decides by."""
    shown, gate = compare(pairs, level=GATE_LEVEL), noninferiority(scores_of(pairs), margin=margin)
    if shown.difference < 0:
        assert shown.p_one_sided == pytest.approx(min(0.5, gate.p_any_drop))
    if shown.difference > 0 and margin == 0:
        assert shown.p_one_sided == pytest.approx(min(0.5, gate.p_not_worse))


@settings(deadline=None, max_examples=60)
@given(st.one_of(binary_pairs, graded_pairs), st.sampled_from([0.9, 0.95]), st.booleans())
def test_an_interval_leaves_out_0_only_where_the_test_does(pairs, level, grouped):
    groups = {f"e{i:04}": str(i // 3) for i in range(len(pairs))} if grouped else None
    found = paired_difference(scores_of(pairs, groups), level=level)
    if found.interval.low > 0 or found.interval.high < 0:
        assert found.p_value <= 1 - level + 1e-9
    if found.interval.low < 0 < found.interval.high:
        assert found.p_value > 1 - level


@settings(deadline=None, max_examples=30)
@given(
    differences=st.lists(st.sampled_from([-0.7, -0.5, -0.25, 0.0, 0.25, 0.3, 0.5]), min_size=1, max_size=8),
    alternative=st.sampled_from(["less", "greater"]),
)
def test_permutation_of_a_few_differences_is_enumerated_exactly(differences, alternative):
    moved = [d for d in differences if d]
    if not moved:
        assert permutation_p_value(np.array(differences), alternative=alternative) == 1.0
        return
    sums = [
        round(sum(s * d for s, d in zip(signs, moved, strict=True)), 9)
        for signs in itertools.product([-1, 1], repeat=len(moved))
    ]
    observed = round(sum(moved), 9)
    count = sum(total <= observed if alternative == "less" else total >= observed for total in sums)
    got = permutation_p_value(np.array(differences), alternative=alternative)
    assert got == pytest.approx(count / len(sums), abs=1e-9)


@pytest.mark.parametrize("alternative", ["two-sided", "less", "greater"])
@pytest.mark.parametrize("n", [7, 60])
def test_permutation_is_scipys_permutation_test(n, alternative):
    differences = np.random.default_rng(n).normal(0.05, 0.2, n)
    expected = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=9_999, alternative=alternative, rng=1
    ).pvalue
    got = permutation_p_value(differences, alternative=alternative)
    assert got == pytest.approx(expected, abs=1e-9 if n == 7 else 0.015)


def test_permutation_raises_false_alarms_no_oftener_than_it_says():
    rng = np.random.default_rng(5)
    p_values = [permutation_p_value(rng.normal(0, 0.2, 40), alternative="less", seed=i) for i in range(120)]
    assert sum(p <= 0.05 for p in p_values) <= 0.05 * 120 + 2.6 * math.sqrt(120 * 0.05 * 0.95)


@settings(deadline=None, max_examples=40)
@given(binary_pairs)
def test_on_right_wrong_scores_the_permutation_test_is_mcnemars(pairs):
    differences = np.array([a - b for b, a in pairs])
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    if 2 ** (gained + lost) > 9_999:
        return
    expected = stats.binom.cdf(gained, gained + lost, 0.5)
    assert permutation_p_value(differences, alternative="less") == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(binary_pairs)
def test_a_binary_difference_lies_inside_its_interval_and_counts_what_moved(pairs):
    result = compare(pairs)
    assert result.difference == pytest.approx(np.mean([a - b for b, a in pairs]), abs=1e-12)
    assert result.interval.low <= result.difference + 1e-9
    assert result.interval.high >= result.difference - 1e-9
    assert result.interval.low >= -1
    assert result.interval.high <= 1
    assert result.n_better + result.n_worse == round(result.disagreement * result.n)
    assert result.method == "exact unconditional test"


@settings(deadline=None, max_examples=25)
@given(graded_pairs)
def test_a_graded_difference_lies_inside_its_interval(pairs):
    result = compare(pairs)
    assert result.interval.low - 1e-9 <= result.difference <= result.interval.high + 1e-9
    assert 0 < result.p_value <= 1


@settings(deadline=None, max_examples=25)
@given(binary_pairs)
def test_swapping_the_runs_mirrors_the_answer(pairs):
    forward, backward = compare(pairs), compare([(a, b) for b, a in pairs])
    assert forward.difference == pytest.approx(-backward.difference)
    assert forward.p_value == pytest.approx(backward.p_value)
    assert forward.interval.low == pytest.approx(-backward.interval.high, abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(pairs=graded_pairs, seed=st.randoms(use_true_random=False))
def test_the_order_of_examples_does_not_matter(pairs, seed):
    ids = [f"e{i:04}" for i in range(len(pairs))]
    order = list(range(len(pairs)))
    seed.shuffle(order)
    straight = paired_difference(PairedScores(ids, [b for b, _ in pairs], [a for _, a in pairs]))
    shuffled = paired_difference(
        PairedScores([ids[i] for i in order], [pairs[i][0] for i in order], [pairs[i][1] for i in order])
    )
    assert straight == shuffled


@given(gained=st.integers(0, 30), lost=st.integers(0, 30), same=st.integers(0, 60))
def test_the_statistic_at_the_ends_of_tangos_interval_is_the_normal_quantile(gained, lost, same):
    n = gained + lost + same
    if not n:
        return
    low, high = tango_bounds(gained, lost, n, level=0.95)
    for bound, sign in ((low, 1), (high, -1)):
        if -1 < bound < 1 and abs(bound) > 1e-6:
            assert tango_statistic(gained, lost, n, difference=bound) == pytest.approx(sign * 1.959964, abs=1e-3)


@given(gained=st.integers(0, 20), lost=st.integers(0, 20), same=st.integers(0, 40), difference=st.floats(-0.9, 0.9))
def test_tangos_statistic_is_the_difference_over_its_standard_error_under_the_null(gained, lost, same, difference):
    n = gained + lost + same
    if not n:
        return
    a, c = 2 * n, -lost * difference * (1 - difference)
    b = -gained - lost + (2 * n - gained + lost) * difference
    share_lost = (math.sqrt(max(b * b - 4 * a * c, 0)) - b) / (2 * a)
    variance = n * (2 * share_lost + difference * (1 - difference))
    shown = gained - lost - n * difference
    got = tango_statistic(np.array([gained, gained]), np.array([lost, lost]), n, difference=difference)
    assert got[0] == got[1]
    if variance > 1e-9:
        assert got[0] == pytest.approx(shown / math.sqrt(variance), rel=1e-9, abs=1e-9)


def test_signs_of_several_columns_are_exchanged_together():
    differences = np.array([[0.5, 1.0], [-0.25, 0.0], [1.0, -1.0]])
    sums = sign_flip_sums(differences)
    expected = [np.asarray(signs) @ differences for signs in itertools.product([-1, 1], repeat=3)]
    assert sums.shape == (8, 2)
    assert sorted(map(tuple, sums)) == sorted(map(tuple, expected))
    assert sorted(sign_flip_sums(differences[:, 0])) == sorted(sums[:, 0])


def test_tangos_interval_without_any_change_has_the_closed_form():
    z2 = stats.norm.ppf(0.975) ** 2
    assert tango_bounds(0, 0, 44, level=0.95) == pytest.approx((-z2 / (44 + z2), z2 / (44 + z2)), abs=1e-6)


def test_the_statistic_at_zero_is_mcnemars():
    assert tango_statistic(12, 5, 100, difference=0.0) == pytest.approx((12 - 5) / math.sqrt(17))


def test_nothing_changed_is_no_evidence_but_not_certainty_either():
    result = compare([(1.0, 1.0)] * 40 + [(0.0, 0.0)] * 35)
    assert (result.difference, result.p_value) == (0.0, 1.0)
    assert -0.06 < result.interval.low < -0.04


def test_a_few_graded_changes_get_the_conservative_bound():
    result = compare([(0.5, 0.5)] * 40 + [(0.5, 0.6)] * 5)
    assert result.interval.method == "tango-bound"
    assert result.interval.low < 0 < result.interval.high


def test_the_same_graded_change_everywhere_is_certain_enough():
    result = compare([(0.5, 0.4)] * 30)
    assert result.difference == pytest.approx(-0.1)
    assert result.p_value < 0.01


def test_no_pairs_give_nan_and_the_widest_interval():
    result = paired_difference(PairedScores([], [], []))
    assert math.isnan(result.difference)
    assert (result.interval.low, result.interval.high, result.n) == (-1.0, 1.0, 0)


def test_repeated_ids_and_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="repeated example ids"):
        paired_difference(PairedScores(["a", "a"], [0, 1], [0, 1]))
    with pytest.raises(ValueError, match="equal lengths"):
        paired_difference(PairedScores(["a", "b"], [0, 1], [0]))
    with pytest.raises(ValueError, match=r"0\.\.1"):
        paired_difference(PairedScores(["a"], [0.0], [1.5]))


def test_pairing_leaves_out_what_has_no_score_and_counts_what_has_no_partner():
    pairs = pair_up({"a": 1.0, "b": None, "c": 0.0, "d": 1.0}, {"b": 1.0, "c": 1.0, "a": 0.0, "e": 0.5})
    assert pairs.ids == ("a", "c")
    assert (pairs.before, pairs.after) == ((1.0, 0.0), (0.0, 1.0))
    assert (pairs.n_only_before, pairs.n_only_after) == (1, 2)


def test_an_example_that_occurs_twice_is_paired_with_its_own_repeat():
    rows = tuple(ExampleResult(i, s) for i, s in (("a", 1.0), ("b", 0.0), ("a", 0.0)))
    scores = scores_by_id(EvaluationResult("test", "lm", rows, mean_interval([1, 0, 0])))
    assert scores == {"a": 1.0, "b": 0.0, "a#2": 0.0}
