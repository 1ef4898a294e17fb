import numpy as np
import pytest
from scipy import stats

from copa_harness.judge.paired_tests import mcnemar_p_value
from copa_harness.judge.power import mcnemar_power, sequential_power


def test_the_power_is_that_of_all_outcomes_weighted_by_their_probability():
    n, drop, disagreement = 12, 0.3, 0.5
    expected = 0.0
    for lost in range(n + 1):
        for gained in range(n - lost + 1):
            chance = stats.multinomial.pmf([gained, lost, n - gained - lost], n, [0.1, 0.4, 0.5])
            expected += chance * (mcnemar_p_value(gained, lost, alternative="less") <= 0.05)
    assert mcnemar_power(n, drop=drop, disagreement=disagreement) == pytest.approx(expected)


def test_nothing_that_moves_is_never_shown():
    assert mcnemar_power(100, drop=0.0, disagreement=0.0) == 0.0


# Simulated, 4,000 runs each: the table of the design notes.
@pytest.mark.parametrize(
    ("n", "disagreement", "drop", "power"),
    [
        (100, 0.1, 0.05, 0.34),
        (100, 0.1, 0.1, 0.98),
        (200, 0.1, 0.05, 0.68),
        (300, 0.2, 0.05, 0.58),
        (500, 0.2, 0.05, 0.77),
    ],
)
def test_the_power_is_the_simulated_one(n, disagreement, drop, power):
    assert mcnemar_power(n, drop=drop, disagreement=disagreement) == pytest.approx(power, abs=0.025)


def test_stopping_early_saves_rows_and_costs_little_power_on_a_large_drop():
    answer = sequential_power(300, drop=0.1, disagreement=0.2)
    assert answer.fixed == pytest.approx(mcnemar_power(300, drop=0.1, disagreement=0.2), abs=0.03)
    assert answer.mean_rows < 0.6 * 300
    assert answer.fixed - 0.05 <= answer.sequential <= answer.fixed + 1e-9


@pytest.mark.parametrize("margin", [0.0, 0.03])
def test_an_unchanged_program_alarms_in_at_most_five_percent_however_often_one_looks(margin):
    answer = sequential_power(200, drop=0.0, disagreement=0.2, margin=margin, seed=3)
    assert answer.sequential <= 0.05 + 2.4 * np.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.parametrize(
    ("n", "drop", "disagreement"), [(0, 0.1, 0.2), (10, 0.3, 0.2), (10, -0.1, 0.2), (10, 0.1, 1.2)]
)
def test_impossible_drops_are_refused(n, drop, disagreement):
    with pytest.raises(ValueError, match="moves at least a share x"):
        mcnemar_power(n, drop=drop, disagreement=disagreement)
