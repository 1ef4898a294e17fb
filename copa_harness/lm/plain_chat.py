"""Plain chat completions on the wire: DSPy's own form of a request, filled in with texts.

Writing a request down takes DSPy's client as long as everything else it does. For one model and one set of settings all
of it is the same but the texts, so DSPy writes a sample once; if that shows its messages as plain rows, later requests
of text alone are the sample with other rows. What they send is what DSPy would send. Anything else (tools, media, JSON
modes, rotating credentials, dialects of one's own) is left to DSPy, and so is reading every answer. Tied to DSPy 3.4
like `http_engine`. Knows nothing of caches or budgets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

# Private, and pinned by dspy >=3.4,<3.5.
from dspy._vendor.lm15.providers.base import _attach_error_metadata
from dspy._vendor.lm15.providers.common import json_dumps
from dspy._vendor.lm15.providers.openai_chat import OpenAIChatLM
from dspy._vendor.lm15.transports import TransportRequest
from dspy.clients.engines.lm15_engine import LM15Engine
from dspy.lm15 import LM15Error, Message, ProviderError, Request, Response, TextPart

KEPT = 64
"""Forms remembered per engine."""

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
            if len(self._forms) >= KEPT:
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
