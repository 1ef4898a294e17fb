"""The text of a classification conversation, character for character as ``dspy.ChatAdapter`` renders it.

A fast re-statement of DSPy 3.4's ChatAdapter for the shapes the episodes use (any input and output fields of the types
``str``, ``float``, ``int``, ``bool`` and ``Literal``). A test holds it byte-equal to ``dspy.ChatAdapter().format``.
"""

from __future__ import annotations

from dataclasses import dataclass

INCOMPLETE_PREFIX = "This is an example of the task, though some input or output fields are not supplied.\n\n"
NOT_SUPPLIED = "Not supplied for this particular example. "
COMPLETED = "\n\n[[ ## completed ## ]]\n"
_NOTES = {
    "str": "",
    "bool": "        # note: the value you produce must be True or False",
    "int": "        # note: the value you produce must be a single int value",
    "float": "        # note: the value you produce must be a single float value",
}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a signature.

    Attributes:
        name: As the program calls it.
        kind: ``str``, ``float``, ``int`` or ``bool``: the annotation, unless ``literal`` is given.
        description: Its description, or "".
        literal: The values when it is a ``Literal``, else None.
    """

    name: str
    kind: str = "str"
    description: str = ""
    literal: tuple[str, ...] | None = None

    @property
    def printed_type(self) -> str:
        """The annotation as DSPy prints it."""
        if self.literal is None:
            return self.kind
        return "Literal[" + ", ".join(repr(label) for label in self.literal) + "]"

    @property
    def note(self) -> str:
        """What DSPy says about the value of an output of this type."""
        if self.literal is None:
            return _NOTES[self.kind]
        return "        # note: the value you produce must exactly match (no extra characters) one of: " + "; ".join(
            self.literal
        )


REASONING = Field("reasoning")


@dataclass(frozen=True, slots=True)
class Shape:
    """The signature of one episode: its fields in order (``reasoning`` first, as in ``dspy.ChainOfThought``)."""

    inputs: tuple[Field, ...]
    outputs: tuple[Field, ...]

    @property
    def reasoning(self) -> bool:
        """Whether a ``reasoning`` output comes first."""
        return self.outputs[0] == REASONING


def system_text(shape: Shape, instruction: str) -> str:
    """The system message; ``instruction`` is its last part, so positions in it count from the end."""
    text = "Your input fields are:\n" + _listed(shape.inputs) + "\nYour output fields are:\n" + _listed(shape.outputs)
    text += "\nAll interactions will be structured in the following way, with the appropriate values filled in.\n\n"
    text += "".join(f"[[ ## {field.name} ## ]]\n{{{field.name}}}\n\n" for field in shape.inputs)
    text += "\n\n".join(f"[[ ## {field.name} ## ]]\n{{{field.name}}}{field.note}" for field in shape.outputs)
    return text + COMPLETED + "In adhering to this structure, your objective is: \n        " + instruction


def _listed(fields: tuple[Field, ...]) -> str:
    lines = (f"{i}. `{field.name}` ({field.printed_type}): {field.description}" for i, field in enumerate(fields, 1))
    return "\n".join(lines).strip()


def request_text(shape: Shape) -> str:
    """What DSPy appends to the last user message (never to a demonstration's)."""
    asked: list[str] = []
    for field in shape.outputs:
        plain = field.literal is None and field.kind == "str"
        must = "" if plain else f" (must be formatted as a valid Python {field.printed_type})"
        asked.append(f"`[[ ## {field.name} ## ]]`{must}")
    return (
        "\n\nRespond with the corresponding output fields, starting with the field "
        + ", then ".join(asked)
        + ", and then ending with the marker for `[[ ## completed ## ]]`."
    )


def answer_parts(shape: Shape, values: tuple[str, ...]) -> list[str]:
    """Alternating marker and value texts of an assistant message, and its end."""
    parts: list[str] = []
    for i, (field, value) in enumerate(zip(shape.outputs, values, strict=True)):
        parts += [("\n\n" if i else "") + f"[[ ## {field.name} ## ]]\n", value]
    return [*parts, COMPLETED]
