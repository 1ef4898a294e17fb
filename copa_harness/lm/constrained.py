"""Constrained answers, the asking side: which output fields a call has, and the closed lists of allowed values.

A field typed `Literal[...]`, as an enum or as `bool` has such a list; of the others the layout alone is given. Fields
and lists travel inside the request, in `config.extensions`, so they are part of the cache key; an engine that can
constrain its answers (`can_constrain`) reads them there. The fields are those of the `dspy.Predict` that is running, in
`dspy.ChatAdapter`'s layout.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

import dspy
from dspy.lm15 import Request

from copa_harness.errors import ConfigurationError
from copa_harness.lm.engine import Engine

EXTENSION = "copa_constrain"
"""Name in `Request.config.extensions`."""


@dataclass(frozen=True, slots=True)
class OutputField:
    """An output field in the order it is written; `choices` are its allowed values as text, None for free text."""

    name: str
    choices: tuple[str, ...] | None


def choices_of(annotation: Any) -> tuple[str, ...] | None:
    """The allowed values of a field's type, written as DSPy's prompts write them; None when any text is allowed."""
    if get_origin(annotation) is Literal:
        return tuple(dict.fromkeys(str(value) for value in get_args(annotation)))
    if isinstance(annotation, enum.EnumMeta):
        members: list[Any] = list(annotation)
        return tuple(dict.fromkeys(str(member.value) for member in members))
    return ("True", "False") if annotation is bool else None


def output_fields(signature: Any) -> tuple[OutputField, ...]:
    """A signature's output fields."""
    return tuple(OutputField(name, choices_of(field.annotation)) for name, field in signature.output_fields.items())


def constraint_of_call(
    messages: Sequence[Mapping[str, Any]] | None, settings: MutableMapping[str, Any], *, label_scores: bool
) -> tuple[OutputField, ...] | None:
    """The output fields of the predictor that is calling; None for a call that is a program's own.

    Args:
        messages: Of the call.
        settings: Of the call; told so where label scores are wanted, and DSPy hands them on to the prediction.
        label_scores: Whether they are (see `CallContext`).

    Raises:
        ConfigurationError: The prompt is not in `dspy.ChatAdapter`'s layout.
    """
    callers = dspy.settings.caller_modules or [None]
    predictor = callers[-1]
    if messages is None or not isinstance(predictor, dspy.Predict):
        return None  # a program's own call of the model has no fields
    fields = output_fields(predictor.signature)
    if not in_chat_layout(messages, [field.name for field in fields]):
        adapter = type(dspy.settings.adapter).__name__ if dspy.settings.adapter else "an unknown prompt adapter"
        raise ConfigurationError(
            f"got a prompt by {adapter} for the fields {', '.join(field.name for field in fields)}; constrained "
            "answers expect dspy.ChatAdapter's layout; remedy: use dspy.ChatAdapter, or drop constrain=True"
        )
    if label_scores:
        settings["logprobs"] = True
    return fields


def in_chat_layout(messages: Sequence[Mapping[str, Any]], fields: Iterable[str]) -> bool:
    """Whether a call asks for these fields in `dspy.ChatAdapter`'s layout."""
    asked = str(messages[-1].get("content", "")) if messages else ""
    return all(f"`[[ ## {name} ## ]]`" in asked for name in fields)


def with_constraint(request: Request, fields: Sequence[OutputField] | None) -> Request:
    """The request with its fields and their allowed values inside; as it is for None.

    The answer carries the log-probabilities of the allowed values whether or not any are asked for.
    """
    if fields is None:
        return request
    listed = [[field.name, None if field.choices is None else list(field.choices)] for field in fields]
    extensions = {**(request.config.extensions or {}), EXTENSION: listed}
    return replace(request, config=replace(request.config, extensions=extensions, logprobs=None))


def constraint_of(request: Request) -> tuple[OutputField, ...] | None:
    """The fields inside a request, None when its answer is free."""
    listed = (request.config.extensions or {}).get(EXTENSION)
    if listed is None:
        return None
    return tuple(OutputField(name, None if choices is None else tuple(choices)) for name, choices in listed)


def checked_constrain(constrain: bool, engine: Engine | None, *, model: str) -> bool:
    """`constrain` itself, if the engine can do it; None stands for an endpoint's.

    Raises:
        ConfigurationError: It cannot: an endpoint shows no log-probabilities of given texts.
    """
    if constrain and (engine is None or not engine.can_constrain):
        raise ConfigurationError(
            f"got constrain=True for {model!r}; constrained answers need the log-probabilities of every allowed value, "
            "which only a model in this process has: 'embedded' or 'hf:<path or id>'"
        )
    return constrain
