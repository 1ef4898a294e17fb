"""What a program's predictors send to a model, as text: instruction, demonstrations, and a slot for every input."""

from __future__ import annotations

from typing import Any

import dspy

from copa_harness.evaluate.runner import default_adapter


def prompt_texts(program: dspy.Module) -> dict[str, str]:
    """The messages of every predictor by its name, in order, each under its role; `{name}` where an input goes.

    A prompt adapter that cannot render slots says why in place of the messages.
    """
    adapter = default_adapter()
    texts = {}
    for name, predictor in program.named_predictors():
        signature = predictor.signature
        slots = {field: f"{{{field}}}" for field in signature.input_fields}
        try:
            messages = adapter.format(signature, predictor.demos, slots)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            messages = [{"role": "not rendered", "content": f"{type(adapter).__name__}: {error}"}]
        texts[name] = "\n\n".join(f"[{message['role']}]\n{_text(message['content'])}" for message in messages)
    return texts


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    return "\n".join(part["text"] if isinstance(part, dict) and "text" in part else repr(part) for part in parts)
