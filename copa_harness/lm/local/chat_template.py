"""From messages to tokens: the chat template, the split into shared prefix and own suffix, and their errors.

The engine and the trainer both come through here, so a training prompt is the inference prompt token for token.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from copa_harness.errors import ConfigurationError, ProviderError

if TYPE_CHECKING:
    from dspy.lm15 import Request

ChatMessage = Mapping[str, Any]
"""`{"role": ..., "content": text}`"""


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt's token ids; the first `n_prefix` are shared by requests that differ only in the last message."""

    ids: tuple[int, ...]
    n_prefix: int


def no_chat_template(name: str) -> ConfigurationError:
    """What is said of a model without a chat template."""
    return ConfigurationError(
        f"got the model {name} without a chat template (a base model?); expected one, since prompts are lists of "
        "messages; remedy: an instruction-tuned model, or a file with a template by --copa-chat-template=FILE or "
        "build_lm(..., chat_template=FILE), or as chat_template.jinja in the model's folder"
    )


class ChatTemplate:
    """A tokenizer together with its chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        name: the model's name, for error messages.
        chat_template: a Jinja template that replaces the tokenizer's own.

    Raises:
        ConfigurationError: neither the tokenizer nor the caller has a chat template.
    """

    def __init__(self, tokenizer: Any, *, name: str, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self._template = chat_template or tokenizer.chat_template
        if not self._template:
            raise no_chat_template(name)
        self._cached_ids = functools.lru_cache(maxsize=256)(self._ids)

    def text(self, messages: Sequence[ChatMessage], *, answer_next: bool) -> str:
        """The prompt as text; `answer_next` appends what opens the assistant's turn.

        Templates that know no system role (Gemma's) get the system text at the head of the first user message.

        Raises:
            ConfigurationError: the template refuses the messages.
        """
        import jinja2

        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            return self._render(plain, answer_next=answer_next)
        except jinja2.TemplateError as error:
            if len(plain) > 1 and plain[0]["role"] == "system" and plain[1]["role"] == "user":
                head = {"role": "user", "content": f"{plain[0]['content']}\n\n{plain[1]['content']}"}
                try:
                    return self._render([head, *plain[2:]], answer_next=answer_next)
                except jinja2.TemplateError:
                    pass  # the first refusal is the one to report
            roles = ", ".join(str(message["role"]) for message in plain)
            raise ConfigurationError(
                f"the chat template of {self.name} refuses the roles ({roles}): {error}; "
                "remedy: give another template with --copa-chat-template=FILE or build_lm(..., chat_template=FILE)"
            ) from error

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered text; the template has written every special token already."""
        return self._ids(text)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """(first, one past the last) character of every token of `ids(text)`."""
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        return [(int(start), int(end)) for start, end in encoded["offset_mapping"]]

    def prompt(self, messages: Sequence[ChatMessage]) -> PromptTokens:
        """Tokens of a prompt that the assistant is to answer, with the length of its shareable prefix.

        The prefix is everything before the last message (system prompt and demonstrations) as far as it
        tokenizes alike on its own. At least one token is always left to the suffix.
        """
        ids = self._ids(self.text(messages, answer_next=True))
        if len(messages) < 2:
            return PromptTokens(ids, 0)
        try:
            head = self._cached_ids(self.text(messages[:-1], answer_next=False))
        except ConfigurationError:
            return PromptTokens(ids, 0)  # a template may refuse the head alone; sharing is only a matter of speed
        n_prefix, limit = 0, min(len(head), len(ids) - 1)
        while n_prefix < limit and head[n_prefix] == ids[n_prefix]:
            n_prefix += 1
        return PromptTokens(ids, n_prefix)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _render(self, messages: list[dict[str, Any]], *, answer_next: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=answer_next
            )
        )

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def request_messages(request: Request) -> list[dict[str, str]]:
    """The messages of a DSPy request as role and text; `developer` counts as `system`.

    Raises:
        ConfigurationError: the request carries tools or a response format, and so would every other of the program.
        ProviderError: the request holds what a local text model cannot take (images).
    """
    if request.tools:
        raise ConfigurationError(
            f"got a request with native tools= for {request.model}; a model in this process takes text only; remedy: "
            "let DSPy write the tools into the prompt, as dspy.ReAct does, and dspy.ChatAdapter does for dspy.Tool "
            "fields unless it has use_native_function_calling=True"
        )
    if request.config.response_format is not None:
        raise ConfigurationError(
            f"got a request with a response format for {request.model}; a model in this process writes free text; "
            "remedy: use dspy.ChatAdapter without response_format=, or constrain=True for Literal, enum and bool fields"
        )
    messages: list[dict[str, str]] = []
    if request.system is not None:
        system = request.system
        messages.append({"role": "system", "content": system if isinstance(system, str) else _text_of(system, request)})
    for message in request.messages:
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": _text_of(message.parts, request)})
    return messages


def _text_of(parts: Sequence[Any], request: Request) -> str:
    for part in parts:
        if part.type != "text":
            raise ProviderError(
                f"got a part of type {part.type!r} for {request.model}; expected text; "
                "remedy: use a model that reads this kind of input"
            )
    return "".join(part.text for part in parts)
