"""The racing rule."""

import numpy as np
import optuna
import pytest
from scipy.stats import binomtest, permutation_test

from copa_harness.optimize.search.racing import RacingPruner, cannot_catch_up, worse_p_value


def race(before, after, *, pruner=None):
    """Whether a trial with these scores is dropped against a best trial with those."""
    study = optuna.create_study(direction="maximize", pruner=pruner or RacingPruner())
    best = study.ask()
    for step, score in enumerate(before):
        best.report(score, step)
    study.tell(best, float(np.mean(before)))
    trial = study.ask()
    for step, score in enumerate(after):
        trial.report(score, step)
    return trial.should_prune()


@pytest.mark.parametrize(("wins", "losses"), [(0, 4), (1, 6), (3, 3), (5, 1), (0, 0)])
def test_the_worse_p_value_is_scipys_one_sided_binomial_test(wins, losses):
    before = [0.0] * wins + [1.0] * losses + [1.0]
    after = [1.0] * wins + [0.0] * losses + [1.0]
    n = wins + losses
    expected = binomtest(wins, n, 0.5, alternative="less").pvalue if n else 1.0
    assert worse_p_value(before, after) == pytest.approx(expected)


def test_graded_differences_are_counted_over_all_sign_patterns():
    differences = [-0.3, -0.2, 0.1, -0.25]
    expected = permutation_test(
        (differences,), np.mean, permutation_type="samples", alternative="less", n_resamples=np.inf
    ).pvalue
    assert worse_p_value([0.5] * 4, [0.5 + d for d in differences]) == pytest.approx(expected)


def test_many_graded_differences_are_judged_by_the_normal_approximation():
    generator = np.random.default_rng(1)
    differences = generator.normal(-0.1, 0.2, 13)
    few = permutation_test(
        (differences,), np.mean, permutation_type="samples", alternative="less", n_resamples=9999, rng=generator
    ).pvalue
    assert worse_p_value([0.5] * 13, list(0.5 + differences)) == pytest.approx(few, abs=0.03)


def test_a_trial_is_dropped_when_full_marks_cannot_save_it():
    assert cannot_catch_up([1.0] * 10, [0.0])
    assert not cannot_catch_up([1.0] * 9 + [0.0], [0.0])
    assert race([1.0] * 10, [1.0, 1.0, 0.0])


def test_a_trial_that_could_still_tie_goes_on():
    assert not race([1.0] * 9 + [0.0], [1.0, 1.0, 0.0])


def test_a_trial_that_could_at_best_tie_is_dropped_where_a_tie_does_not_win():
    before = [0.0, *[1.0] * 9]
    assert cannot_catch_up(before, [0.0, 1.0, 1.0], ties_lose=True)
    assert not cannot_catch_up(before, [0.0, 1.0, 1.0])
    assert not cannot_catch_up(before, [1.0, 1.0, 1.0], ties_lose=True)
    pruner = RacingPruner()
    pruner.race_against(None, ties_lose=True)
    assert race(before, [0.0, 1.0, 1.0], pruner=pruner)


def test_four_losses_and_no_win_end_a_right_wrong_trial():
    before = [1.0] * 8 + [0.0] * 30
    assert race(before, [0.0] * 4)
    assert not race(before, [0.0] * 3)


def test_graded_scores_are_raced_too():
    before = [0.8] * 8 + [0.2] * 30
    assert race(before, [0.8 - 0.05 * (i + 1) for i in range(8)])
    assert not race(before, [0.8 + 0.02 * (i + 1) for i in range(8)])


def test_without_an_incumbent_nothing_is_dropped():
    study = optuna.create_study(direction="maximize", pruner=RacingPruner())
    trial = study.ask()
    trial.report(0.0, 0)
    assert not trial.should_prune()


def test_an_equally_good_candidate_is_rarely_dropped_and_a_bad_one_mostly():
    generator = np.random.default_rng(0)
    n, blocks = 48, (12, 24, 36)
    dropped = {0.0: 0, 0.3: 0}
    runs = 150
    for drop in dropped:
        for _ in range(runs):
            before = (generator.random(n) < 0.6).astype(float)
            after = (generator.random(n) < 0.6 - drop).astype(float)
            dropped[drop] += any(race(list(before), list(after[:seen])) for seen in blocks)
    assert dropped[0.0] / runs < 0.25
    assert dropped[0.3] / runs > 0.75
