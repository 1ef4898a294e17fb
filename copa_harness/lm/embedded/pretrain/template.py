"""The text of a classification conversation, character for character as ``dspy.ChatAdapter`` renders it.

A fast re-statement of DSPy 3.4's ChatAdapter for the shapes the episodes use (several or single input fields, a label
output, optionally a ``reasoning`` output before it). A test holds it byte-equal to ``dspy.ChatAdapter().format``.
"""

from __future__ import annotations

from dataclasses import dataclass

INCOMPLETE_PREFIX = "This is an example of the task, though some input or output fields are not supplied.\n\n"
NOT_SUPPLIED = "Not supplied for this particular example. "


@dataclass(frozen=True, slots=True)
class Shape:
    """The signature of one episode.

    Attributes:
        inputs: Names of the input fields, in order.
        input_type: ``str``, ``float`` or ``int``: the annotation of every input field.
        output: Name of the label field.
        output_description: Description of the label field, or "".
        literal: The labels when the output is a ``Literal``, else None.
        reasoning: Whether a ``reasoning`` output precedes the label, as in ``dspy.ChainOfThought``.
    """

    inputs: tuple[str, ...]
    input_type: str
    output: str
    output_description: str
    literal: tuple[str, ...] | None
    reasoning: bool

    @property
    def output_type(self) -> str:
        """The annotation of the label field as DSPy prints it."""
        if self.literal is None:
            return "str"
        return "Literal[" + ", ".join(repr(label) for label in self.literal) + "]"


def system_text(shape: Shape, instruction: str) -> str:
    """The system message; ``instruction`` is its last part, so positions in it count from the end."""
    lines = [f"{i}. `{name}` ({shape.input_type}): " for i, name in enumerate(shape.inputs, 1)]
    text = ("Your input fields are:\n" + "\n".join(lines)).strip() + "\nYour output fields are:\n"
    outputs = ["1. `reasoning` (str): "] if shape.reasoning else []
    outputs.append(f"{len(outputs) + 1}. `{shape.output}` ({shape.output_type}): {shape.output_description}")
    text += "\n".join(outputs).strip()
    text += "\nAll interactions will be structured in the following way, with the appropriate values filled in.\n\n"
    text += "".join(f"[[ ## {name} ## ]]\n{{{name}}}\n\n" for name in shape.inputs)
    if shape.reasoning:
        text += "[[ ## reasoning ## ]]\n{reasoning}\n\n"
    note = ""
    if shape.literal is not None:
        note = "        # note: the value you produce must exactly match (no extra characters) one of: "
        note += "; ".join(shape.literal)
    text += f"[[ ## {shape.output} ## ]]\n{{{shape.output}}}{note}\n\n[[ ## completed ## ]]\n"
    return text + "In adhering to this structure, your objective is: \n        " + instruction


def user_parts(shape: Shape, values: tuple[str, ...]) -> list[str]:
    """Alternating marker and value texts of a user message without its closing request."""
    parts: list[str] = []
    for i, (name, value) in enumerate(zip(shape.inputs, values, strict=True)):
        parts += [("\n\n" if i else "") + f"[[ ## {name} ## ]]\n", value]
    return parts


def request_text(shape: Shape) -> str:
    """What DSPy appends to the last user message (never to a demonstration's)."""
    must = f" (must be formatted as a valid Python {shape.output_type})" if shape.literal is not None else ""
    first = "`[[ ## reasoning ## ]]`, then " if shape.reasoning else ""
    return (
        "\n\nRespond with the corresponding output fields, starting with the field "
        + first
        + f"`[[ ## {shape.output} ## ]]`{must}, and then ending with the marker for `[[ ## completed ## ]]`."
    )


def answer_parts(shape: Shape, label: str, reasoning: str) -> tuple[str, str, str]:
    """Text before the label, the label, and text after it, of an assistant message."""
    before = f"[[ ## {shape.output} ## ]]\n"
    if shape.reasoning:
        before = f"[[ ## reasoning ## ]]\n{reasoning}\n\n" + before
    return before, label, "\n\n[[ ## completed ## ]]\n"
