import math

import pytest
from scipy import stats

from copa_harness.judge.exact_tests import exact_share_p_value
from copa_harness.judge.power import chance_to_fail, chance_to_pass, drop_to_see, rows_to_pass


def by_enumeration(n, *, drop, disagreement, decided):
    """Probability of the outcomes (gained, lost) that are decided, all of them weighted."""
    lost, gained = (disagreement + drop) / 2, (disagreement - drop) / 2
    return sum(
        stats.multinomial.pmf([g, lo, n - g - lo], n, [gained, lost, 1 - disagreement])
        for lo in range(n + 1)
        for g in range(n - lo + 1)
        if decided(g, lo)
    )


@pytest.mark.parametrize(("drop", "margin"), [(0.0, 0.0), (0.1, 0.05), (0.2, 0.1)])
def test_the_chance_to_fail_is_that_of_all_outcomes_weighted_by_their_probability(drop, margin):
    n = 24

    def fails(gained, lost):
        is_large = lost - gained >= margin * n - 1e-9 and lost > gained
        return is_large and exact_share_p_value(gained, lost, n, difference=0.0, alternative="less") <= 0.05

    expected = by_enumeration(n, drop=drop, disagreement=0.3, decided=fails)
    assert chance_to_fail(n, disagreement=0.3, drop=drop, margin=margin) == pytest.approx(expected, abs=0.01)


def test_the_chance_to_pass_is_that_of_all_outcomes_weighted_by_their_probability():
    def passes(gained, lost):
        return exact_share_p_value(gained, lost, 30, difference=-0.2, alternative="greater") <= 0.05

    expected = by_enumeration(30, drop=0.0, disagreement=0.2, decided=passes)
    assert chance_to_pass(30, disagreement=0.2, margin=0.2) == pytest.approx(expected, abs=0.02)


# The shipped setting, n = 75, margin .05, three gates: by an independent computation.
@pytest.mark.parametrize(
    ("disagreement", "drop", "power"),
    [(0.1, 0.0, 0.012), (0.1, 0.1, 0.881), (0.2, 0.0, 0.016), (0.2, 0.1, 0.433), (0.2, 0.15, 0.845)],
)
def test_a_true_drop_is_failed_as_often_as_promised(disagreement, drop, power):
    found = chance_to_fail(75, disagreement=disagreement, drop=drop, margin=0.05, alpha=0.05 / 3)
    assert found == pytest.approx(power, abs=0.005)


@pytest.mark.parametrize(("alpha", "rows"), [(0.05, 59), (0.05 / 3, 83)])
def test_where_nothing_moves_the_rows_are_those_of_the_binomial(alpha, rows):
    assert rows_to_pass(disagreement=0.0, margin=0.05, alpha=alpha) == pytest.approx(rows, abs=1)
    assert 0.95**rows <= alpha < 0.95 ** (rows - 4)


def test_the_rows_that_would_pass_pass():
    rows = rows_to_pass(disagreement=0.1, margin=0.05)
    assert chance_to_pass(rows, disagreement=0.1, margin=0.05) >= 0.8
    assert chance_to_pass(round(0.9 * rows), disagreement=0.1, margin=0.05) < 0.8
    assert rows_to_pass(disagreement=0.1, margin=0.0) is None


def test_the_drop_that_can_be_seen_is_seen():
    drop = drop_to_see(75, disagreement=0.1, margin=0.05)
    assert chance_to_fail(75, disagreement=0.1, drop=drop, margin=0.05) == pytest.approx(0.8, abs=0.02)
    assert math.isinf(drop_to_see(2, disagreement=0.1))


@pytest.mark.parametrize(("n", "drop", "disagreement"), [(0, 0.1, 0.2), (10, 0.3, 0.2), (10, 0.1, 1.2)])
def test_impossible_drops_are_refused(n, drop, disagreement):
    with pytest.raises(ValueError, match="moves at least a share x"):
        chance_to_fail(n, drop=drop, disagreement=disagreement)
