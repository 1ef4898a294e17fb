"""The seam for execution: what answers one request, and how it says who it is.

An engine gives exactly one attempt at one completion. It owns no cache, no budget, no retries and no candidate fan-out;
the gateway and DSPy do. Its fingerprint names everything that could change an answer and is not in the request.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from dspy.lm15 import Request, Response

time_left_s: ContextVar[float] = ContextVar("copa_time_left_s", default=math.inf)
"""Seconds the budget leaves the call under way. An engine that can should not wait longer for its answer."""


class Engine(Protocol):
    """Answers requests, one completion at a time. Must be thread-safe; `__deepcopy__` must return the engine itself.

    `complete` raises `ProviderError` (or `ContextOverflowError`, or any `dspy.lm15` error) when no answer
    came, and anything else only for its own bugs.
    """

    @property
    def name(self) -> str:
        """Short human name: `embedded`, `hf:...`, `openai`, `scripted`."""
        ...

    def fingerprint(self, model: str) -> str:
        """Hash or text naming what answers `model`: weights, tokenizer, template, dtype; or URL and parameters.

        Called for every request, cache hits included, so it must be cheap. Never contains a secret.
        """
        ...

    def complete(self, request: Request, *, seed: int) -> Response:
        """Answer one request. `seed` tells repeats of one request apart (0 for the plain one), for sampling only."""
        ...


@runtime_checkable
class PricedEngine(Protocol):
    """An engine that knows what its answers cost."""

    def complete_priced(self, request: Request, *, seed: int) -> tuple[Response, float | None]:
        """As `Engine.complete`, with the answer's price in dollars, or None when it is unknown."""
        ...


def complete_priced(engine: Engine, request: Request, *, seed: int) -> tuple[Response, float | None]:
    """The engine's answer and its price; an engine that names no prices is free."""
    priced = getattr(engine, "complete_priced", None)  # isinstance with a protocol costs more than the rest of a hit
    if priced is None:
        return engine.complete(request, seed=seed), 0.0
    answer: tuple[Response, float | None] = priced(request, seed=seed)
    return answer


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model's API can do beyond plain text; DSPy's prompt adapters ask."""

    function_calling: bool = False
    reasoning: bool = False
    response_schema: bool = False
    params: frozenset[str] = field(default_factory=frozenset)


@runtime_checkable
class CapableEngine(Protocol):
    """An engine in front of an API with capabilities of its own."""

    def capabilities(self, model: str) -> Capabilities:
        """Capabilities of `model`."""
        ...


def seed_of(rollout_id: object, candidate: int) -> int:
    """The sampling seed of one repeat: 0 for the plain request, else a stable 31-bit number from 1 up.

    Args:
        rollout_id: DSPy's rollout id, or None.
        candidate: Index of the completion among the `n` of one call, from 0.
    """
    if rollout_id is None and candidate == 0:
        return 0
    digest = hashlib.sha256(json.dumps([rollout_id, candidate], default=str).encode()).digest()
    return int.from_bytes(digest[:4], "big") % (2**31 - 1) + 1
