"""Prices and answer limits of models behind endpoints, from the list that DSPy ships; the network is never asked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import dspy
from dspy.lm15 import LM15Error, Request, Response

from copa_harness.lm.budget.cost import Limits
from copa_harness.lm.dspy_internals import estimate_cost, is_reasoning_model, model_metadata, resolve

_INPUT = re.compile(r"(input_cost_per_token|cache_(creation|read)_input_token_cost)(_above_.*|_priority)?")
_OUTPUT = re.compile(r"output_cost_per_(reasoning_)?token(_above_.*|_priority)?")


def use_shipped_prices() -> None:
    """Have DSPy and LiteLLM read the price list they ship instead of downloading one at the first call."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")


def listed_limits(lm: dspy.LM) -> Limits:
    """The highest prices that can apply to a token of this model, and the longest answer it gives."""
    use_shipped_prices()
    try:
        route = resolve(lm)
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
        thinks=bool(info.get("supports_reasoning")) or is_reasoning_model(lm.model),
    )


class PriceList:
    """Prices of answers, with the list looked into once per model: DSPy searches the whole of it for every answer.

    Args:
        provider: The provider's name, as DSPy resolved it.
    """

    def __init__(self, provider: str) -> None:
        self._provider = provider
        self._rates: dict[tuple[str, str], tuple[float, float] | None] = {}

    def price(self, response: Response, request: Request, *, model: str) -> float | None:
        """Dollars of one answer; None when nobody knows.

        Args:
            response: The answer with its usage.
            request: What was asked.
            model: The name asked for, without the provider; the answer names the one that answered.
        """
        key = (response.model, model)
        if key not in self._rates:
            self._rates[key] = self._flat_rates(*key)
        rates, usage = self._rates[key], response.usage
        special = (
            usage.cache_read_tokens
            or usage.cache_write_tokens
            or usage.reasoning_tokens
            or usage.input_audio_tokens
            or usage.output_audio_tokens
            or request.tools
            or request.config.service_tier
        )
        served = (response.provider_data or {}).get("service_tier")
        if rates is None or special or served not in (None, "default", "auto", "standard"):
            usd, _ = estimate_cost(response, provider=self._provider, requested_model=model, request=request)
            return None if usd is None else float(usd)
        if usage.input_tokens is None or usage.output_tokens is None:
            return None
        return float(usage.input_tokens * rates[0] + usage.output_tokens * rates[1])

    def _flat_rates(self, served: str, asked: str) -> tuple[float, float] | None:
        """Dollars per token in and out of a model whose prices do not depend on the length of the prompt."""
        info = model_metadata.model_info(self._provider, served) or model_metadata.model_info(self._provider, asked)
        rates = info.get("input_cost_per_token"), info.get("output_cost_per_token")
        if any("_above_" in name for name in info) or not all(isinstance(rate, (int, float)) for rate in rates):
            return None
        return float(rates[0]), float(rates[1])


def _highest(info: Mapping[str, Any], names: re.Pattern[str], needed: str) -> float | None:
    if not isinstance(info.get(needed), (int, float)):
        return None
    return max(
        float(value) for name, value in info.items() if names.fullmatch(name) and isinstance(value, (int, float))
    )
