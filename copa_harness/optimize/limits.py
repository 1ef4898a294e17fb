"""The words of `constraints={...}` and `optimizer_kwargs={...}`, checked where they are written.

Plain Python, so that a wrong name or value is refused before anything heavy is loaded (a marker is read when tests are
collected). Knows what may be said; knows nothing of prompts, costs or how an optimizer is run. Keyword names of DSPy's
own classes are read from its source (`keywords`), and checked again when one is built (`arguments`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from copa_harness.errors import ConfigurationError
from copa_harness.optimize.keywords import keywords_of
from copa_harness.optimize.strategy import OPTIMIZER_NAMES

LIMITS: tuple[str, ...] = (
    "max_prompt_tokens", "forbidden_text", "required_text", "max_usd_per_answer", "max_seconds_per_answer",
)  # fmt: skip
"""What may be limited; the attributes of `Constraints`."""

KNN_KWARGS: tuple[str, ...] = ("k", "vectorizer", "max_bootstrapped_demos", "max_labeled_demos")
"""Arguments of `knn_fewshot`, which is ours."""

ENSEMBLE_KWARGS: tuple[str, ...] = ("size", "reduce")
"""Arguments of the step `ensemble`, which is ours."""

_OURS: dict[str, tuple[str, ...]] = {"knn_fewshot": KNN_KWARGS, "ensemble": ENSEMBLE_KWARGS}


def parse_limits(given: Any) -> dict[str, Any]:
    """Checked limits by name; texts as tuples, and none that is None.

    Args:
        given: A dictionary with some of `LIMITS`.

    Raises:
        ConfigurationError: An unknown name or an impossible value.
    """
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"got constraints={given!r}; expected a dictionary with some of {', '.join(LIMITS)}")
    if unknown := sorted(map(str, set(given) - set(LIMITS))):
        raise ConfigurationError(
            f"got constraints {unknown}; expected some of {', '.join(LIMITS)}{_meant(unknown[0], LIMITS)}"
        )
    values: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        values[name] = _texts(name, value) if name.endswith("_text") else _limit(name, value)
    for text in values.get("required_text", ()):
        for forbidden in values.get("forbidden_text", ()):
            if forbidden.casefold() in text.casefold():
                raise ConfigurationError(
                    f"got {text!r} as required and {forbidden!r} as forbidden text: no prompt keeps both"
                )
    return values


def check_optimizer_kwargs(given: Mapping[str, Any]) -> None:
    """Raise unless every name is a known optimizer's and its arguments are a dictionary with names.

    Names of arguments are checked as far as they are known without DSPy: all of ours, and what `keywords` can read.

    Raises:
        ConfigurationError: The first that is not, with the nearest known one.
    """
    known = (*OPTIMIZER_NAMES, "ensemble")
    if unknown := sorted(map(str, set(given) - set(known))):
        raise ConfigurationError(
            f"got optimizer_kwargs for {unknown}; expected some of {', '.join(known)}{_meant(unknown[0], known)}"
        )
    for name, arguments in given.items():
        if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
            raise ConfigurationError(
                f"got optimizer_kwargs {arguments!r} for {name}; expected a dictionary of its arguments by name"
            )
        known_here = _OURS.get(name) or keywords_of(name)
        if known_here is not None:
            check_kwargs(name, arguments, known=known_here)


def check_kwargs(name: str, given: Iterable[str], *, known: Iterable[str]) -> None:
    """Raise `ConfigurationError` unless every argument of the optimizer `name` is a known one."""
    wanted = sorted(known)
    if unknown := sorted(set(given) - set(wanted)):
        raise ConfigurationError(
            f"got optimizer_kwargs {unknown} for {name}; expected some of {', '.join(wanted)}"
            f"{_meant(unknown[0], wanted)}"
        )


def _meant(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f". Did you mean {near[0]!r}?" if near else ""


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ConfigurationError(f"got {name}={value!r}; expected a text or a list of texts, none of them empty")
    return texts


def _limit(name: str, value: Any) -> float:
    whole = name == "max_prompt_tokens"
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    if not number or (whole and not (isinstance(value, int) and value >= 1)):
        wanted = "a whole number of at least 1" if whole else "a number of at least 0"
        raise ConfigurationError(f"got {name}={value!r}; expected {wanted}")
    return value  # type: ignore[no-any-return]
