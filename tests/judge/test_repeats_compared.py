"""Two programs answered k times over the same examples: the comparison is between examples, whatever k is."""

import itertools
import math

import numpy as np
import pytest

from copa_harness.judge.flaky import example_means
from copa_harness.judge.noninferiority import noninferiority
from copa_harness.judge.paired_tests import PairedScores, pair_up, paired_difference, permutation_p_value
from copa_harness.results import Verdict


def pairs_of(before, after) -> PairedScores:
    """PairedScores of two arrays examples x repeats of scores, as the gates get them."""
    named = [{f"e{i:03}": tuple(map(float, row)) for i, row in enumerate(run)} for run in (before, after)]
    return pair_up(example_means(named[0]), example_means(named[1]))


@pytest.mark.parametrize("seed", range(8))
def test_the_p_value_is_that_of_swapping_all_answers_of_an_example_at_once(seed):
    rng = np.random.default_rng(seed)
    before, after = (rng.random((6, 3)) < 0.5, rng.random((6, 3)) < 0.8)
    pairs = pairs_of(before, after)
    found = paired_difference(PairedScores(pairs.ids, pairs.before, pairs.after))
    # By brute force: every example may have had its two columns of answers exchanged, 2^6 ways.
    means = []
    for swap in itertools.product((False, True), repeat=6):
        chosen = np.asarray(swap)[:, None]
        means.append(np.where(chosen, before, after).mean() - np.where(chosen, after, before).mean())
    observed, means = after.mean() - before.mean(), np.asarray(means)
    expected = 2 * min((means <= observed + 1e-9).mean(), (means >= observed - 1e-9).mean())
    assert found.difference == pytest.approx(observed)
    assert found.p_value == pytest.approx(min(1.0, expected))


def test_repeats_do_not_turn_luck_in_the_examples_into_evidence():
    """Two programs equally good at large, each at home with other examples: more answers are not more examples."""
    rng = np.random.default_rng(1)
    n, k, runs = 30, 5, 120
    alarms = pooled = 0
    for _ in range(runs):
        rates = rng.choice([0.1, 0.9], size=(2, n))
        before, after = ((rng.random((n, k)) < rate[:, None]).astype(float) for rate in rates)
        alarms += noninferiority(pairs_of(before, after), margin=0.0).verdict is Verdict.FAIL
        pooled += permutation_p_value((after - before).ravel(), alternative="less") <= 0.05
    noise = 3 * math.sqrt(0.05 * 0.95 / runs)
    assert alarms / runs <= 0.05 + noise
    assert pooled / runs > 0.1  # what taking repeats for examples would cost


def test_repeats_find_a_drop_that_one_answer_each_would_miss():
    """With a model that wavers, five answers each show what one answer each does not."""
    rng = np.random.default_rng(2)
    n, runs = 40, 40
    found = {1: 0, 5: 0}
    for _ in range(runs):
        before, after = rng.random((n, 5)) < 0.8, rng.random((n, 5)) < 0.6
        for k in found:
            found[k] += noninferiority(pairs_of(before[:, :k], after[:, :k]), margin=0.0).verdict is Verdict.FAIL
    assert found[5] >= found[1] + runs // 4
