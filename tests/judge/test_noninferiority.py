import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copa_harness.judge.noninferiority import noninferiority, rows_to_decide, smallest_visible_drop
from copa_harness.judge.paired_tests import PairedScores, mcnemar_p_value
from copa_harness.results import Verdict


def pairs_of(gained, lost, same):
    before = [0.0] * gained + [1.0] * lost + [1.0] * same
    after = [1.0] * gained + [0.0] * lost + [1.0] * same
    return PairedScores(tuple(f"e{i:05}" for i in range(len(before))), tuple(before), tuple(after))


def graded(before, after):
    return PairedScores(tuple(f"e{i:05}" for i in range(len(before))), tuple(before), tuple(after))


# Examples needed for 80 % power (exact McNemar), measured: the table of the design notes.
@pytest.mark.parametrize(
    ("drop", "disagreement", "rows"),
    [
        (0.02, 0.05, 771),
        (0.02, 0.10, 1544),
        (0.02, 0.15, 2317),
        (0.02, 0.20, 3090),
        (0.02, 0.30, 4635),
        (0.03, 0.05, 342),
        (0.03, 0.10, 685),
        (0.03, 0.15, 1029),
        (0.03, 0.20, 1372),
        (0.03, 0.30, 2059),
        (0.05, 0.10, 246),
        (0.05, 0.15, 369),
        (0.05, 0.20, 493),
        (0.05, 0.30, 740),
        (0.08, 0.10, 95),
        (0.08, 0.15, 143),
        (0.08, 0.20, 192),
        (0.08, 0.30, 288),
        (0.10, 0.15, 91),
        (0.10, 0.20, 122),
        (0.10, 0.30, 184),
    ],
)
def test_rows_needed_are_those_of_the_published_formula(drop, disagreement, rows):
    assert rows_to_decide(-drop, margin=0, variance=disagreement) == pytest.approx(rows, abs=1)


@given(
    n=st.integers(20, 2000),
    margin=st.sampled_from([0.0, 0.02, 0.05]),
    variance=st.floats(0.01, 0.5),
    binary=st.booleans(),
)
def test_the_smallest_visible_drop_is_where_the_rows_suffice(n, margin, variance, binary):
    drop = smallest_visible_drop(n, margin=margin, variance=variance, right_wrong=binary)
    assert drop >= margin
    if math.isfinite(drop):
        assert rows_to_decide(-min(1.0, drop * 1.01), margin=margin, variance=variance, right_wrong=binary) <= n * 1.01


def test_a_difference_on_the_margin_is_never_decided():
    assert rows_to_decide(-0.05, margin=0.05, variance=0.2) is None


@settings(deadline=None)
@given(gained=st.integers(0, 15), lost=st.integers(0, 15), same=st.integers(1, 60))
def test_with_no_margin_the_answer_is_exact_mcnemars(gained, lost, same):
    answer = noninferiority(pairs_of(gained, lost, same), margin=0.0)
    if mcnemar_p_value(gained, lost, alternative="less") <= 0.05:
        expected = Verdict.FAIL
    elif mcnemar_p_value(gained, lost, alternative="greater") <= 0.05:
        expected = Verdict.PASS
    else:
        expected = Verdict.UNDECIDED
    assert answer.verdict is expected


@settings(deadline=None)
@given(
    gained=st.integers(0, 15),
    lost=st.integers(0, 15),
    same=st.integers(1, 60),
    margin=st.sampled_from([0.01, 0.05, 0.1, 0.3]),
)
def test_a_failure_always_needs_evidence_of_a_drop(gained, lost, same, margin):
    answer = noninferiority(pairs_of(gained, lost, same), margin=margin)
    if answer.verdict is Verdict.FAIL:
        assert mcnemar_p_value(gained, lost, alternative="less") <= 0.05
        assert answer.paired.difference < -margin
    if answer.verdict is Verdict.PASS:
        assert answer.paired.difference > -margin


@settings(deadline=None, max_examples=30)
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
    assert fine.rows_to_decide > 75


def test_an_undecided_answer_says_how_many_rows_and_which_drop():
    answer = noninferiority(pairs_of(2, 6, 67), margin=0.05)
    assert answer.verdict is Verdict.UNDECIDED
    assert answer.smallest_visible_drop > 0.05
    assert answer.rows_to_decide is None or answer.rows_to_decide > 75


@pytest.mark.parametrize(("n", "disagreement"), [(50, 0.2), (100, 0.1), (100, 0.3)])
@pytest.mark.parametrize("margin", [0.0, 0.02, 0.05])
def test_an_unchanged_program_is_failed_in_at_most_five_percent_of_runs(n, disagreement, margin):
    # Exact: all outcomes of (gained, lost) weighted by their probability.
    from scipy import stats

    alarm = 0.0
    moved_at_most = int(stats.binom.ppf(1 - 1e-6, n, disagreement))
    for moved in range(moved_at_most + 1):
        weight = stats.binom.pmf(moved, n, disagreement)
        # Failing is monotone in `lost`: find where it starts by bisection.
        low, high = 0, moved + 1
        while low < high:
            lost = (low + high) // 2
            failed = noninferiority_verdict(moved - lost, lost, n, margin) is Verdict.FAIL
            low, high = (low, lost) if failed else (lost + 1, high)
        alarm += weight * stats.binom.sf(low - 1, moved, 0.5)
    assert alarm <= 0.05


def noninferiority_verdict(gained, lost, n, margin):
    """The verdict without intervals and rows, for enumeration (same functions as `noninferiority`)."""
    from copa_harness.judge.noninferiority import _one_sided

    differences = np.array([1.0] * gained + [-1.0] * lost + [0.0] * (n - gained - lost))
    p_not_worse, p_worse, p_any = _one_sided(differences, margin=margin, binary=True, seed=0)
    if p_worse <= 0.05 and p_any <= 0.05:
        return Verdict.FAIL
    return Verdict.PASS if p_not_worse <= 0.05 else Verdict.UNDECIDED


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
