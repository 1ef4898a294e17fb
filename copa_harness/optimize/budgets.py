"""Budget levels in words: `"light"`, `"calls=500,usd=2,tokens=1e6"` or a number, as a `Budget`.

Imports nothing heavy: the pytest plugin prints the ceilings in its header before any model is loaded.
"""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace

from copa_harness.errors import ConfigurationError
from copa_harness.results import Budget

LEVELS: dict[str, int] = {"light": 400, "medium": 1600, "heavy": 6400}
"""Model calls per optimization run that each level allows."""

CEILINGS = tuple(entry.name for entry in fields(Budget) if entry.name != "name")
"""What a ceiling can be put on, as written in `calls=500,usd=2`."""

_WHOLE = frozenset(CEILINGS) - {"usd", "seconds"}


def parse_budget(value: Budget | int | str) -> Budget:
    """A budget from a level name, ceilings, a number of calls, or a `Budget` (returned as it is).

    Ceilings are written `name=number`, separated by commas: `calls`, `tokens` (in and out), `input_tokens`,
    `output_tokens`, `usd`, `seconds`, `train_steps`. A level may stand among them: `light,usd=2`.

    Raises:
        ConfigurationError: None of these, an unknown or repeated ceiling, or a number that is not positive (and whole,
            except dollars and seconds).
    """
    if isinstance(value, Budget):
        return value
    if isinstance(value, bool):
        raise ConfigurationError(f"got {value!r} as the budget; {_EXPECTED}")
    if isinstance(value, int):
        return Budget(calls=_number(str(value), "calls", value), name=f"calls={value}")
    if isinstance(value, str):
        text = value.strip().lower()
        if text == "unlimited":
            return Budget()
        if text in LEVELS:
            return Budget(calls=LEVELS[text], name=text)
        return _from_clauses(text, value)
    raise ConfigurationError(f"got {value!r} as the budget; {_EXPECTED}")


def describe_budget(budget: Budget) -> str:
    """The budget's name with the ceilings it means: ``light (at most 400 optimization calls per task)``."""
    ceilings = budget.ceilings
    if not ceilings:
        return f"{budget.name} (no ceiling)"
    units = {
        "calls": "optimization calls", "usd": "dollars", "train_steps": "training steps",
        "input_tokens": "input tokens", "output_tokens": "output tokens",
    }  # fmt: skip
    parts = [f"{_shown(ceiling)} {units.get(name, name)}" for name, ceiling in ceilings.items()]
    return f"{budget.name} (at most {', '.join(parts)} per task)"


_EXPECTED = (
    "expected "
    + ", ".join(f"'{name}' ({calls:,} calls)" for name, calls in LEVELS.items())
    + " or ceilings such as 'calls=500' or 'calls=500,usd=2,tokens=1e6,seconds=600'"
)


def _from_clauses(text: str, value: str) -> Budget:
    found: dict[str, float] = {}
    # 1,000 is one number; a comma in front of anything but three digits separates ceilings.
    for clause in re.split(r",(?!\d{3}(?:\D|$))", text):
        clause = clause.strip()
        match = re.fullmatch(r"(?:([a-z_]+)\s*=\s*)?(\d[\d_,]*(?:\.\d*)?(?:e[+]?\d+)?|\.\d+)", clause)
        if clause in LEVELS:
            name, amount = "calls", float(LEVELS[clause])
        elif match is not None:
            name = match.group(1) or "calls"
            amount = float(re.sub(r"[_,]", "", match.group(2)))
        else:
            raise ConfigurationError(f"got {value!r} as the budget; {_EXPECTED}")
        if name not in CEILINGS:
            raise ConfigurationError(
                f"got a ceiling on {name!r} in the budget {value!r}; expected one of {', '.join(CEILINGS)}"
            )
        if name in found:
            raise ConfigurationError(f"got two ceilings on {name} in the budget {value!r}; expected one")
        found[name] = _number(clause, name, amount)
    name = ",".join(f"{ceiling}={_plain(amount)}" for ceiling, amount in found.items())
    level = next((word for word in LEVELS if re.search(rf"\b{word}\b", text)), None)
    if level is not None:
        name = name.replace(f"calls={LEVELS[level]}", level)
    return replace(Budget(name=name), **found)  # type: ignore[arg-type]


def _number(clause: str, name: str, amount: float) -> float:
    if not (amount > 0 and math.isfinite(amount)) or (name in _WHOLE and not float(amount).is_integer()):
        wanted = "a whole number of at least 1" if name in _WHOLE else "a number above 0"
        raise ConfigurationError(f"got a budget of {clause!r} {'' if '=' in clause else name}; expected {wanted}")
    return int(amount) if name in _WHOLE else float(amount)


def _plain(amount: float) -> str:
    return f"{amount:g}" if amount != int(amount) else str(int(amount))


def _shown(amount: float) -> str:
    return f"{amount:,.0f}" if amount == int(amount) else f"{amount:g}"
