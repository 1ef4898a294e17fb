"""What the racing rule promises for right/wrong scores, by simulation over random orders of the examples."""

import numpy as np
import pytest

from copa_harness.optimize.search.racing import cannot_catch_up, look_level, worse_p_value

LEVEL = 0.1


def drop_rate(n, block, *, wins, losses, level=LEVEL, n_races=300, seed=0):
    """How often a trial with so many wins and losses over all n examples is dropped before its last block."""
    generator = np.random.default_rng(seed)
    before = np.array([0.0] * wins + [1.0] * losses + [1.0] * (n - wins - losses))
    after = np.array([1.0] * wins + [0.0] * losses + [1.0] * (n - wins - losses))
    looks = range(block, n, block)
    per_look = look_level(level, len(looks))
    dropped = 0
    for _ in range(n_races):
        order = generator.permutation(n)
        for seen in looks:
            a, b = before[order], after[order[:seen]]
            if cannot_catch_up(a, b) or worse_p_value(a[:seen], b) < per_look:
                dropped += 1
                break
    return dropped / n_races


@pytest.mark.parametrize(("n", "block"), [(25, 7), (100, 25), (200, 32), (400, 50)])
def test_a_trial_that_would_end_equal_is_dropped_less_often_than_the_level(n, block):
    for each in (2, 6, min(n // 2 - 1, 40)):
        assert drop_rate(n, block, wins=each, losses=each) <= LEVEL


def test_a_trial_that_would_end_better_is_hardly_ever_dropped():
    assert drop_rate(25, 7, wins=5, losses=2) < 0.02
    assert drop_rate(200, 32, wins=30, losses=20) < 0.02


def test_a_clearly_worse_trial_is_mostly_dropped():
    assert drop_rate(100, 25, wins=2, losses=20) > 0.9


def test_more_looks_make_each_of_them_stricter_beyond_four():
    assert look_level(0.1, 1) == look_level(0.1, 4) == 0.1
    assert look_level(0.1, 12) == pytest.approx(0.1 / 3)
