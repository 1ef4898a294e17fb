"""Everything that leans on the inside of DSPy 3.4: names it does not promise, and the shortcuts built on them.

This is the one module that imports DSPy's private names, and the place to look at when another DSPy comes out. Its
first part only hands on what others need (what is imported `as` itself: `request_to_dict` makes cache keys,
`select_backend` says which client DSPy would take, ...). The rest is the *fast path*: three things that DSPy computes
anew for every call and that are computed here once. Each gives what DSPy gives, character by character, and leaves to
DSPy whatever it does not know:

* `RequestBuilder`: the canonical request, straight from plain messages. DSPy turns every call into an OpenAI body,
  reads that back as a request, and sets up retries, streaming, pricing, caching and history: a third of what a module
  call costs.
* `PromptAdapter`: DSPy's ChatAdapter with a signature's fixed texts kept as long as the signature is what it was. DSPy
  renders the system message anew for every call and builds a pydantic serializer for every value it prints: another
  third.
* `PlainChat`: a chat request on the wire. For one model and one set of settings all of it is the same but the texts, so
  DSPy writes a sample once, and later requests of text alone are the sample with other rows.

`COPA_FAST_PATH=0` in the environment turns all three off, and the pool of connections with them: then every call is
DSPy's own from the prompt to the socket. The tests compare both positions of the switch with plain DSPy.
"""

from __future__ import annotations

import json
import logging
import math
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dspy
from dspy._vendor.lm15.providers.base import _attach_error_metadata
from dspy._vendor.lm15.providers.common import json_dumps
from dspy._vendor.lm15.providers.openai_chat import OpenAIChatLM
from dspy._vendor.lm15.router import LITELLM_PROVIDER_PREFIXES as LITELLM_PROVIDER_PREFIXES
from dspy._vendor.lm15.serde import request_to_dict as request_to_dict
from dspy._vendor.lm15.serde import response_from_dict as response_from_dict
from dspy._vendor.lm15.serde import response_to_dict as response_to_dict
from dspy._vendor.lm15.transports import TransportRequest as TransportRequest
from dspy._vendor.lm15.transports import TransportResponse as TransportResponse
from dspy._vendor.lm15.transports._exceptions import ConnectError as ConnectError
from dspy._vendor.lm15.transports._exceptions import ConnectTimeout as ConnectTimeout
from dspy._vendor.lm15.transports._exceptions import ReadError as ReadError
from dspy.adapters.chat_adapter import ChatAdapter
from dspy.adapters.utils import format_field_value
from dspy.clients import model_metadata as model_metadata
from dspy.clients._deprecation import warn_openai_messages as warn_openai_messages
from dspy.clients.backend_selection import CLIENT_KEYS as CLIENT_KEYS
from dspy.clients.backend_selection import select_backend as select_backend
from dspy.clients.call_result import legacy_output
from dspy.clients.capabilities import resolve as resolve
from dspy.clients.costs import estimate_cost as estimate_cost
from dspy.clients.engines.lm15_engine import LM15Engine as LM15Engine
from dspy.clients.errors import error_boundary as error_boundary
from dspy.clients.errors import wrap_error as wrap_error
from dspy.clients.execution import execute as execute
from dspy.clients.execution import prepare as prepare
from dspy.clients.lm import _is_openai_reasoning_model
from dspy.lm15 import (
    Config,
    LM15Error,
    Message,
    ProviderError,
    Request,
    Response,
    TextPart,
    request_from_openai_chat,
)

is_reasoning_model = _is_openai_reasoning_model

KEPT = 512
"""Messages remembered as they were built (system texts and demonstrations come with every call), and settings."""

KEPT_FORMS = 64
"""Samples of requests on the wire remembered per engine."""

SWITCH = "COPA_FAST_PATH"
"""Environment variable that turns the fast path off."""

_OFF = frozenset({"0", "off", "no", "false"})


def fast_path_enabled() -> bool:
    """Whether the shortcuts may be taken; read each time, so that a test may change it."""
    return os.environ.get(SWITCH, "1") not in _OFF


# -- an LM's private attributes


def custom_engine_of(lm: dspy.LM) -> Any:
    """The engine object an LM was given, or the name of DSPy's own choice (`auto`, `lm15`, `litellm`)."""
    return lm._engine_spec


def use_custom_engine(lm: dspy.LM, engine: Any, async_engine: Any) -> None:
    """Have an LM ask other engines than those it was made with."""
    lm._engine_spec, lm._async_engine_spec = engine, async_engine


def is_dspys_choice(lm: dspy.LM) -> bool:
    """Whether DSPy picks the client: the user chose none, and declared no provider with rules of its own."""
    return bool(lm._engine_spec == "auto" and not lm._providers)


def declared_url(lm: dspy.LM) -> str | None:
    """The URL of a provider that somebody declared to DSPy (`dspy.lm15.register_provider`), None for any other."""
    if not lm._providers:
        return None
    try:
        route = resolve(lm)
    except LM15Error:
        return None  # LiteLLM's to route; then no declared provider is involved
    if not route.declared:
        return None
    return next((p.definition.access.base_url for p in lm._providers if p.id == route.provider), None)


# -- requests

_COUNTS = frozenset({"n", "num_generations"})

_NOT_SENT = frozenset({"cache", "rollout_id"}) | _COUNTS

_OTHERS = frozenset({"logprobs", "prompt_cache", "request", *CLIENT_KEYS})

_PLAIN = (str, int, float, bool, type(None))

_logger = logging.getLogger("dspy.clients.lm")

_TRUNCATED = "LM response was truncated"


class RequestBuilder:
    """Builds requests, keeping what calls have in common. Thread-safe; shared by copies of an LM."""

    def __init__(self) -> None:
        self._configs: dict[str, Config | None] = {}
        self._messages: dict[tuple[str, str], Message] = {}

    def request(self, model: str, messages: Any, settings: dict[str, Any]) -> Request | None:
        """The request DSPy would make of these, or None when that is for DSPy to say.

        `settings` are the LM's defaults and the call's own together.
        """
        config = self._config(model, settings)
        if config is None or type(messages) is not list:
            return None
        system, built = None, []
        for row in messages:
            if type(row) is not dict or len(row) != 2:
                return None
            content = row.get("content")
            if type(content) is not str or not content or not _encodable(content):
                return None
            role = row.get("role")
            if role == "system" and row is messages[0]:
                system = content
            elif role == "user" or role == "assistant":
                built.append(self._messages.get((role, content)) or self._message(role, content))
            else:
                return None
        if not built:
            return None
        return Request(model=model, messages=tuple(built), system=system, config=config)

    def _message(self, role: str, content: str) -> Message:
        message = _text(role, content)
        if len(self._messages) >= KEPT:
            self._messages = {}
        self._messages[role, content] = message
        return message

    def _config(self, model: str, settings: dict[str, Any]) -> Config | None:
        key = [model]
        for name, value in settings.items():
            if name in _NOT_SENT:
                if name in _COUNTS and value is not None and (type(value) is not int or value != 1):
                    return None
            elif type(value) in _PLAIN:
                key.append(f"{name}={value!r}")
            else:
                return None
        text = "\n".join(key)
        if text not in self._configs:
            if len(self._configs) >= KEPT:
                self._configs = {}
            self._configs[text] = _config_of(model, settings)
        return self._configs.get(text)


def _config_of(model: str, settings: dict[str, Any]) -> Config | None:
    """The settings as DSPy reads them, None if they are more than a `Config` or refused."""
    sent = {name: value for name, value in settings.items() if name not in _NOT_SENT and value is not None}
    if not _OTHERS.isdisjoint(sent):
        return None
    try:
        request = request_from_openai_chat({"model": model, "messages": [{"role": "user", "content": "x"}], **sent})
    except (LM15Error, TypeError, ValueError):
        return None  # DSPy's own way says what is wrong with them
    return request.config if request == Request(model, (_text("user", "x"),), config=request.config) else None


def _text(role: Any, content: str) -> Message:
    return Message(role=role, parts=(TextPart(text=content),))


def is_plain_call(lm: dspy.LM) -> bool:
    """Whether nothing is asked for, by this context or the LM, that only DSPy's own way does."""
    settings = dspy.settings
    return bool(
        fast_path_enabled()
        and settings.disable_history
        and settings.send_stream is None
        and not settings.usage_tracker
        and not settings.callbacks
        and not lm.callbacks
        and lm.num_retries == 0
        and lm.model_type == "chat"
        and type(lm).forward is dspy.LM.forward
        and "forward" not in vars(lm)
    )


class _Untruncated(logging.Filter):
    """Drops DSPy's line on an answer that was cut off, where somebody counts them."""

    def __init__(self, is_counted: Callable[[], bool]) -> None:
        super().__init__()
        self._is_counted = is_counted

    def filter(self, record: logging.LogRecord) -> bool:
        return not (str(record.msg).startswith(_TRUNCATED) and self._is_counted())


def count_truncations_instead(is_counted: Callable[[], bool]) -> None:
    """Keep DSPy from logging a line for every answer that was cut off.

    Args:
        is_counted: Whether the call under way is one whose cut-off answers are counted and told of elsewhere.
    """
    if not any(isinstance(one, _Untruncated) for one in _logger.filters):
        _logger.addFilter(_Untruncated(is_counted))


def outputs_of(lm: dspy.LM, response: Any) -> list[Any]:
    """What DSPy's LM returns for an answer to a chat request."""
    output = legacy_output(response)
    return [output] if len(output) > 1 else [output["text"]]


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False  # DSPy says where the lone surrogate is
    return True


# -- prompts

_Fields = tuple[tuple[str, Any, Any, dict[str, Any]], ...]


@dataclass(frozen=True, slots=True)
class _Fixed:
    """What a signature prints in every prompt, and what it was made of."""

    made_of: tuple[str, _Fields]
    inputs: dict[str, Any]
    system: str
    requirements: str


class PromptAdapter(ChatAdapter):
    """A `dspy.ChatAdapter` that prints the same and is quicker.

    Args:
        use_json_adapter_fallback: As in DSPy: whether an answer that does not parse is asked for again in JSON.
    """

    def __init__(self, *, use_json_adapter_fallback: bool) -> None:
        super().__init__(use_json_adapter_fallback=use_json_adapter_fallback)
        self._fixed: weakref.WeakKeyDictionary[type, _Fixed] = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, object]) -> PromptAdapter:
        return PromptAdapter(use_json_adapter_fallback=self.use_json_adapter_fallback)

    # DSPy wraps both in callbacks for every subclass, also those its base class has wrapped: a callback would be called
    # twice for each prompt. These are the unwrapped ones.
    format = dspy.Adapter.format
    parse = ChatAdapter.parse.__wrapped__

    def format_system_message(self, signature: type[dspy.Signature]) -> str:
        """As in DSPy."""
        return self._fixed_of(signature).system

    def user_message_output_requirements(self, signature: type[dspy.Signature]) -> str:
        """As in DSPy."""
        return self._fixed_of(signature).requirements

    def format_user_message_content(
        self,
        signature: type[dspy.Signature],
        inputs: dict[str, Any],
        prefix: str = "",
        suffix: str = "",
        main_request: bool = False,
    ) -> str:
        """As in DSPy."""
        fixed = self._fixed_of(signature)
        pieces = [prefix]
        for name, field in fixed.inputs.items():
            if name in inputs:
                pieces.append(f"[[ ## {name} ## ]]\n{printed(field, inputs.get(name))}")
        if main_request:
            pieces.append(fixed.requirements)
        pieces.append(suffix)
        return "\n\n".join(pieces).strip()

    def format_field_with_value(self, fields_with_values: dict[Any, Any]) -> str:
        """As in DSPy."""
        return "\n\n".join(
            f"[[ ## {field.name} ## ]]\n{printed(field.info, value)}" for field, value in fields_with_values.items()
        ).strip()

    def _fixed_of(self, signature: type[dspy.Signature]) -> _Fixed:
        made_of = _made_of(signature)
        found = self._fixed.get(signature)
        if found is None or found.made_of != made_of:
            found = self._fixed[signature] = _Fixed(
                made_of=made_of,
                inputs=signature.input_fields,
                system=super().format_system_message(signature),
                requirements=super().user_message_output_requirements(signature),
            )
        return found


def prompt_adapter(*, use_json_adapter_fallback: bool) -> ChatAdapter:
    """DSPy's ChatAdapter, the quicker one unless the fast path is switched off.

    Args:
        use_json_adapter_fallback: As in DSPy: whether an answer that does not parse is asked for again in JSON.
    """
    kind = PromptAdapter if fast_path_enabled() else ChatAdapter
    return kind(use_json_adapter_fallback=use_json_adapter_fallback)


def printed(field: Any, value: Any) -> str:
    """A field's value as DSPy prints it into a prompt."""
    kind = type(value)
    if kind is str or kind is int or kind is bool or (kind is float and math.isfinite(value)):
        return str(value)
    text: str = format_field_value(field_info=field, value=value)
    return text


def _made_of(signature: type[dspy.Signature]) -> tuple[str, _Fields]:
    """Everything of a signature that shows in a prompt; signatures are classes, and classes can be changed."""
    fields = tuple(
        (name, field, field.annotation, dict(field.json_schema_extra)) for name, field in signature.model_fields.items()
    )
    return signature.__doc__ or "", fields


# -- on the wire

_ROLES = ("user", "assistant")


@dataclass(frozen=True, slots=True, repr=False)
class _Form:
    """A sample as DSPy wrote it. Holds a credential: never print it."""

    provider: Any
    request: Request
    api_key: str | None
    url: str
    headers: tuple[tuple[str, str], ...]
    payload: dict[str, Any]


class PlainChat:
    """Completes requests of text alone for one `LM15Engine`.

    Args:
        engine: Writes the samples, and reads the answers.
    """

    def __init__(self, engine: LM15Engine) -> None:
        self._engine = engine
        self._forms: dict[tuple[str, int], tuple[object, _Form | None]] = {}

    def complete(self, request: Request) -> Response | None:
        """As `LM15Engine.complete`, or None, with nothing sent, when the request is not plain."""
        rows = _rows_of(request)
        form = None if rows is None else self._form_of(request)
        if form is None or form.provider.api_key != form.api_key:
            return None
        reply = form.provider._send(
            TransportRequest(
                method="POST",
                url=form.url,
                headers=list(form.headers),
                body=json_dumps({**form.payload, "messages": rows}),
            )
        )
        if reply.status >= 400:
            raise form.provider._http_error(reply)
        try:
            response: Response = form.provider.parse_response(form.request, reply)
        except ProviderError as error:
            _attach_error_metadata(error, reply.headers)
            raise
        return response

    def _form_of(self, request: Request) -> _Form | None:
        # Settings are remembered by identity, and kept alive so that no other object can take it.
        key = (request.model, id(request.config))
        kept = self._forms.get(key)
        if kept is None or kept[0] is not request.config:
            if len(self._forms) >= KEPT_FORMS:
                self._forms = {}
            kept = self._forms[key] = (request.config, self._written(request))
        return kept[1]

    def _written(self, request: Request) -> _Form | None:
        config = request.config
        if config.response_format is not None or config.cache is not None or config.logprobs is not None:
            return None
        texts = tuple(Message(role=role, parts=(TextPart(text=role),)) for role in ("user", "assistant", "user"))
        sample = Request(model=request.model, messages=texts, system="system", config=config)
        try:
            provider, routed = self._engine._target(sample)
            if (
                not isinstance(provider, OpenAIChatLM)
                or type(provider).complete is not OpenAIChatLM.complete
                or type(provider).parse_response is not OpenAIChatLM.parse_response
                or not (provider.api_key is None or type(provider.api_key) is str)
            ):
                return None
            wire, adaptations = provider._build(routed, stream=False)
        except LM15Error:
            return None  # DSPy's own way says what is wrong
        payload = json.loads(wire.body)
        if adaptations or wire.method != "POST" or payload.get("messages") != _rows_of(sample):
            return None
        return _Form(provider, routed, provider.api_key, wire.url, tuple(wire.headers), payload)


def _rows_of(request: Request) -> list[dict[str, str]] | None:
    """The messages as rows of role and content, None if they are more than that."""
    if request.tools or not (request.system is None or type(request.system) is str):
        return None
    rows = [] if request.system is None else [{"role": "system", "content": request.system}]
    for message in request.messages:
        part = message.parts[0]
        if message.role not in _ROLES or len(message.parts) != 1 or type(part) is not TextPart:
            return None
        if message.continuation or part.continuation:
            return None
        rows.append({"role": message.role, "content": part.text})
    return rows
