"""The ceiling on an answer: how many tokens the calling predictor's output fields can need, when nobody said it.

Without one an answer ends when the model ends it, and a model that rambles goes on to the end of its context: minutes
for a label. The ceiling is made of the signature, without a tokenizer: a token of every byte-level tokenizer covers at
least one byte, so the bytes of the longest well-formed answer bound its tokens from above.

| output field | tokens |
|---|---|
| `Literal`, enum, `bool` | the bytes of its longest value |
| `int`, `float` | 24 |
| anything else | 512 |

To these come the bytes of the markers of `dspy.ChatAdapter` and some room for what a model says before it answers. In
the layout of another prompt adapter every field counts as free text. An answer also stops at the adapter's last marker,
where an engine takes stop strings for certain (`Engine.takes_stop`): the adapter reads nothing behind it but a field
that it has not found before. Only a marker at the beginning of a line stops; in a sentence the adapter does not read it
either.

`max_tokens` of an LM or of a call goes before, and then the request is left as it is. Models that think before they
answer get no ceiling, since nobody can foresee how long they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import UnionType
from typing import Any, Union, get_args, get_origin

import dspy

from copa_harness.lm.constrained import choices_of, in_chat_layout
from copa_harness.lm.engine import Engine

DERIVED = "derived"
"""As `MeteredLM.answer_tokens`: what the calling predictor's output fields need."""

FREE_TEXT_TOKENS = 512
"""For an output field that may hold any text."""

NUMBER_TOKENS = 24
"""For a number: digits, sign, point and exponent of a float written in full."""

ROOM_TOKENS = 16
"""For white space, quotes and the first words of a model that talks before it answers."""

LEAST_OF_ENDPOINTS = 256
"""Nobody here knows what template and tokenizer an endpoint adds."""

STOP = "\n[[ ## completed ## ]]"

_OWN_CEILINGS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def answer_bounds(
    engine: Engine,
    model: str,
    *,
    answer_tokens: int | str | None,
    settings: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]] | None,
    constrained: bool,
) -> dict[str, Any]:
    """Settings to add to a call so that its answer ends: `max_tokens`, and `stop` where it is safe; {} to leave it.

    `answer_tokens` is the ceiling, `DERIVED`, or None for none. An answer that is chosen among allowed values
    (`constrained`) ends by itself.
    """
    if answer_tokens is None or messages is None or settings.get("tools"):
        return {}
    if any(settings.get(name) is not None for name in _OWN_CEILINGS):
        return {}
    predictor = (dspy.settings.caller_modules or [None])[-1]
    signature = predictor.signature if isinstance(predictor, dspy.Predict) else None
    in_layout = signature is not None and in_chat_layout(messages, signature.output_fields)
    bounds: dict[str, Any] = {}
    if isinstance(answer_tokens, int):
        bounds["max_tokens"] = answer_tokens
    elif signature is not None and not engine.limits(model).thinks:
        ceiling = ceiling_of(signature) if in_layout else FREE_TEXT_TOKENS * (1 + len(signature.output_fields))
        bounds["max_tokens"] = max(ceiling, LEAST_OF_ENDPOINTS) if engine.is_endpoint else ceiling
    if in_layout and not constrained and settings.get("stop") is None and engine.takes_stop(model):
        bounds["stop"] = STOP
    return bounds


def ceiling_of(signature: Any) -> int:
    """The most tokens a well-formed answer for a signature needs, in `dspy.ChatAdapter`'s layout."""
    names = [*signature.output_fields, "completed"]
    markers = sum(_n_bytes(f"[[ ## {name} ## ]]\n\n\n") for name in names)
    values = sum(_known_value_tokens(field.annotation) for field in signature.output_fields.values())
    return markers + values + ROOM_TOKENS


def value_tokens(annotation: Any) -> int:
    """The most tokens a value of this type needs.

    Args:
        annotation: Of an output field.
    """
    if (choices := choices_of(annotation)) is not None:
        return max(map(_n_bytes, choices), default=0)
    if annotation in (int, float):
        return NUMBER_TOKENS
    if annotation is type(None):
        return len("None")
    if get_origin(annotation) in (Union, UnionType):
        return max(map(value_tokens, get_args(annotation)))
    return FREE_TEXT_TOKENS


@lru_cache(maxsize=256)
def _hashed_value_tokens(annotation: Any) -> int:
    return value_tokens(annotation)


def _known_value_tokens(annotation: Any) -> int:
    try:
        return _hashed_value_tokens(annotation)
    except TypeError:  # a type with something in it that cannot be hashed
        return value_tokens(annotation)


def _n_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
