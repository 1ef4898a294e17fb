"""Arguments of the `copa` marker: checked by name and type, with a message that names the nearest known one.

The same checks hold for gates given to `copa_run.check(...)` and, as defaults, in the ini file. Knows nothing of
pytest, models or files; imports nothing heavy.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from copa_harness.errors import ConfigurationError
from copa_harness.optimize.budgets import parse_budget
from copa_harness.optimize.pareto import parse_preference
from copa_harness.optimize.strategy import parse_strategy
from copa_harness.tune.settings import check_lora

DEFAULT_STRATEGY = "p -> w -> p"

GATES = (
    "min_score", "max_regression", "better_than", "max_calls", "max_tokens", "max_usd", "max_seconds",
    "max_cost_per_answer", "max_error_rate", "min_pass_all", "undecided_fails",
)  # fmt: skip
"""Marker arguments that are gates; each has an ini default `copa_<name>`."""

COMPARING = ("max_regression", "better_than")
"""Gates that compare example by example; those of a suite share one error rate."""




def comparisons_in(code: Any) -> frozenset[str]:
    """The comparing gates that a test function names when it calls `check()`, read from its code.

    Keyword names of a call are constants of the code that makes it, so nothing is run. Gates that a helper elsewhere
    asks for, or that come as `**gates`, are not seen.

    Args:
        code: `__code__` of a function.
    """
    if "check" not in code.co_names:
        return frozenset()
    names = {name for constant in code.co_consts if isinstance(constant, tuple) for name in constant}
    return frozenset(name for name in COMPARING if name in names)


@dataclass(frozen=True, slots=True)
class MarkerArguments:
    """What `@pytest.mark.copa(...)` may say; None leaves it to the settings.

    Attributes:
        strategy: How weights and prompts are searched, for instance `"p -> w -> p"`.
        budget: `"light"`, `"medium"`, `"heavy"`, `"calls=500"` or a number of calls.
        min_score: Gate: the mean test score must reach this, 0..1.
        max_regression: Gate: the largest drop below the baseline that is acceptable, 0..1.
        better_than: Gate: a strategy run earlier, or a baseline, that must be beaten.
        max_calls: Gate: distinct model calls the optimization may make.
        max_tokens: Gate: tokens the optimization may pay for.
        max_usd: Gate: dollars the optimization may cost.
        max_seconds: Gate: seconds the optimization may take.
        max_cost_per_answer: Gate: dollars one answer of the final program may cost.
        max_error_rate: Gate: share of test examples that may lack a score, 0..1.
        min_pass_all: Gate: share of test examples that must pass every repeat, 0..1.
        lm: Base model.
        prompt_lm: Model that proposes instructions.
        seed: Seed of every random choice.
        threads: Examples in flight at once.
        constrain: Whether output fields with a list of allowed values get the likeliest of them.
        max_cycles: Rounds of an alternating strategy at most.
        epsilon: Improvement per round below which an alternating strategy has converged, 0..1.
        constraints: Limits the returned program keeps: `{"max_prompt_tokens": 800, "forbidden_text": ["..."]}`.
        prefer: `"best"`, or `"cheapest within 1 point of best"` (also `shortest`, `fastest`).
        optimizer_kwargs: Arguments of DSPy optimizers by name: `{"miprov2": {"num_trials": 5}}`.
        lora: Settings of the fine-tuning by name: `{"rank": 8, "epochs": 3}`; see `LoraSettings`.
        undecided_fails: Whether gates that are undecided or not comparable fail the test.
    """

    strategy: str | None = None
    budget: str | int | None = None
    min_score: float | None = None
    max_regression: float | None = None
    better_than: str | None = None
    max_calls: int | None = None
    max_tokens: float | None = None
    max_usd: float | None = None
    max_seconds: float | None = None
    max_cost_per_answer: float | None = None
    max_error_rate: float | None = None
    min_pass_all: float | None = None
    lm: str | None = None
    prompt_lm: str | None = None
    seed: int | None = None
    threads: int | None = None
    constrain: bool | None = None
    max_cycles: int | None = None
    epsilon: float | None = None
    constraints: Mapping[str, Any] | None = None
    prefer: str | None = None
    optimizer_kwargs: Mapping[str, Any] | None = None
    lora: Mapping[str, Any] | None = None
    undecided_fails: bool | None = None

    @classmethod
    def from_marker(cls, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> MarkerArguments:
        """Checked arguments of a marker.

        Raises:
            ConfigurationError: An unknown or ill-typed argument, by name, with the nearest known one.
        """
        if arguments:
            raise ConfigurationError(
                f"copa marker: got the positional argument {arguments[0]!r}; expected keywords, "
                f"for instance copa(strategy={arguments[0]!r})."
            )
        check_arguments(keywords, known=[entry.name for entry in fields(cls)], where="copa marker")
        marker = cls(**keywords)
        try:
            if marker.strategy is not None:
                parse_strategy(marker.strategy)
            parse_preference(marker.prefer)
            if marker.budget is not None:
                parse_budget(marker.budget)
            if marker.lora is not None:
                check_lora(marker.lora)
        except ConfigurationError as error:
            raise ConfigurationError(f"copa marker: {error}") from None
        return marker


def check_arguments(given: Mapping[str, Any], *, known: Sequence[str], where: str) -> None:
    """Raise unless every argument is known and of a usable value; None is always usable.

    Raises:
        ConfigurationError: An unknown or ill-typed argument, by name, with the nearest known one.
    """
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(
                f"{where}: unknown argument {name!r}.{meant} Known arguments: {', '.join(known)}."
            )
        accepts, expected = _CHECKS[name]
        if value is not None and not accepts(value):
            in_percent = accepts is _is_share and type(value) in (int, float) and 1 < value <= 100
            meant = f"; write {value / 100:g} for {value:g} %" if in_percent else ""
            raise ConfigurationError(f"{where}: {name}={value!r}; expected {expected}{meant}.")


def parse_gate(name: str, text: str) -> Any:
    """A gate's value as an ini file writes it.

    Raises:
        ConfigurationError: It is none.
    """
    value: Any = text.strip()
    if name == "undecided_fails":
        value = {**dict.fromkeys(_YES, True), **dict.fromkeys(_NO, False)}.get(value.lower(), value)
    elif name != "better_than":
        try:
            number = float(value)
            value = int(number) if name == "max_calls" and number.is_integer() else number
        except ValueError:
            pass  # the check below says what was expected
    accepts, expected = _CHECKS[name]
    if not accepts(value):
        raise ConfigurationError(f"got {text!r}, expected {expected}.")
    return value


_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 1.0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


_SHARE = (_is_share, "a number from 0 to 1")
_COUNT = (_is_count, "a whole number, 0 or more")
_AMOUNT = (_is_amount, "a number, 0 or more")
_POSITIVE = (_is_positive, "a whole number, 1 or more")
_MODEL = (_is_text, "a model, for instance 'embedded', 'hf:<path>' or 'openai/<name>'")

_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "strategy": (_is_text, "a strategy, for instance 'p -> w -> p'"),
    "budget": (
        lambda value: _is_text(value) or _is_positive(value),
        "'light', 'medium', 'heavy', 'calls=500,usd=2' or a number",
    ),
    "min_score": _SHARE,
    "max_regression": _SHARE,
    "max_calls": _COUNT,
    "max_tokens": _AMOUNT,
    "max_usd": _AMOUNT,
    "max_seconds": _AMOUNT,
    "max_cost_per_answer": _AMOUNT,
    "max_error_rate": _SHARE,
    "min_pass_all": _SHARE,
    "better_than": (_is_text, "the name of a strategy or baseline, for instance 'none'"),
    "lm": _MODEL,
    "prompt_lm": _MODEL,
    "seed": _COUNT,
    "threads": _POSITIVE,
    "constrain": (lambda value: isinstance(value, bool), "True or False"),
    "max_cycles": _POSITIVE,
    "epsilon": _SHARE,
    "constraints": (
        lambda value: isinstance(value, Mapping) and bool(value),
        "a dictionary of limits, for instance {'max_prompt_tokens': 800}",
    ),
    "prefer": (_is_text, "'best' or 'cheapest within 1 point of best'"),
    "optimizer_kwargs": (
        lambda value: isinstance(value, Mapping) and all(isinstance(part, Mapping) for part in value.values()),
        "a dictionary of keyword arguments by optimizer, for instance {'miprov2': {'num_trials': 5}}",
    ),
    "lora": (
        lambda value: isinstance(value, Mapping),
        "a dictionary of LoRA settings, for instance {'rank': 8, 'epochs': 3}",
    ),
    "undecided_fails": (lambda value: isinstance(value, bool), "True or False"),
}
