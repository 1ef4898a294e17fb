"""Prompts rendered by our adapter are DSPy's, character by character, with the fast path on and off."""

import enum
import os
from typing import Literal
from unittest import mock

import dspy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copa_harness.lm.dspy_internals import SWITCH, PromptAdapter, prompt_adapter

both_positions = pytest.mark.parametrize("position", ["1", "0"])


def adapter_at(position):
    """What is used with the fast path on or off."""
    with mock.patch.dict(os.environ, {SWITCH: position}):
        return prompt_adapter(use_json_adapter_fallback=False)


def test_the_switch_decides_whose_adapter_it_is():
    assert (type(adapter_at("1")), type(adapter_at("0"))) == (PromptAdapter, dspy.ChatAdapter)


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Rich(dspy.Signature):
    """Say it.

    In two lines."""

    text: str = dspy.InputField(desc="what is said")
    history: dspy.History = dspy.InputField()
    numbers: list[float] = dspy.InputField()
    mood: Mood = dspy.OutputField()
    size: Literal["small", "large"] = dspy.OutputField(desc="how big")
    count: int = dspy.OutputField()


class Plain(dspy.Signature):
    """Answer."""

    question = dspy.InputField()
    context = dspy.InputField(desc="where to look")
    answer = dspy.OutputField()


VALUES = st.one_of(
    st.text(max_size=20), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.text(max_size=5))
)


@both_positions
@settings(max_examples=60)
@given(question=VALUES, context=VALUES, answer=VALUES, demo_question=VALUES)
def test_prompts_are_equal_for_any_value(position, question, context, answer, demo_question):
    demos = [{"question": demo_question, "context": context, "answer": answer}, {"question": "q", "answer": "a"}]
    inputs = {"question": question, "context": context}
    ours = adapter_at(position).format(Plain, demos, inputs)
    assert ours == dspy.ChatAdapter().format(Plain, demos, inputs)


@both_positions
def test_prompts_are_equal_for_typed_fields_and_histories(position):
    history = dspy.History(messages=[{"text": "hi", "numbers": [1.0], "mood": Mood.GOOD, "size": "small", "count": 1}])
    inputs = {"text": "so", "history": history, "numbers": [0.5, 2]}
    demos = [{"text": "a", "numbers": [], "mood": Mood.BAD, "size": "large", "count": 3}]
    ours = adapter_at(position)
    assert ours.format(Rich, demos, inputs) == dspy.ChatAdapter().format(Rich, demos, inputs)


@both_positions
@pytest.mark.parametrize("change", ["instructions", "description"])
def test_a_signature_changed_in_place_is_rendered_anew(change, position):
    class Task(dspy.Signature):
        """First."""

        question: str = dspy.InputField(desc="one")
        answer: str = dspy.OutputField()

    adapter = adapter_at(position)
    before = adapter.format(Task, [], {"question": "q"})
    if change == "instructions":
        Task.instructions = "Second."
    else:
        Task.model_fields["question"].json_schema_extra["desc"] = "two"
    after = adapter.format(Task, [], {"question": "q"})
    assert after != before
    assert after == dspy.ChatAdapter().format(Task, [], {"question": "q"})


def test_a_callback_hears_of_each_prompt_and_each_answer_once():
    heard = []

    class Listener(dspy.utils.callback.BaseCallback):
        def on_adapter_format_start(self, call_id, instance, inputs):
            heard.append("format")

        def on_adapter_parse_start(self, call_id, instance, inputs):
            heard.append("parse")

    adapter = PromptAdapter(use_json_adapter_fallback=False)
    with dspy.context(callbacks=[Listener()]):
        adapter.format(Plain, [], {"question": "q", "context": "c"})
        adapter.parse(Plain, "[[ ## answer ## ]]\n7")
    assert heard == ["format", "parse"]
