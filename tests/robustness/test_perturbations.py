"""What a perturbation changes, that it always does, that any part of it can be made, and that a seed decides it."""

import math
import re
import subprocess
import sys
from typing import Literal

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copa_harness.errors import ConfigurationError
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.robustness.perturbations import (
    NAMES,
    OF_TEXT,
    Edit,
    Forms,
    Step,
    Swap,
    changed_example,
    changed_program,
    check_names,
    edited,
    shuffled,
    steps_in_example,
    steps_in_program,
    swapped,
)

TEXTS = st.text(alphabet="abcdEF ,.\n5", max_size=60)
SEEDS = st.integers(0, 1000)
ROW = dspy.Example(
    question="What do four new pens cost in town today?", size="5.1", tags=["a", "b", "c"], answer="twelve"
).with_inputs("question", "size", "tags")


class Choose(dspy.Signature):
    """Say which colour it is."""

    question: str = dspy.InputField(desc="what is asked")
    size: str = dspy.InputField()
    tags: list[str] = dspy.InputField()
    colour: Literal["red", "green", "blue"] = dspy.OutputField()


def program():
    made = dspy.Predict(Choose)
    made.demos = [dspy.Example(question=f"q{i}", colour="red") for i in range(3)]
    return made


@given(st.sampled_from(sorted(OF_TEXT)), TEXTS, SEEDS)
def test_edits_fit_their_text_do_not_overlap_and_change_it(name, text, seed):
    edits = OF_TEXT[name](text, seed)
    assert edits == OF_TEXT[name](text, seed)
    end = 0
    for edit in edits:
        assert text[edit.start : edit.start + len(edit.old)] == edit.old
        assert edit.new != edit.old
        assert edit.start >= end
        end = edit.start + len(edit.old)
    assert (edited(text, edits) != text) == bool(edits)


@given(TEXTS, SEEDS)
def test_case_and_white_space_change_nothing_else(text, seed):
    assert edited(text, OF_TEXT["case"](text, seed)).casefold() == text.casefold()
    assert edited(text, OF_TEXT["white_space"](text, seed)).split() == text.split()


@given(TEXTS, SEEDS)
def test_typos_hit_one_in_eight_of_the_long_words_and_at_least_one(text, seed):
    n_long = len(re.findall("[a-zA-Z]{4,}", text))
    assert len(OF_TEXT["typos"](text, seed)) == math.ceil(n_long / 8)


def test_a_distractor_leaves_the_text_whole_and_stays_away_from_short_ones():
    for seed in range(20):
        said = edited(ROW.question, OF_TEXT["distractor"](ROW.question, seed))
        assert ROW.question in said
        assert len(said) > len(ROW.question) + 10
    assert OF_TEXT["distractor"]("5.1 cm", 0) == ()


@given(st.integers(0, 8), SEEDS)
def test_another_order_is_an_order_and_another_one(n, seed):
    order = swapped(range(n), shuffled(n, seed))
    assert sorted(order) == list(range(n))
    assert (order != list(range(n))) == (n > 1)


def test_seeds_give_different_changes():
    for name in ("case", "white_space", "typos", "distractor"):
        assert len({edited(ROW.question, OF_TEXT[name](ROW.question, seed)) for seed in range(9)}) > 1
    assert len({shuffled(4, seed) for seed in range(20)}) > 3


def test_changes_are_the_same_in_every_process():
    code = (
        "from copa_harness.robustness import typos, white_space, shuffled\n"
        "print(typos('a sentence of several words', 3), white_space('a b', 2), shuffled(5, 1))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1


def test_inputs_are_changed_labels_and_the_row_itself_are_not():
    changed = changed_example(ROW, steps_in_example("white_space", ROW, 0))
    assert changed.question != ROW.question
    assert changed.size.strip() == "5.1"
    assert changed.size != "5.1"
    assert (changed.answer, changed.tags) == ("twelve", ["a", "b", "c"])
    assert set(changed.inputs().keys()) == {"question", "size", "tags"}
    assert ROW.size == "5.1"


def test_options_in_a_list_change_places():
    changed = changed_example(ROW, steps_in_example("option_order", ROW, 0))
    assert changed.tags != ROW.tags
    assert sorted(changed.tags) == ROW.tags


def test_fields_change_places_and_keep_what_they_are():
    changed = changed_program(program(), steps_in_program("field_order", program(), 1)).signature
    assert sorted(changed.input_fields) == sorted(Choose.input_fields)
    assert list(changed.input_fields) != list(Choose.input_fields)
    assert list(changed.output_fields) == ["colour"]
    assert changed.instructions == Choose.instructions
    assert changed.input_fields["question"].json_schema_extra["desc"] == "what is asked"
    assert changed.input_fields["tags"].annotation == list[str]


def test_values_of_a_literal_change_places():
    changed = changed_program(program(), steps_in_program("option_order", program(), 1)).signature
    values = changed.output_fields["colour"].annotation.__args__
    assert sorted(values) == ["blue", "green", "red"]
    assert values != ("red", "green", "blue")


def test_demonstrations_and_instructions_change_and_the_program_itself_does_not():
    before = program()
    order = changed_program(before, steps_in_program("demo_order", before, 1))
    assert [demo.question for demo in order.demos] != ["q0", "q1", "q2"]
    shouted = changed_program(before, steps_in_program("instruction_case", before, 0))
    assert shouted.signature.instructions == "SAY WHICH COLOUR IT IS."
    assert [demo.question for demo in before.demos] == ["q0", "q1", "q2"]
    assert before.signature.instructions == "Say which colour it is."


@given(st.data(), st.sampled_from([name for name in NAMES if name != "paraphrase"]), SEEDS)
def test_any_part_of_a_change_can_be_made_by_itself(data, name, seed):
    steps = (*steps_in_example(name, ROW, seed), *steps_in_program(name, program(), seed))
    kept = [step for step in steps if data.draw(st.booleans())]
    changed_example(ROW, kept)
    changed_program(program(), kept)
    assert changed_example(ROW, []).toDict() == ROW.toDict()


def test_steps_tell_what_they_do():
    assert str(Step(("input", "question"), Edit(5, "pen", "PEN"))) == "input question: 'pen' -> 'PEN'"
    assert str(Step(("input", "question"), Edit(0, "", " "))) == "input question: ' ' put in at 0"
    assert str(Step(("fields", "react"), Swap(0, 2))) == "fields react: 1 and 3 exchanged"


def test_forms_are_fixed_named_apart_and_left_out_where_nothing_changes():
    forms = Forms(("typos", "typos", "demo_order", "instruction_case"), seed=3)
    assert forms.labels == ("typos", "typos 2", "demo_order", "instruction_case")
    plain = dspy.Predict("question -> answer")
    short = dspy.Example(question="5.1", answer="x").with_inputs("question")
    made = list(forms.of(plain, [ROW.with_inputs("question"), short]))
    assert [form.name for form in made] == ["typos", "typos 2", "instruction_case"]
    assert [sorted(form.rows) for form in made] == [[0], [0], [0, 1]]
    assert made[0].rows[0].question != made[1].rows[0].question
    alone = list(forms.of(plain, [ROW.with_inputs("question")]))
    assert alone[0].rows[0].question == made[0].rows[0].question  # whoever is asked beside it


def test_a_paraphrase_is_written_by_the_prompt_model_and_left_out_where_it_does_not_parse():
    lm = ScriptedLM({"four new pens": {"paraphrase": "How much are four fresh pens today?"}, "colour": "no such field"})
    forms = Forms(("paraphrase",), seed=0, prompt_lm=lm)
    other = dspy.Example(question="Which colour does it have?", answer="x").with_inputs("question")
    (form,) = forms.of(dspy.Predict("question -> answer"), [ROW.with_inputs("question"), other])
    assert form.rows[0].question == "How much are four fresh pens today?"
    assert sorted(form.rows) == [0]
    with pytest.raises(ConfigurationError, match="--copa-prompt-lm"):
        Forms(("paraphrase",), seed=0)


@pytest.mark.parametrize("names", [(), "case", ["typo"], [3], None])
def test_names_that_mean_nothing_are_refused(names):
    with pytest.raises(ConfigurationError, match="perturbations="):
        check_names(names)
