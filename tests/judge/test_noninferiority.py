import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from copa_harness.judge.exact_tests import exact_share_p_value, skewed_t_p_value
from copa_harness.judge.noninferiority import noninferiority
from copa_harness.judge.paired_tests import PairedScores
from copa_harness.results import Verdict


def pairs_of(gained, lost, same):
    before = [0.0] * gained + [1.0] * lost + [1.0] * same
    after = [1.0] * gained + [0.0] * lost + [1.0] * same
    return PairedScores(tuple(f"e{i:05}" for i in range(len(before))), tuple(before), tuple(after))


def graded(before, after):
    return PairedScores(tuple(f"e{i:05}" for i in range(len(before))), tuple(before), tuple(after))


@settings(deadline=None, max_examples=40)
@given(gained=st.integers(0, 15), lost=st.integers(0, 15), same=st.integers(1, 60))
def test_with_no_margin_whatever_mcnemar_shows_is_shown(gained, lost, same):
    answer = noninferiority(pairs_of(gained, lost, same), margin=0.0)
    if stats.binom.cdf(gained, gained + lost, 0.5) <= 0.049:
        assert answer.verdict is Verdict.FAIL
    if stats.binom.cdf(lost, gained + lost, 0.5) <= 0.049:
        assert answer.verdict is Verdict.PASS


@settings(deadline=None, max_examples=50)
@given(
    gained=st.integers(0, 15),
    lost=st.integers(0, 15),
    same=st.integers(1, 60),
    margin=st.sampled_from([0.01, 0.05, 0.1, 0.3]),
)
def test_a_failure_needs_evidence_of_a_drop_as_large_as_the_margin(gained, lost, same, margin):
    answer = noninferiority(pairs_of(gained, lost, same), margin=margin)
    shown, large = answer.p_any_drop <= 0.05, answer.paired.difference <= -margin + 1e-9
    assert (answer.verdict is Verdict.FAIL) == (shown and large)
    if answer.verdict is Verdict.PASS:
        assert answer.paired.interval.low > -margin
        assert answer.p_not_worse <= 0.05
    else:
        assert answer.paired.interval.low <= -margin


def test_a_drop_that_is_shown_and_larger_than_the_margin_fails_though_the_margin_itself_is_not_refuted():
    answer = noninferiority(pairs_of(4, 16, 60), margin=0.05)
    assert answer.verdict is Verdict.FAIL
    assert answer.p_any_drop < 0.01
    assert noninferiority(pairs_of(1, 9, 65), margin=0.05).p_worse > 0.05
    assert noninferiority(pairs_of(1, 9, 65), margin=0.05).verdict is Verdict.FAIL


def test_a_pass_does_not_share_its_error_rate_and_a_failure_does():
    identical, lost = pairs_of(0, 0, 75), pairs_of(1, 8, 66)
    assert noninferiority(identical, margin=0.05, alpha_fail=0.001).verdict is Verdict.PASS
    assert noninferiority(lost, margin=0.05).verdict is Verdict.FAIL
    assert noninferiority(lost, margin=0.05, alpha_fail=0.001).verdict is Verdict.UNDECIDED


@settings(deadline=None, max_examples=12)
@given(gained=st.integers(0, 10), lost=st.integers(0, 10), same=st.integers(5, 60))
def test_a_wider_margin_never_turns_a_pass_into_a_failure(gained, lost, same):
    order = [Verdict.FAIL, Verdict.UNDECIDED, Verdict.PASS]
    ranks = [
        order.index(noninferiority(pairs_of(gained, lost, same), margin=m).verdict) for m in (0.02, 0.05, 0.1, 0.3, 0.6)
    ]
    assert ranks == sorted(ranks)


def test_an_unchanged_program_passes_a_margin_that_the_rows_can_resolve_and_not_a_finer_one():
    assert noninferiority(pairs_of(0, 0, 75), margin=0.05).verdict is Verdict.PASS
    fine = noninferiority(pairs_of(0, 0, 75), margin=0.01)
    assert fine.verdict is Verdict.UNDECIDED
    assert fine.rows_to_decide is not None
    assert fine.rows_to_decide == pytest.approx(math.log(0.05) / math.log(0.99), abs=2)


def test_an_undecided_answer_says_how_many_rows_which_drop_and_how_much_can_be_lost():
    answer = noninferiority(pairs_of(2, 6, 67), margin=0.05)
    assert answer.verdict is Verdict.UNDECIDED
    assert answer.smallest_visible_drop > 0.05
    assert answer.rows_to_decide > 75
    assert answer.most_lost > 4 / 75


def test_the_rows_that_would_decide_do_not_depend_on_the_difference_that_was_measured():
    down, up = (noninferiority(pairs_of(*moved), margin=0.01) for moved in ((3, 5, 67), (5, 3, 67)))
    assert down.rows_to_decide == up.rows_to_decide


@pytest.mark.parametrize(("n", "disagreement"), [(50, 0.2), (100, 0.1), (100, 0.3)])
def test_an_unchanged_program_is_failed_in_at_most_five_percent_of_runs(n, disagreement):
    # Exact: all outcomes of (gained, lost) weighted by their probability.
    alarm = 0.0
    moved_at_most = int(stats.binom.ppf(1 - 1e-6, n, disagreement))
    for moved in range(1, moved_at_most + 1):
        # Failing is monotone in `lost`: find where it starts by bisection.
        low, high = 0, moved + 1
        while low < high:
            lost = (low + high) // 2
            failed = exact_share_p_value(moved - lost, lost, n, difference=0.0, alternative="less") <= 0.05
            low, high = (low, lost) if failed else (lost + 1, high)
        alarm += stats.binom.pmf(moved, n, disagreement) * stats.binom.sf(low - 1, moved, 0.5)
    assert alarm <= 0.05


def test_small_graded_changes_pass_by_the_t_test_and_say_that_it_is_approximate():
    rng = np.random.default_rng(5)
    before = rng.uniform(0.3, 0.7, 75)
    answer = noninferiority(graded(before, before + rng.normal(0, 0.15, 75)), margin=0.05)
    assert answer.verdict is Verdict.PASS
    assert answer.method == "t test corrected for skewness, approximate"


def test_few_large_losses_among_small_gains_do_not_pass_by_the_t_test_oftener_than_allowed():
    rng, passed, runs = np.random.default_rng(6), 0, 300
    for _ in range(runs):
        draws = rng.random(60)
        change = np.where(draws < 0.1, -0.8, np.where(draws < 0.4, 0.1, 0.0))  # mean: -0.05, the margin
        passed += skewed_t_p_value(change, np.ones(60), mean=-0.05, alternative="greater") <= 0.05
    assert passed / runs <= 0.05 + 2.4 * math.sqrt(0.05 * 0.95 / runs)


def test_graded_scores_are_decided_too():
    rng = np.random.default_rng(1)
    before = rng.beta(6, 3, 120)
    noise = rng.normal(0, 0.03, 120)
    same = noninferiority(graded(before, np.clip(before + noise, 0, 1)), margin=0.05)
    worse = noninferiority(graded(before, np.clip(before + noise - 0.15, 0, 1)), margin=0.05)
    assert same.verdict is Verdict.PASS
    assert worse.verdict is Verdict.FAIL
    assert worse.paired.method == "paired permutation"


def test_more_than_a_thousand_graded_rows_are_decided():
    rng = np.random.default_rng(2)
    before = rng.beta(4, 2, 1200)
    answer = noninferiority(graded(before, np.clip(before + rng.normal(0, 0.1, 1200), 0, 1)), margin=0.05)
    assert answer.verdict is Verdict.PASS


def test_one_graded_row_decides_nothing():
    assert noninferiority(graded([0.9], [0.1]), margin=0.05).verdict is Verdict.UNDECIDED


@pytest.mark.parametrize("margin", [-0.1, 1.5, math.nan])
def test_a_margin_that_is_no_drop_is_refused(margin):
    with pytest.raises(ValueError, match=r"such as 0\.05"):
        noninferiority(pairs_of(1, 1, 1), margin=margin)


def test_nothing_in_common_is_refused():
    with pytest.raises(ValueError, match="no examples in common"):
        noninferiority(PairedScores((), (), ()), margin=0.05)
