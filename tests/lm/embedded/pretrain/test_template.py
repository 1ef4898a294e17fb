from __future__ import annotations

from typing import Literal

import dspy
import pytest

from copa_harness.lm.embedded.pretrain import template

INSTRUCTION = "Classify it. Answer with one of: one, two."


def signature(shape: template.Shape):
    kind = {"str": str, "float": float, "int": int}[shape.input_type]
    fields = {name: (kind, dspy.InputField()) for name in shape.inputs}
    output = Literal[shape.literal] if shape.literal else str
    fields[shape.output] = (output, dspy.OutputField(desc=shape.output_description))
    made = dspy.Signature(fields, INSTRUCTION)
    return dspy.ChainOfThought(made).predict.signature if shape.reasoning else made


def shape(**changes) -> template.Shape:
    usual = {
        "inputs": ("stem_height", "leaf_depth"),
        "input_type": "float",
        "output": "answer",
        "output_description": "",
        "literal": None,
        "reasoning": False,
    }
    return template.Shape(**{**usual, **changes})


SHAPES = {
    "several float fields": shape(),
    "several text fields with a description": shape(input_type="str", output_description="one, or two"),
    "single field": shape(inputs=("features",), input_type="str"),
    "another output name": shape(output="species"),
    "Literal": shape(literal=("one", "two")),
    "Literal in a single field": shape(inputs=("record",), input_type="str", literal=("one", "two")),
    "chain of thought": shape(reasoning=True, output_description="one, or two"),
    "chain of thought with Literal": shape(reasoning=True, literal=("one", "two")),
    "int fields": shape(input_type="int"),
}


def values(chosen: template.Shape) -> dict[str, object]:
    kind = {"str": str, "float": float, "int": lambda v: int(float(v))}[chosen.input_type]
    return {name: kind(f"{i + 1}.5") for i, name in enumerate(chosen.inputs)}


@pytest.mark.parametrize("name", SHAPES)
def test_a_conversation_is_byte_equal_to_the_chat_adapter(name):
    chosen = SHAPES[name]
    inputs = values(chosen)
    thought = {"reasoning": "It looks like two."} if chosen.reasoning else {}
    demos = [dspy.Example(**inputs, **thought, **{chosen.output: "two"})]
    system, user, assistant, last = dspy.ChatAdapter().format(signature(chosen), demos, inputs)
    printed = tuple(str(value) for value in inputs.values())
    body = "".join(template.user_parts(chosen, printed))
    assert system["content"] == template.system_text(chosen, INSTRUCTION)
    assert user["content"] == body
    assert assistant["content"] == "".join(template.answer_parts(chosen, "two", "It looks like two."))
    assert last["content"] == body + template.request_text(chosen)


def test_a_demonstration_without_reasoning_is_byte_equal_to_the_chat_adapter():
    chosen = SHAPES["chain of thought"]
    inputs = values(chosen)
    demos = [dspy.Example(**inputs, answer="two")]
    _, user, assistant, _ = dspy.ChatAdapter().format(signature(chosen), demos, inputs)
    printed = tuple(str(value) for value in inputs.values())
    assert user["content"] == template.INCOMPLETE_PREFIX + "".join(template.user_parts(chosen, printed))
    assert assistant["content"] == "".join(template.answer_parts(chosen, "two", template.NOT_SUPPLIED))
