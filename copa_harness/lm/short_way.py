"""The short way from a prompt to the door: for plain text, without what DSPy's call path does only for other calls.

DSPy turns every call into an OpenAI body, reads that back as a canonical request, and sets up retries, streaming,
pricing, caching and history, which is a third of what a module call costs. Where none of it is asked for (text
messages, one completion, plain settings, no callbacks, history or streams) the request is built directly. It is equal
to the one DSPy builds, so keys and answers are the same; anything else is left to DSPy. Tied to DSPy 3.4 like
`metered`. Knows nothing of caches, budgets or engines.
"""

from __future__ import annotations

import logging
from typing import Any

import dspy

# Private, and pinned by dspy >=3.4,<3.5.
from dspy.clients.backend_selection import CLIENT_KEYS
from dspy.clients.call_result import legacy_output
from dspy.lm15 import Config, LM15Error, Message, Request, TextPart, request_from_openai_chat

KEPT = 512
"""Messages remembered as they were built (system texts and demonstrations come with every call), and settings."""

_COUNTS = frozenset({"n", "num_generations"})
_NOT_SENT = frozenset({"cache", "rollout_id"}) | _COUNTS
_OTHERS = frozenset({"logprobs", "prompt_cache", "request", *CLIENT_KEYS})
_PLAIN = (str, int, float, bool, type(None))
_logger = logging.getLogger("dspy.clients.lm")


class ShortWay:
    """Builds requests, keeping what calls have in common. Thread-safe; shared by copies of an LM."""

    def __init__(self) -> None:
        self._configs: dict[str, Config | None] = {}
        self._messages: dict[tuple[str, str], Message] = {}

    def request(self, model: str, messages: Any, settings: dict[str, Any]) -> Request | None:
        """The request DSPy would make of these, or None when that is for DSPy to say.

        Args:
            model: The model's name.
            messages: OpenAI-style messages.
            settings: The LM's defaults and the call's own settings together.
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
        settings.disable_history
        and settings.send_stream is None
        and not settings.usage_tracker
        and not settings.callbacks
        and not lm.callbacks
        and lm.num_retries == 0
        and lm.model_type == "chat"
        and type(lm).forward is dspy.LM.forward
        and "forward" not in vars(lm)
    )


def outputs_of(lm: dspy.LM, response: Any) -> list[Any]:
    """What DSPy's LM returns for an answer to a chat request."""
    if response.finish_reason == "length":
        _logger.warning("LM response was truncated; increase max_tokens or inspect history.")
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
