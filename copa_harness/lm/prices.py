"""Prices and answer limits of models behind endpoints, from the list that DSPy ships; the network is never asked.

Knows nothing of budgets, requests or engines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import dspy

# Private, and pinned by dspy >=3.4,<3.5: the only list of prices at hand.
from dspy.clients import capabilities, model_metadata
from dspy.lm15 import LM15Error

from copa_harness.lm.estimates import Limits

_INPUT = re.compile(r"(input_cost_per_token|cache_(creation|read)_input_token_cost)(_above_.*|_priority)?")
_OUTPUT = re.compile(r"output_cost_per_(reasoning_)?token(_above_.*|_priority)?")


def use_shipped_prices() -> None:
    """Have DSPy and LiteLLM read the price list they ship instead of downloading one at the first call."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")


def limits_of(lm: dspy.LM) -> Limits:
    """The highest prices that can apply to a token of this model, and the longest answer it gives."""
    use_shipped_prices()
    try:
        route = capabilities.resolve(lm)
        info = model_metadata.model_info(route.provider, route.model)
    except LM15Error:  # LiteLLM's to route
        info = {}
    if not info:
        provider, _, model = lm.model.partition("/")
        info = model_metadata.model_info(provider, model)
    longest = info.get("max_output_tokens")
    return Limits(
        max_output_tokens=longest if isinstance(longest, int) and longest > 0 else None,
        input_usd=_highest(info, _INPUT, "input_cost_per_token"),
        output_usd=_highest(info, _OUTPUT, "output_cost_per_token"),
    )


def _highest(info: Mapping[str, Any], names: re.Pattern[str], needed: str) -> float | None:
    if not isinstance(info.get(needed), (int, float)):
        return None
    return max(
        float(value) for name, value in info.items() if names.fullmatch(name) and isinstance(value, (int, float))
    )
