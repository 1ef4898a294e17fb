"""Budgets written as ceilings: every ceiling by name, levels among them, and one clear error for the rest."""

import pytest

from copa_harness.errors import ConfigurationError
from copa_harness.optimize.options import parse_budget


def test_every_ceiling_can_be_written():
    budget = parse_budget("calls=500,usd=2.5,tokens=1e6,input_tokens=9000,output_tokens=800,seconds=600,train_steps=40")
    assert budget.ceilings == {
        "calls": 500,
        "tokens": 1_000_000,
        "input_tokens": 9000,
        "output_tokens": 800,
        "usd": 2.5,
        "seconds": 600,
        "train_steps": 40,
    }


def test_a_level_may_stand_among_the_ceilings():
    assert parse_budget("light,usd=2").ceilings == {"calls": 400, "usd": 2}
    assert parse_budget("light,usd=2").name == "light,usd=2"


def test_a_thousands_separator_is_no_separator_of_ceilings():
    assert parse_budget("calls=1,500,usd=.5").ceilings == {"calls": 1500, "usd": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("calls=0", "at least 1"),
        ("usd=0", "above 0"),
        ("tokens=1.5", "whole number"),
        ("dollars=2", "ceiling on 'dollars'.*usd"),
        ("calls=5,calls=6", "two ceilings on calls"),
        ("light,calls=6", "two ceilings on calls"),
        ("calls=five", "expected 'light'"),
        ("", "expected 'light'"),
        ("usd=-1", "expected 'light'"),
    ],
)
def test_what_is_no_budget_is_told(text, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_budget(text)
