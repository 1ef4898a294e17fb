"""Budget levels in words."""

import pytest

from copa_harness.errors import ConfigurationError
from copa_harness.optimize.options import parse_budget
from copa_harness.results import Budget


@pytest.mark.parametrize(
    ("value", "calls"),
    [("light", 400), ("Medium", 1600), ("heavy", 6400), ("calls=500", 500), ("calls = 1_000", 1000), (75, 75)],
)
def test_a_budget_is_a_level_or_a_number_of_calls(value, calls):
    assert parse_budget(value).calls == calls


def test_a_budget_object_is_taken_as_it_is():
    budget = Budget(calls=3, name="mine")
    assert parse_budget(budget) is budget


@pytest.mark.parametrize("value", ["lite", 0, -1, "calls=0", True, None, 2.5, "calls=-4"])
def test_anything_else_is_refused_with_the_levels_named(value):
    with pytest.raises(ConfigurationError, match="calls"):
        parse_budget(value)
