"""The front of score and cost, the choice from it, and preferences in words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copa_harness.errors import ConfigurationError
from copa_harness.optimize.finalists import pareto_front, preferred
from copa_harness.optimize.options import Preference, parse_preference

POINTS = st.lists(
    st.tuples(st.sampled_from([i / 20 for i in range(21)]), st.integers(1, 30).map(float)), min_size=1, max_size=12
)


@given(POINTS)
def test_the_front_holds_exactly_what_nothing_beats(points):
    front = pareto_front(points)

    def beaten(i):
        s, c = points[i]
        return any(t >= s and d <= c and (t > s or d < c) for t, d in points)

    assert {points[i] for i in front} == {points[i] for i in range(len(points)) if not beaten(i)}
    assert [points[i][1] for i in front] == sorted(points[i][1] for i in front)


@given(POINTS, st.sampled_from([0.0, 0.01, 0.1, 1.0]))
def test_the_preferred_is_on_the_front_and_within_what_was_allowed(points, within):
    chosen = preferred(points, within=within)
    best = max(score for score, _ in points)
    assert points[chosen][0] >= best - within - 1e-9
    assert points[chosen] in [points[i] for i in pareto_front(points)]
    assert all(cost >= points[chosen][1] for score, cost in points if score >= best - within)


def test_the_preferred_is_never_below_what_came_in():
    assert preferred([(0.80, 1.0), (0.85, 5.0), (0.90, 9.0)], within=0.2, at_least=0.85) == 1


def test_preferences_are_written_in_words():
    assert parse_preference("cheapest within 1 point of best") == Preference("usd", 0.01)
    assert parse_preference(" Shortest within 2.5 points of the best ") == Preference("prompt_tokens", 0.025)
    assert parse_preference("best") is parse_preference(None) is None
    assert str(Preference("seconds", 0.02)) == "fastest within 2 points of best"
    with pytest.raises(ConfigurationError, match="cheapest within 1 point of best"):
        parse_preference("cheap")


def test_a_preference_is_said_in_the_number_it_has():
    assert str(parse_preference("cheapest within 1 points of best")) == "cheapest within 1 point of best"
    assert str(parse_preference("cheapest within 2 points of best")) == "cheapest within 2 points of best"
