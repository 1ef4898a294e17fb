"""Numbers are written for people, the same everywhere."""

import math

import pytest

from copa_harness.formatting import amount, ceiling, counted, dollars, duration, number, size


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [
        (0.7734, False, "0.773"),
        (0.05, True, "+0.050"),
        (-0.0001, True, "0.000"),
        (None, False, "-"),
        (math.nan, True, "-"),
    ],
)
def test_scores_have_three_decimals_and_nothing_is_minus_zero(value, signed, text):
    assert number(value, signed=signed) == text


def test_one_is_singular():
    assert [counted(n, "row") for n in (0, 1, 1500)] == ["0 rows", "1 row", "1,500 rows"]


def test_amounts_are_whole_where_they_are():
    assert [amount(value) for value in (1500.0, 0.25, 1 / 3)] == ["1,500", "0.25", "0.333333"]


def test_dollars_show_two_digits_of_what_is_less_than_one():
    assert [dollars(value) for value in (0, 1.5, 0.25, 0.00023, 1234)] == [
        "$0.00",
        "$1.50",
        "$0.25",
        "$0.00023",
        "$1,234.00",
    ]


def test_ceilings_are_named_as_people_say_them():
    assert [ceiling(*pair) for pair in (("usd", 2), ("calls", 400), ("input_tokens", 5e6))] == [
        "$2",
        "400 calls",
        "5,000,000 input tokens",
    ]


def test_sizes_have_the_unit_that_fits():
    assert [size(n) for n in (12, 2000, 812.4e6, 3.41e9)] == ["12 bytes", "2.0 kB", "812.4 MB", "3.4 GB"]
    assert [size(n, rough=True) for n in (12, 812.4e6, 3.41e9)] == ["0 MB", "812 MB", "3.4 GB"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_a_duration_reads_as_people_say_it(seconds, text):
    assert duration(seconds) == text


def test_an_estimated_duration_has_one_unit():
    assert [duration(seconds, rough=True) for seconds in (7.4, 600, 9000)] == ["7 s", "10 min", "2.5 h"]
