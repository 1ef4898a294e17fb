"""Budget levels in words: `"light"`, `"calls=500"` or a number, as a `Budget`.

Imports nothing heavy: the pytest plugin prints the ceilings in its header before any model is loaded.
"""

from __future__ import annotations

import math
import re

from copa_harness.errors import ConfigurationError
from copa_harness.results import Budget

LEVELS: dict[str, int] = {"light": 400, "medium": 1600, "heavy": 6400}
"""Model calls per optimization run that each level allows."""


def parse_budget(value: Budget | int | str) -> Budget:
    """A budget from a level name, `"calls=500"`, a number of calls, or a `Budget` (returned as it is).

    Raises:
        ConfigurationError: None of these, or not a positive whole number of calls.
    """
    if isinstance(value, Budget):
        return value
    if isinstance(value, bool):
        raise ConfigurationError(f"got {value!r} as the budget; {_EXPECTED}")
    if isinstance(value, int):
        return Budget(calls=_positive(value), name=f"calls={value}")
    if isinstance(value, str):
        text = value.strip().lower()
        if text in LEVELS:
            return Budget(calls=LEVELS[text], name=text)
        if text == "unlimited":
            return Budget()
        match = re.fullmatch(r"(?:calls\s*=\s*)?(\d[\d_,]*)", text)
        if match:
            calls = int(re.sub(r"[_,]", "", match.group(1)))
            return Budget(calls=_positive(calls), name=f"calls={calls}")
    raise ConfigurationError(f"got {value!r} as the budget; {_EXPECTED}")


def describe_budget(budget: Budget) -> str:
    """The budget's name with the ceiling it means: ``light (at most 400 optimization calls per task)``."""
    if math.isinf(budget.calls):
        return f"{budget.name} (no ceiling)"
    return f"{budget.name} (at most {int(budget.calls):,} optimization calls per task)"


_EXPECTED = "expected " + ", ".join(f"'{name}' ({calls:,} calls)" for name, calls in LEVELS.items()) + " or 'calls=500'"


def _positive(calls: int) -> int:
    if calls < 1:
        raise ConfigurationError(f"got a budget of {calls} calls; expected at least 1")
    return calls
