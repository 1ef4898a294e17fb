"""Checks of arguments by name and type, with a message that names the nearest known one.

They hold for the marker, for gates given to `copa_run.check(...)` and, as defaults, in the ini file. Knows nothing of
what the arguments do; imports nothing heavy.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from copa_harness.errors import ConfigurationError


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
_SWITCH = (lambda value: isinstance(value, bool), "True or False")
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
    "constrain": _SWITCH,
    "max_cycles": _POSITIVE,
    "epsilon": _SHARE,
    "constraints": (
        lambda value: isinstance(value, Mapping) and bool(value),
        "a dictionary of limits, for instance {'max_prompt_tokens': 800}",
    ),
    "sampler": (_is_text, "'tpe', 'random' or 'gp'"),
    "patience": _POSITIVE,
    "adoption_p": _SHARE,
    "trials_at_once": _POSITIVE,
    "max_demos": _COUNT,
    "n_demo_sets": _COUNT,
    "bootstrap": _SWITCH,
    "pass_score": _SHARE,
    "n_proposed": _COUNT,
    "groundings": (lambda value: isinstance(value, (list, tuple)), "a list, for instance ['data', 'history']"),
    "n_reflected": _COUNT,
    "transfer": _SWITCH,
    "n_rounds": _POSITIVE,
    "n_checkpoints": _COUNT,
    "epochs_with_demos": _POSITIVE,
    "epochs_bare": _POSITIVE,
    "bare_share": _SHARE,
    "prefer": (_is_text, "'best' or 'cheapest within 1 point of best'"),
    "optimizer_kwargs": (
        lambda value: isinstance(value, Mapping) and all(isinstance(part, Mapping) for part in value.values()),
        "a dictionary of keyword arguments by optimizer, for instance {'miprov2': {'num_trials': 5}}",
    ),
    "lora": (
        lambda value: isinstance(value, Mapping),
        "a dictionary of LoRA settings, for instance {'rank': 8, 'epochs': 3}",
    ),
    "undecided_fails": _SWITCH,
}
