"""The most a call can cost, known before it is made, and what it did cost, known afterwards.

A token of every byte-level tokenizer covers at least one byte, so a prompt's UTF-8 bytes plus an allowance for the
chat template bound its tokens from above; `max_tokens` bounds the answer. What a provider does not report, or reports
impossibly, counts as that bound. Knows nothing of budgets or accounts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dspy._vendor.lm15.serde import request_to_dict
from dspy.lm15 import (
    DataPart,
    RefusalPart,
    Request,
    Response,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolResultPart,
)

from copa_harness.errors import ConfigurationError
from copa_harness.lm.accounts import Cost
from copa_harness.results import Usage

TEMPLATE_TOKENS = 128
"""Allowance for what a chat template adds once: a default system message, the date, the opening of the answer."""

TEMPLATE_TOKENS_PER_MESSAGE = 16
"""Allowance for what a chat template adds around each message."""

_COUNTABLE = (TextPart, DataPart, ToolCallPart, ToolResultPart, ThinkingPart, RefusalPart)


@dataclass(frozen=True, slots=True)
class Limits:
    """What is known of a model's costs before a call.

    Attributes:
        max_output_tokens: The most the model can answer, None if unknown.
        input_usd: The highest price of a prompt token in dollars, None if unknown.
        output_usd: The highest price of a completion token in dollars, None if unknown.
    """

    max_output_tokens: int | None = None
    input_usd: float | None = 0.0
    output_usd: float | None = 0.0


@runtime_checkable
class LimitedEngine(Protocol):
    """An engine that knows limits and prices. Engines that do not are free of charge."""

    def limits(self, model: str) -> Limits:
        """Limits and prices of `model`, from what is known without asking the network."""
        ...


def limits_of(engine: object, model: str) -> Limits:
    """What is known of a model's costs: as its engine says, else nothing but that it is free."""
    found = getattr(engine, "limits", None)
    if found is None:
        return Limits()
    limits: Limits = found(model)
    return limits


def prompt_tokens_from_above(request: Request) -> int:
    """A number of tokens the prompt cannot exceed.

    Raises:
        ConfigurationError: It holds images, audio or files, whose tokens nobody can bound from here.
    """
    parts = [part for message in request.messages for part in message.parts]
    if isinstance(request.system, tuple):
        parts += request.system
    parts += [inner for part in parts if isinstance(part, ToolResultPart) for inner in part.content]
    alien = sorted({type(part).__name__ for part in parts if not isinstance(part, _COUNTABLE)})
    if alien:
        raise ConfigurationError(
            f"a ceiling on tokens or dollars cannot be kept for a prompt with {alien}: expected text only, since the "
            "tokens of media cannot be bounded beforehand; use a budget of calls for it"
        )
    document = request_to_dict(request)
    pieces = {name: document[name] for name in ("system", "messages", "tools") if name in document}
    if request.config.response_format:
        pieces["response_format"] = request.config.response_format
    n_bytes = len(json.dumps(pieces, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return n_bytes + TEMPLATE_TOKENS + TEMPLATE_TOKENS_PER_MESSAGE * (len(request.messages) + 1)


def worst_case(request: Request, limits: Limits, *, budget: str, tokens: bool, usd: bool) -> Cost:
    """The most one completion of `request` can cost.

    Args:
        request: What will be asked.
        limits: What is known of the model.
        budget: Name of the budget, for messages.
        tokens: Whether a ceiling on tokens needs the bound.
        usd: Whether a ceiling on dollars needs the bound.

    Raises:
        ConfigurationError: There is no bound: no `max_tokens` and no limit known of the model, or no price.
    """
    if not (tokens or usd):
        return Cost(calls=1)
    what = "dollars" if usd else "tokens"
    output_tokens = request.config.max_tokens or limits.max_output_tokens
    if output_tokens is None:
        raise ConfigurationError(
            f"the budget {budget!r} caps {what}, but calls to {request.model!r} set no max_tokens, so nobody knows "
            "what one may cost; set max_tokens on the LM (dspy.LM(..., max_tokens=512)), or cap calls instead"
        )
    input_tokens = prompt_tokens_from_above(request)
    cost = Cost(calls=1, input_tokens=input_tokens, output_tokens=output_tokens)
    if limits.input_usd is None or limits.output_usd is None:
        if usd:
            raise ConfigurationError(
                f"the budget {budget!r} caps dollars, but no price is known for {request.model!r}; expected a model of "
                "the price list DSPy ships: cap calls or tokens instead"
            )
        return cost
    price = input_tokens * limits.input_usd + output_tokens * limits.output_usd
    return Cost(1, input_tokens, output_tokens, Cost.picodollars_of(price))


def actual_cost(response: Response, usd: float | None, *, worst: Cost) -> tuple[Cost, Usage]:
    """What an answer cost, as an amount to settle and as usage to report.

    Args:
        response: The answer.
        usd: Its price in dollars, None when nobody knows.
        worst: What was held for it. Tokens or a price that are unknown count as held.
    """
    given = response.usage
    input_tokens, output_tokens = given.input_tokens, given.output_tokens
    # Zero prompt tokens, or zero tokens for a text, is how servers that do not count fill the field.
    known_input = input_tokens is not None and input_tokens > 0
    known_output = output_tokens is not None and (output_tokens > 0 or not response.message.text)
    booked = Cost(
        1,
        input_tokens if known_input and input_tokens is not None else worst.input_tokens,
        output_tokens if known_output and output_tokens is not None else worst.output_tokens,
        worst.picodollars if usd is None else Cost.picodollars_of(usd),
    )
    usage = Usage(
        paid_calls=1,
        input_tokens=booked.input_tokens,
        output_tokens=booked.output_tokens,
        usd=booked.usd if usd is None else usd,
        estimated_calls=int(not (known_input and known_output)),
        unpriced_calls=int(usd is None and worst.picodollars == 0),
    )
    return booked, usage


def lost_cost(worst: Cost) -> Usage:
    """The usage to report for a call that may have been billed but brought no answer: all that was held for it."""
    return Usage(
        paid_calls=1,
        failed_calls=1,
        input_tokens=worst.input_tokens,
        output_tokens=worst.output_tokens,
        usd=worst.usd,
        estimated_calls=1,
    )
