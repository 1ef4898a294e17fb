"""Models behind an endpoint: anything DSPy itself can name, one attempt per call.

An `EndpointEngine` wraps a plain `dspy.LM` and lets DSPy choose its native client or LiteLLM. Its fingerprint is made
of the URL, the model and the parameters of the connection that can change an answer, never of credentials. LiteLLM is
imported by the first call that needs it.

An `HttpEngine`, the default, sends through one pool of connections per process. DSPy's native client opens its
connections per LM and looks prices up by scanning its whole list on every call, some 3 ms of CPU. Here requests are
built and answers read by the very same code of DSPy (lm15), so what is sent is what DSPy would send, but the
connections are pooled and prices are looked up once. Where DSPy would not use its native client (LiteLLM's providers,
another URL set in the environment, headers of one's own), and with the fast path switched off, the pool is not used.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import dspy
from dspy.lm15 import LM15Error, Request, Response, RouterConfig, TextPart, ThinkingPart, UnsupportedFeatureError, Usage
from dspy.utils.exceptions import LMError, LMUnsupportedFeatureError

from copa_harness.credentials import MASK, is_secret_key, mask_known, mask_text
from copa_harness.errors import ConfigurationError
from copa_harness.lm.budget.cost import Limits
from copa_harness.lm.budget.prices import PriceList, listed_limits, use_shipped_prices
from copa_harness.lm.dspy_internals import (
    CLIENT_KEYS,
    LM15Engine,
    PlainChat,
    custom_engine_of,
    declared_url,
    execute,
    fast_path_enabled,
    is_dspys_choice,
    prepare,
    select_backend,
)
from copa_harness.lm.endpoint.transport import DEFAULT_TIMEOUT_S, PooledTransport, no_redirects
from copa_harness.lm.engine import Capabilities, Engine
from copa_harness.lm.provider_errors import (
    AuthFailed,
    BillingFailed,
    EngineError,
    Malformed,
    RateLimited,
    ServerFailed,
    UnexpectedEngineError,
    engine_failure,
)
from copa_harness.lm.retry import AdaptiveConcurrency, RetryPolicy

_NOT_IN_ANSWERS = frozenset({"api_key", "timeout", "azure_ad_token_provider", "headers", "extra_headers"})
"""Client settings that say who asks or how long to wait, not what answers; headers are looked at one by one."""

_SIGNING = ("sig", "signature", "se", "st", "sp", "sv", "spr", "skoid", "sktid", "code", "key", "expires")
"""Query parameters of signed URLs (Azure SAS, Google, AWS) that the secret-name rule does not catch."""

_ENVIRONMENT = {
    "azure": ("AZURE_API_VERSION",),
    "bedrock": ("AWS_REGION_NAME", "AWS_REGION"),
    "ollama_chat": ("OLLAMA_API_BASE", "OLLAMA_HOST"),
    "ollama": ("OLLAMA_HOST",),
    "vertex_ai": ("VERTEXAI_PROJECT", "VERTEXAI_LOCATION"),
}
"""Environment variables, beside `<PROVIDER>_API_BASE` and `<PROVIDER>_BASE_URL`, that choose what answers."""


_OWN_SERVERS = frozenset({"hosted_vllm", "llamafile", "lm_studio", "ollama", "ollama_chat", "xinference"})
"""Providers that are programs one runs oneself; they take any stop string."""


class EndpointEngine(Engine):
    """Runs requests through DSPy's own client of a provider.

    Args:
        lm: The plain LM to execute with; its settings are kept, its response cache, history and retries are not used.

    Raises:
        ConfigurationError: The LM is a text-completion model, which has no chat requests.
    """

    is_endpoint = True

    def __init__(self, lm: dspy.LM) -> None:
        if lm.model_type not in ("chat", "responses"):
            raise ConfigurationError(
                f"got model_type={lm.model_type!r} for {lm.model!r}, expected 'chat' or 'responses'"
            )
        if not isinstance(custom_engine_of(lm), str):
            raise ConfigurationError(
                f"{lm.model!r} has a custom engine already; give that engine to MeteredLM(engine=...)"
            )
        self._template = lm.copy(cache=False, num_retries=0, callbacks=[])
        # Call defaults travel in each request; only the connection belongs to the engine.
        self._template.kwargs = {key: value for key, value in lm.kwargs.items() if key in CLIENT_KEYS}
        self.name = _provider_of(lm.model)
        self.retry_policy = RetryPolicy(lm.num_retries)
        self.concurrency = AdaptiveConcurrency()
        self._secrets = _secrets_in(self._template.kwargs)
        self._lock = threading.Lock()
        self._lms: dict[str, dspy.LM] = {lm.model: self._template}
        self._fingerprints: dict[tuple[str, ...], str] = {}

    def connection(self, model: str) -> dict[str, Any]:
        """What decides who answers `model`: URL, model, parameters. Free of credentials."""
        clients = self._template.kwargs
        url = clients.get("api_base") or clients.get("base_url") or declared_url(self._lm(model))
        headers = {**(clients.get("headers") or {}), **(clients.get("extra_headers") or {})}
        return {
            "url": None if url is None else public_url(str(url)),
            "environment": {} if url else {name: public_url(value) for name, value in self._environment(model)},
            "model": model,
            "model_type": self._template.model_type,
            "client": custom_engine_of(self._template),
            "parameters": {
                key: value if isinstance(value, (str, int, float, bool, dict, list)) else repr(value)
                for key, value in sorted(clients.items())
                if key not in _NOT_IN_ANSWERS and key not in ("api_base", "base_url") and value is not None
            },
            "headers": {key.lower(): value for key, value in sorted(headers.items()) if not _is_secret_header(key)},
        }

    def fingerprint(self, model: str) -> str:
        """`endpoint:` and the hash of `connection(model)`."""
        # The environment is read each time: another URL in it is another endpoint behind the same name.
        material = (model, *(f"{name}={value}" for name, value in self._environment(model)))
        found = self._fingerprints.get(material)
        if found is None:
            text = json.dumps(self.connection(model), sort_keys=True, default=repr)
            found = self._fingerprints[material] = "endpoint:" + hashlib.sha256(text.encode()).hexdigest()
        return found

    def complete(self, request: Request, *, seed: int) -> Response:
        """One attempt at one completion. `seed` is not sent: it is not part of what the user asked for."""
        return self.complete_priced(request, seed=seed)[0]

    def complete_priced(self, request: Request, *, seed: int) -> tuple[Response, float | None]:
        """The completion and its price in dollars, None when DSPy knows no price."""
        use_shipped_prices()
        lm = self._lm(request.model)
        try:
            with dspy.context(send_stream=None), no_redirects():
                result = execute(lm, prepare(lm, None, None, {"request": request}))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is one of ours from here on
            failure, cause = self._failure(error, request)
            raise failure from cause
        return self._checked(request, result.typed(request, lm.model_type)), result.cost

    def _checked(self, request: Request, response: Response) -> Response:
        """The answer, if it is one, without the key should it repeat that.

        Raises:
            ServerFailed: The provider tells of a failure inside the answer.
            EngineError: The answer was cut off before it began.
            Malformed: There is no text, nor anything else in place of one. A model that says nothing has answered.
        """
        choice = _choice_of(response.provider_data)
        if choice is not None and (choice.get("error") or choice.get("finish_reason") == "error"):
            said = choice.get("error") or "the answer broke off with finish_reason 'error'"
            failure = ServerFailed(self._masked(f"the provider failed while it answered: {said}"), model=request.model)
            failure.billed = None
            raise failure
        parts = response.message.parts
        silent = not response.message.text and all(isinstance(part, (TextPart, ThinkingPart)) for part in parts)
        if silent and response.finish_reason != "content_filter":
            self._check_silence(request, response, choice)
        key = str(self._template.kwargs.get("api_key") or os.environ.get(f"{self.name.upper()}_API_KEY") or "")
        if len(key) < _SHORTEST_KEY or not any(key in getattr(part, "text", "") for part in parts):
            return response
        shown = (replace(p, text=p.text.replace(key, MASK)) if hasattr(p, "text") else p for p in parts)
        return replace(response, message=replace(response.message, parts=tuple(shown)), logprobs=None)

    def _check_silence(self, request: Request, response: Response, choice: dict[str, Any] | None) -> None:
        if response.finish_reason == "length":
            most = "the model's" if request.config.max_tokens is None else request.config.max_tokens
            failure = EngineError(
                f"the answer reached its ceiling of {most} tokens before it began (the model may think first); raise "
                "--copa-answer-tokens, or max_tokens of the LM",
                model=request.model,
            )
            failure.billed = True
            raise failure
        if response.provider_data is not None and "choices" in response.provider_data:
            if choice is None:
                raise self._malformed(request, response, "there are no choices in it")
            content = (choice.get("message") or {}).get("content")
            if not isinstance(content, (str, list)):
                raise self._malformed(request, response, "there is no text in it")
        if response.usage == Usage():
            raise self._malformed(request, response, "neither an answer nor usage")

    def _malformed(self, request: Request, body: bytes | Response, why: str) -> Malformed:
        if isinstance(body, Response):
            body = json.dumps(body.provider_data or {}, default=repr).encode()
        begins = self._masked(body[:_LOOKED_AT].decode("utf-8", "replace"))[:_SHOWN]
        return Malformed(
            f"the provider's answer has not the shape of a completion ({self._masked(why)}); it begins {begins!r}",
            model=request.model,
        )

    def limits(self, model: str) -> Limits:
        """Prices and the longest answer, from the list DSPy ships."""
        return listed_limits(self._lm(model))

    def takes_stop(self, model: str) -> bool:
        """Whether its server is one of somebody's own, by its provider's name or its URL.

        Those of companies refuse a stop string for some of their models, and say so only when it is sent.
        """
        if _provider_of(model) in _OWN_SERVERS:
            return True
        clients = self._template.kwargs
        url = clients.get("api_base") or clients.get("base_url") or declared_url(self._lm(model))
        return url is not None and is_own_network(str(url))

    def capabilities(self, model: str) -> Capabilities:
        """What DSPy knows of the model's abilities."""
        lm = self._lm(model)
        return Capabilities(
            function_calling=lm.supports_function_calling,
            reasoning=lm.supports_reasoning,
            response_schema=lm.supports_response_schema,
            params=frozenset(lm.supported_params),
        )

    def _failure(self, error: Exception, request: Request) -> tuple[Exception, Exception | None]:
        """What to raise in place of an error, and from what: no cause that would print a secret.

        Whatever happens after a request left may be billed. Free is what carries the HTTP status of a failure, and what
        never left.
        """
        failure: Any = engine_failure(error, model=request.model)
        if isinstance(failure, _TOLD):  # without such a status it was told inside a success
            is_free = failure.status is not None and failure.status >= 300
        else:
            is_free = not isinstance(failure, _UNFORESEEN)
        if not is_free:
            failure.billed = None
        held = self._conceal(failure)
        return failure, None if held or failure is error else error

    def _conceal(self, error: BaseException) -> bool:
        """Take credentials out of an error's message, and say where keys are read; whether it held a credential."""
        held = False
        link: BaseException | None = error
        while link is not None and not held:
            held = self._masked(str(link)) != str(link)
            link = link.__cause__ or link.__context__
        error.args = tuple(self._masked(arg) if isinstance(arg, str) else arg for arg in error.args)
        if isinstance(error, LMError):
            error.message = self._masked(error.message)
        if isinstance(error, AuthFailed):
            provider = str(error.model or self._template.model).partition("/")[0].upper()
            hint = f"\n    - Without api_key= it is read from the environment variable {provider}_API_KEY"
            error.message, error.args = error.message + hint, (f"{error}{hint}", *error.args[1:])
        return held

    def _masked(self, text: str) -> str:
        # Keys are mostly read from the environment, and may look like anything.
        keys = (value for name, value in os.environ.items() if len(value) > 7 and is_secret_key(name))
        return mask_text(mask_known(text, (*self._secrets, *keys)))

    def _lm(self, model: str) -> dspy.LM:
        with self._lock:
            found = self._lms.get(model)
            if found is None:
                found = self._lms[model] = self._template.copy(model=model)
            return found

    def _environment(self, model: str) -> list[tuple[str, str]]:
        provider = _provider_of(model)
        prefix = provider.upper()
        names = (f"{prefix}_API_BASE", f"{prefix}_BASE_URL", *_ENVIRONMENT.get(provider, ()))
        return [(name, os.environ[name]) for name in names if os.environ.get(name)]


def _provider_of(model: str) -> str:
    return model.split("/", 1)[0] if "/" in model else "openai"


def is_own_network(url: str) -> bool:
    """Whether a URL names this machine or another of its own network."""
    host = urlsplit(url if "://" in url else f"//{url}").hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".local", ".internal", ".lan"))
    return address.is_loopback or address.is_private


def public_url(url: str) -> str:
    """The URL without user, password, fragment and the query parameters that look like credentials or signatures."""
    parts = urlsplit(url if "://" in url else f"//{url}")
    host = parts.netloc.rpartition("@")[2].lower()
    query = [
        (name, value)
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
        if not _is_secret_parameter(name)
    ]
    return urlunsplit((parts.scheme.lower(), host, parts.path.rstrip("/"), urlencode(query), ""))


def _secrets_in(clients: dict[str, Any]) -> tuple[str, ...]:
    """Texts among the client settings that must not show anywhere, longest first."""
    userinfos = []
    found = [clients.get("api_key")]
    for url in (clients.get("api_base"), clients.get("base_url")):
        if isinstance(url, str):
            parts = urlsplit(url if "://" in url else f"//{url}")
            userinfos += [parts.netloc.rpartition("@")[0] + "@"] if "@" in parts.netloc else []
            found += [parts.password]
            found += [value for name, value in parse_qsl(parts.query) if _is_secret_parameter(name)]
    for headers in (clients.get("headers") or {}, clients.get("extra_headers") or {}):
        found += [value for name, value in headers.items() if _is_secret_header(name)]
    long_enough = {text for text in found if isinstance(text, str) and len(text) > 3}  # "a" would garble messages
    return tuple(sorted({*userinfos, *long_enough}, key=len, reverse=True))


def _is_secret_parameter(name: str) -> bool:
    lowered = name.lower()
    return is_secret_key(name) or lowered in _SIGNING or lowered.startswith(("x-amz-", "x-goog-"))


def _is_secret_header(name: str) -> bool:
    lowered = name.lower()
    return is_secret_key(name) or "key" in lowered or "cookie" in lowered or lowered == "user-agent"


_TOLD = (RateLimited, ServerFailed, BillingFailed, EngineError)
"""Failures that a provider tells of."""

_UNFORESEEN = (UnexpectedEngineError, LMUnsupportedFeatureError, MemoryError, Warning)
"""Failures of which nobody knows how far the call got; answers with features that cannot be read are among them."""

_SHORTEST_KEY = 12
"""Shorter ones are words that an answer may hold."""

_LOOKED_AT, _SHOWN = 2000, 200
"""Of what is no answer: bytes in which secrets are looked for, and characters of them that a message shows."""


def _choice_of(document: Any) -> dict[str, Any] | None:
    """The one choice of an answer in OpenAI's shape, as it came; None where there is none."""
    choices = document.get("choices") if isinstance(document, Mapping) else None
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None


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
        route = self._route(request.model) if fast_path_enabled() else None
        if route is None:
            return super().complete_priced(request, seed=seed)
        route.transport.forget()
        try:
            response = self._completed(route, request)
        except Exception as error:  # noqa: BLE001 - as there
            if isinstance(error, UnsupportedFeatureError) and route.transport.last_reply() is None:  # nothing was sent
                return super().complete_priced(request, seed=seed)
            failure, cause = self._failure(error, request)
            raise failure from cause
        if self.limits(request.model).input_usd is None:
            return response, None
        return response, route.prices.price(response, request, model=request.model.partition("/")[2])

    def _completed(self, route: _Route, request: Request) -> Response:
        try:
            response: Response = route.plain.complete(request) or route.engine.complete(request)
        except Exception as error:
            reply = route.transport.last_reply()
            told = isinstance(error, LM15Error) and not isinstance(error, UnsupportedFeatureError)
            if reply is None or reply[0] >= 300 or told:
                raise
            response = self._reread(route, request, reply[1], error)
        return self._checked(request, response)

    def _reread(self, route: _Route, request: Request, body: bytes, error: Exception) -> Response:
        """The answer in `body` without its usage: impossible numbers there must not cost the answer.

        Raises:
            Malformed: It is no answer without the usage either.
        """
        provider, routed = route.engine._target(request)
        try:
            document = json.loads(body)
            document.pop("usage")
            adjusted: Response = provider.parse_response(routed, _Body(document))
        except Exception:  # noqa: BLE001 - whatever ails a body that nobody can read
            raise self._malformed(request, body, f"{type(error).__name__}: {error}") from error
        return adjusted

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
        if not is_dspys_choice(lm):
            return None
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
