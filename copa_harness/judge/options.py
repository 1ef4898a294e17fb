"""The gates there are: which values each takes, what it means, and where it may be given.

Plain words and numbers, so that the pytest plugin reads them before anything heavy is loaded; `gates` judges by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from copa_harness.option_fields import (
    AMOUNT,
    COUNT,
    SHARE,
    SWITCH,
    Place,
    check_fields,
    number_check,
    option,
    text_check,
)

_gate = partial(option, places=Place.MARKER | Place.INI)
"""In the marker, in `check()`, or by default in the ini file. Not in the environment: nobody lowers one by accident."""

_ours = partial(option, places=Place(0))
"""What the session says, not the test."""


@dataclass(frozen=True, slots=True)
class Gates:
    """The rules one run is held to; None switches a rule off.

    Raises:
        ConfigurationError: A value is out of range.
    """

    min_score: float | None = _gate(None, check=SHARE, example="0.85", help="least mean score on the test split")
    max_regression: float | None = _gate(
        None,
        check=SHARE,
        example="0.05",
        help="largest drop below the baseline that is acceptable; 0.05 is five points",
    )
    better_than: str | None = _gate(
        None,
        check=text_check("the name of a strategy or baseline, for instance 'none'"),
        help="strategy run earlier, or baseline, that has to be beaten",
    )
    max_calls: float | None = _gate(
        None, check=COUNT, example="400", help="most distinct model calls the optimization may make"
    )
    max_tokens: float | None = _gate(
        None, check=AMOUNT, example="50000", help="most tokens the optimization may pay for"
    )
    max_usd: float | None = _gate(None, check=AMOUNT, example="0.50", help="most dollars the optimization may cost")
    max_seconds: float | None = _gate(None, check=AMOUNT, example="600", help="most seconds the optimization may take")
    max_cost_per_answer: float | None = _gate(
        None, check=AMOUNT, example="0.002", help="most dollars one answer of the final program may cost"
    )
    max_error_rate: float = _gate(
        0.0,
        check=SHARE,
        example="0.02",
        help="largest share of test examples without a score, because the model or the metric failed",
    )
    min_pass_all: float | None = _gate(
        None, check=SHARE, example="0.9", help="least share of test examples that pass every repeat (--copa-repeat)"
    )
    max_violation_rate: float | None = _gate(
        None,
        check=SHARE,
        example="0.1",
        help="largest share of the test examples right as given that may be wrong in a form that should change nothing "
        "(the search setting `perturbations`)",
    )
    undecided_fails: bool = _gate(
        False, check=SWITCH, help="whether gates that are undecided or not comparable fail the test"
    )
    alpha: float = _ours(
        0.05, check=number_check(0, 0.5), example="0.05", help="error rate of each statistical decision"
    )

    def __post_init__(self) -> None:
        check_fields(self, "gate {name}={value!r}: {problem}")
