"""The default engine for endpoints: DSPy's native client over one pool of connections.

DSPy's client opens its connections per LM and looks prices up by scanning its whole list on every call, some 3 ms of
CPU. Here requests are built and answers read by the very same code of DSPy (lm15), so what is sent is what DSPy would
send, but the connections are pooled for the process and prices are looked up once. Where DSPy would not use its native
client (LiteLLM's providers, gateways set in the environment, headers of one's own), neither is it used here. Knows
nothing of caches or budgets.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import dspy

# Private, and pinned by dspy >=3.4,<3.5.
from dspy.clients.backend_selection import select_backend
from dspy.clients.engines.lm15_engine import LM15Engine
from dspy.lm15 import LM15Error, Request, Response, RouterConfig, TextPart, UnsupportedFeatureError, Usage

from copa_harness.lm.endpoint import EndpointEngine
from copa_harness.lm.estimates import Limits
from copa_harness.lm.failures import Malformed, engine_failure
from copa_harness.lm.plain_chat import PlainChat
from copa_harness.lm.pooled import DEFAULT_TIMEOUT_S, PooledTransport
from copa_harness.lm.prices import PriceList

_UNREADABLE = (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError)
"""What DSPy's reader raises on JSON that has not the shape of an answer."""


@dataclass(frozen=True, slots=True)
class _Route:
    engine: LM15Engine
    plain: PlainChat
    transport: PooledTransport
    prices: PriceList


class HttpEngine(EndpointEngine):
    """Runs requests through DSPy's native client over the pool, and through DSPy's own choice where that cannot be.

    Args:
        lm: As in `EndpointEngine`.
    """

    def __init__(self, lm: dspy.LM) -> None:
        super().__init__(lm)
        self._routes: dict[tuple[Any, ...], _Route | None] = {}
        self._limits: dict[str, Limits] = {}

    def limits(self, model: str) -> Limits:
        """As `EndpointEngine.limits`, looked up once."""
        found = self._limits.get(model)
        if found is None:
            found = self._limits[model] = super().limits(model)
        return found

    def complete_priced(self, request: Request, *, seed: int) -> tuple[Response, float | None]:
        """The completion and its price in dollars, None when nobody knows it."""
        route = self._route(request.model)
        if route is None:
            return super().complete_priced(request, seed=seed)
        try:
            response = self._completed(route, request)
        except UnsupportedFeatureError:  # raised before anything is sent
            return super().complete_priced(request, seed=seed)
        except Exception as error:
            failure = engine_failure(error, model=request.model)
            if not self._conceal(failure):
                raise failure from error
            raise failure from None  # the chain would print the secret
        if self.limits(request.model).input_usd is None:
            return response, None
        return response, route.prices.price(response, request, model=request.model.partition("/")[2])

    def _completed(self, route: _Route, request: Request) -> Response:
        try:
            response: Response = route.plain.complete(request) or route.engine.complete(request)
        except _UNREADABLE as error:
            reply = route.transport.last_reply()
            if reply is None or isinstance(error, LM15Error):
                raise
            return _reread(route, request, reply[1], error)
        empty = all(isinstance(part, TextPart) and not part.text for part in response.message.parts)
        if empty and response.usage == Usage():
            reply = route.transport.last_reply()
            raise _malformed(request, b"" if reply is None else reply[1], "neither an answer nor usage")
        return response

    def _route(self, model: str) -> _Route | None:
        # The environment decides too, and may change: it is read each time, as for the fingerprint.
        key = (model, *self._environment(model))
        if key not in self._routes:
            with self._lock:
                if key not in self._routes:
                    self._routes[key] = self._make_route(model)
        return self._routes[key]

    def _make_route(self, model: str) -> _Route | None:
        lm = self._template if model == self._template.model else self._template.copy(model=model)
        if lm._engine_spec != "auto" or lm._providers:
            return None  # the user chose a client, or declared a provider with rules of its own
        selection = select_backend(lm)
        timeout_s = _seconds(selection.clients.get("timeout"))
        if not selection.native or selection.resolution is None or timeout_s is None:
            return None
        provider = selection.resolution.provider
        url = selection.clients.get("api_base") or selection.clients.get("base_url")
        query = ""
        if url:
            # DSPy's client appends its path to the URL as text, which would end up inside a query.
            parts = urlsplit(str(url))
            url, query = urlunsplit(parts._replace(query="", fragment="")), parts.query
        transport = PooledTransport(timeout_s=timeout_s, query=query)
        config = RouterConfig(
            api_keys={provider: selection.clients["api_key"]} if selection.clients.get("api_key") else None,
            base_urls={provider: url} if url else None,
            transport=transport,
        )
        engine = LM15Engine(config, model_type=lm.model_type)
        return _Route(engine, PlainChat(engine), transport, PriceList(provider))


def _reread(route: _Route, request: Request, body: bytes, error: Exception) -> Response:
    """The answer in `body` without its usage: impossible numbers there must not cost the answer.

    Raises:
        Malformed: It is no answer without the usage either.
    """
    provider, routed = route.engine._target(request)
    try:
        document = json.loads(body)
        document.pop("usage")
        adjusted: Response = provider.parse_response(routed, _Body(document))
    except (*_UNREADABLE, LM15Error):
        raise _malformed(request, body, f"{type(error).__name__}: {error}") from error
    return adjusted


def _malformed(request: Request, body: bytes, why: str) -> Malformed:
    return Malformed(
        f"the provider's answer has not the shape of a completion ({why}); it begins "
        f"{body[:200].decode('utf-8', 'replace')!r}",
        model=request.model,
    )


@dataclass(frozen=True, slots=True)
class _Body:
    """As much of lm15's buffered response as its parser reads."""

    document: Any
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    provider: str | None = None

    def json(self) -> Any:
        return self.document


def _seconds(timeout: Any) -> float | None:
    """An LM's timeout in seconds; None for forms only DSPy's own clients understand."""
    if timeout is None:
        return DEFAULT_TIMEOUT_S
    if isinstance(timeout, (int, float)) and not isinstance(timeout, bool) and math.isfinite(timeout) and timeout > 0:
        return float(timeout)
    return None
