"""A task in words, for a model that writes instructions: all fields, what separates the labels, nothing cut unsaid."""

from typing import Literal

import dspy
import pytest

from copa_harness.optimize.propose.render import cleaned, data_summary, demos_text, other_steps_text, short, step_text


def test_the_data_summary_tells_inputs_from_answers_and_what_separates_them(toy):
    lines = data_summary(toy.train).splitlines()
    assert lines[0].startswith("24 examples")
    assert lines[1] == "size (given): numbers from 0.3 to 9.6"
    assert lines[3] == "kind (to be answered): one of big (12), small (12)"
    assert lines[4].startswith("size by kind: big: 5.1 to 9.6")  # it separates them more than the weight does
    assert lines[5].startswith("weight by kind: ")
    shown = lines[lines.index("Some examples:") + 1 :]
    assert {line.rpartition("=")[2] for line in shown} == {"big", "small"}


def test_texts_are_counted_measured_and_cut_with_a_word(toy):
    rows = [dspy.Example(text="word " * (70 + i), label="ab"[i % 2]).with_inputs("text") for i in range(20)]
    summary = data_summary(rows)
    assert "text (given): 20 different texts of up to 445 characters" in summary
    assert "label (to be answered): one of a (10), b (10)" in summary
    assert "... (350 characters)" in summary


def test_no_examples_are_no_error():
    assert data_summary([]) == "no examples"


def test_a_step_tells_types_choices_and_descriptions():
    class Sort(dspy.Signature):
        """Sort it."""

        ticket: str = dspy.InputField(desc="what the customer wrote")
        urgent: bool = dspy.OutputField()
        queue: Literal["billing", "other"] = dspy.OutputField()

    assert step_text("sort", Sort).splitlines() == [
        "sort: ticket -> urgent, queue",
        "  ticket (what the customer wrote)",
        "  urgent (bool)",
        "  queue (one of billing, other)",
    ]


def test_other_steps_come_with_their_instructions_as_they_are_now(stages):
    signatures = {name: predictor.signature for name, predictor in stages.program().named_predictors()}
    text = other_steps_text("look", signatures, {"look": "A.", "tell": "As it is now."})
    assert text == "tell: hint, size -> kind\n  its instruction: As it is now."
    assert other_steps_text("self", {"self": signatures["look"]}, {"self": "A."}) == ""


def test_demonstrations_show_the_fields_of_the_step_alone(stages):
    demo = dspy.Example(augmented=True, hint="large", size="9", weight="1", kind="big")
    assert demos_text([demo], stages.program().tell.signature) == "hint=large; size=9; kind=big"


@pytest.mark.parametrize(
    ("answer", "instruction"),
    [
        ("Say it.", "Say it."),
        ("  'Say it.' ", "Say it."),
        ("```text\nSay it.\n```", "Say it."),
        ("Revised instruction: Say it.", "Say it."),
        ("Use ```code``` and `this`.", "Use ```code``` and `this`."),
        ('"a" is not "b"', '"a" is not "b"'),
        ("Instructions matter: read them.", "Instructions matter: read them."),
        ("", ""),
    ],
)
def test_an_answer_is_cleaned_of_what_stands_around_it_and_of_nothing_else(answer, instruction):
    assert cleaned(answer) == instruction


def test_what_is_short_stays_as_it_is():
    assert short("abc") == "abc"
    assert short("a" * 400) == "a" * 300 + " ... (400 characters)"
