"""DSPy's ChatAdapter with what is the same in every call computed once: the very same prompts for a third of the time.

DSPy renders the system message anew for every call and builds a pydantic serializer for every value it prints, which is
a third of what one module call costs. Here a signature's fixed texts are kept as long as the signature is what it was,
and text and numbers are printed as they are. Measured on a signature of two fields with DSPy 3.4.1: see "Speed" in the
README. Everything else (demonstrations, histories, custom types, parsing) is DSPy's. Knows nothing of models.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.adapters.chat_adapter import ChatAdapter
from dspy.adapters.utils import format_field_value

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
