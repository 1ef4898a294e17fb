from __future__ import annotations

from typing import Literal

import dspy
import pytest

from copa_harness.lm.embedded.pretrain import template
from copa_harness.lm.embedded.pretrain.template import Field

INSTRUCTION = "Classify it. Answer with one of: one, two."


TYPES = {"str": str, "float": float, "int": int, "bool": bool}


def annotation(field: template.Field):
    return Literal[field.literal] if field.literal else TYPES[field.kind]


def signature(shape: template.Shape):
    outputs = shape.outputs[1:] if shape.reasoning else shape.outputs
    fields = {f.name: (annotation(f), dspy.InputField(desc=f.description)) for f in shape.inputs}
    fields |= {f.name: (annotation(f), dspy.OutputField(desc=f.description)) for f in outputs}
    made = dspy.Signature(fields, INSTRUCTION)
    return dspy.ChainOfThought(made).predict.signature if shape.reasoning else made


STEM, LEAF = Field("stem_height", "float"), Field("leaf_depth", "float")
ONE_OR_TWO = ("one", "two")


def shape(*inputs: Field, to: tuple[Field, ...] = (Field("answer"),)) -> template.Shape:
    return template.Shape(inputs or (STEM, LEAF), to)


SHAPES = {
    "several float fields": shape(),
    "several text fields with a description": shape(
        Field("stem_height"), Field("leaf_depth"), to=(Field("answer", description="one, or two"),)
    ),
    "single field": shape(Field("features")),
    "another output name": shape(to=(Field("species"),)),
    "Literal": shape(to=(Field("answer", literal=ONE_OR_TWO),)),
    "Literal in a single field": shape(Field("record"), to=(Field("answer", literal=ONE_OR_TWO),)),
    "chain of thought": shape(to=(template.REASONING, Field("answer", description="one, or two"))),
    "chain of thought with Literal": shape(to=(template.REASONING, Field("answer", literal=ONE_OR_TWO))),
    "int fields": shape(Field("stem_height", "int")),
    "mixed inputs with descriptions": shape(
        Field("a", "bool", "whether"), Field("b", "int"), Field("c_d", "str", "what it says"), Field("e", "float")
    ),
    "bool": shape(to=(Field("urgent", "bool"),)),
    "int with a description": shape(to=(Field("level", "int", "1 to 3"),)),
    "two outputs": shape(to=(Field("queue", description="one, or two"), Field("level", "int"))),
    "three outputs": shape(
        Field("ticket"), to=(Field("queue", literal=ONE_OR_TWO), Field("level", "int", "0 to 9"), Field("ok", "bool"))
    ),
    "Literal last": shape(to=(Field("ok", "bool"), Field("name"), Field("queue", literal=ONE_OR_TWO))),
    "float output": shape(to=(Field("score", "float"), Field("name"))),
    "chain of thought with two outputs": shape(to=(template.REASONING, Field("level", "int"), Field("queue"))),
}


def value(field: template.Field, i: int) -> object:
    if field.literal or field.kind == "str":
        return "two" if field.literal else f"{i + 1}.5"
    return {"float": i + 1.5, "int": i + 1, "bool": i % 2 == 0}[field.kind]


def values(fields: tuple[template.Field, ...]) -> dict[str, object]:
    return {field.name: value(field, i) for i, field in enumerate(fields)}


def user_text(inputs: dict[str, object]) -> str:
    return "\n\n".join(f"[[ ## {name} ## ]]\n{given}" for name, given in inputs.items())


@pytest.mark.parametrize("name", SHAPES)
def test_a_conversation_is_byte_equal_to_the_chat_adapter(name):
    chosen = SHAPES[name]
    inputs, outputs = values(chosen.inputs), values(chosen.outputs)
    demos = [dspy.Example(**inputs, **outputs)]
    system, user, assistant, last = dspy.ChatAdapter().format(signature(chosen), demos, inputs)
    body = user_text(inputs)
    assert system["content"] == template.system_text(chosen, INSTRUCTION)
    assert user["content"] == body
    assert assistant["content"] == "".join(template.answer_parts(chosen, tuple(map(str, outputs.values()))))
    assert last["content"] == body + template.request_text(chosen)


def test_a_demonstration_without_reasoning_is_byte_equal_to_the_chat_adapter():
    chosen = SHAPES["chain of thought"]
    inputs = values(chosen.inputs)
    demos = [dspy.Example(**inputs, answer="two")]
    _, user, assistant, _ = dspy.ChatAdapter().format(signature(chosen), demos, inputs)
    assert user["content"] == template.INCOMPLETE_PREFIX + user_text(inputs)
    assert assistant["content"] == "".join(template.answer_parts(chosen, (template.NOT_SUPPLIED, "two")))
