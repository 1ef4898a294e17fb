"""The short way from a prompt to the gateway: for plain text, without what DSPy's call path does only for other calls.

DSPy turns every call into an OpenAI body, reads that back as a canonical request, and sets up retries, streaming,
pricing, caching and history, which is a third of what a module call costs. Where none of it is asked for (text
messages, one completion, plain settings, no callbacks, history or streams) the request is built directly. It is equal
to the one DSPy builds, so keys and answers are the same; anything else is left to DSPy. Tied to DSPy 3.4 like
`metered`.

DSPy's ChatAdapter with what is the same in every call computed once: the very same prompts for a third of the time.

DSPy renders the system message anew for every call and builds a pydantic serializer for every value it prints, which is
a third of what one module call costs. Here a signature's fixed texts are kept as long as the signature is what it was,
and text and numbers are printed as they are. Measured on a signature of two fields with DSPy 3.4.1: see "Speed" in the
README. Everything else (demonstrations, histories, custom types, parsing) is DSPy's.
"""

from __future__ import annotations

import logging
import math
import weakref
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.adapters.chat_adapter import ChatAdapter
from dspy.adapters.utils import format_field_value
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
