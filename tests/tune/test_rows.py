"""Training rows: the prompts of inference token for token, demonstrations as they will be served."""

from __future__ import annotations

from typing import Any

import dspy
import pytest

from copa_harness.errors import ConfigurationError, TrainingError
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.tune import RowDemos, TrainingRow, render_rows
from copa_harness.tune.rows import encode_row


class TwoSteps(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict("text -> topic")
        self.second = dspy.ChainOfThought("text, topic -> score: float")

    def forward(self, text: str) -> Any:
        return self.second(text=text, topic=self.first(text=text).topic)


def inference_prompts(program, example, answers):
    """The messages a program really sends for an example."""
    lm = ScriptedLM(answers)
    with dspy.context(lm=lm):
        program(**example.inputs())
    return [list(request.messages) for request in lm.requests]


def tokens_of(engine, messages):
    return engine.chat.prompt(messages).ids


@pytest.mark.parametrize("demos", ["none", "program"])
def test_training_prompts_equal_inference_prompts_token_by_token(demos, engine, program, examples):
    if demos == "program":
        program.demos = examples[:2]
    rows = render_rows(program, examples[2:], demos=RowDemos(demos, seed=0))["self"]
    for row, example in zip(rows, examples[2:], strict=True):
        (served,) = inference_prompts(program, example, [{"colour": example.colour}])
        encoded = encode_row(engine.chat, row, eos_ids=engine.eos_ids)
        assert encoded.ids[: encoded.n_prompt] == tokens_of(engine, served)


def test_training_prompts_equal_inference_prompts_with_several_predictors_and_reasoning(engine):
    program = TwoSteps()
    example = dspy.Example(text="a b", topic="t", reasoning="because", score=0.5).with_inputs("text")
    program.first.demos = [dspy.Example(text="c d", topic="u")]
    program.second.predict.demos = [dspy.Example(text="c d", topic="u", score=0.25)]  # incomplete: no reasoning
    rows = render_rows(program, [example], demos=RowDemos("program", seed=0))
    served = inference_prompts(program, example, [{"topic": "t"}, {"reasoning": "because", "score": 0.5}])
    assert list(rows) == ["first", "second.predict"]
    for (row,), messages in zip(rows.values(), served, strict=True):
        encoded = encode_row(engine.chat, row, eos_ids=engine.eos_ids)
        assert encoded.ids[: encoded.n_prompt] == tokens_of(engine, messages)


def test_the_trained_answer_is_what_the_prompt_adapter_parses_and_ends_with_the_end_token(engine, program, examples):
    row = render_rows(program, examples[:1], demos=RowDemos("none", seed=0))["self"][0]
    encoded = encode_row(engine.chat, row, eos_ids=engine.eos_ids)
    *answer, end = encoded.ids[encoded.n_prompt :]
    assert end in engine.eos_ids
    assert dspy.ChatAdapter().parse(program.signature, engine.chat.decode(answer)) == {"colour": "red"}


def test_the_configured_prompt_adapter_shapes_the_rows(program, examples):
    with dspy.context(adapter=dspy.JSONAdapter()):
        configured = render_rows(program, examples[:1], demos=RowDemos("none", seed=0))["self"][0]
    given = render_rows(program, examples[:1], demos=RowDemos("none", seed=0), adapter=dspy.JSONAdapter())["self"][0]
    assert configured == given
    assert '"colour"' in given.answer


def test_gold_rows_for_a_field_without_label_are_a_clear_error():
    program = dspy.ChainOfThought("question -> answer")
    example = dspy.Example(question="q", answer="a").with_inputs("question")
    with pytest.raises(TrainingError, match=r"lacks reasoning.*'predict'.*rows_from_traces"):
        render_rows(program, [example], demos=RowDemos("none", seed=0))


def shown_notes(row):
    """The notes in the demonstrations of a row, in order."""
    users = [message["content"] for message in row.prompt if message["role"] == "user"][:-1]
    return [text.split("[[ ## note ## ]]\n")[1].split("\n")[0] for text in users]


def test_resampled_demonstrations_are_k_others_and_differ_between_variants(program, examples):
    rows = render_rows(program, examples, demos=RowDemos("resample", seed=0, n_demos=4, n_variants=3))["self"]
    assert [row.variant for row in rows] == [0] * 9 + [1] * 9 + [2] * 9
    for row, example in zip(rows, examples * 3, strict=True):
        notes = shown_notes(row)
        assert len(set(notes)) == 4
        assert example.note not in notes
    assert len({tuple(shown_notes(row)) for row in rows}) > 20


def test_an_example_with_the_same_inputs_is_not_among_the_demonstrations(program, examples):
    twin = dspy.Example(size=0.5, note=examples[0].note, colour="blue").with_inputs("size", "note")
    rows = render_rows(program, [*examples, twin], demos=RowDemos("resample", seed=0, n_demos=8, n_variants=4))["self"]
    assert all(examples[0].note not in shown_notes(rows[10 * variant + i]) for variant in range(4) for i in (0, 9))


def test_a_row_is_left_out_of_the_programs_own_demonstrations(program, examples):
    program.demos = examples[:3]
    rows = render_rows(program, examples[:4], demos=RowDemos("program", seed=0))["self"]
    assert [len(shown_notes(row)) for row in rows] == [2, 2, 2, 3]


def test_rows_depend_on_the_seed_and_nothing_else(program, examples):
    first, again, other = (
        render_rows(program, examples, demos=RowDemos("resample", seed=seed, n_demos=3, n_variants=2))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_too_few_examples_to_draw_from_and_no_examples_are_errors(program, examples):
    with pytest.raises(TrainingError, match="only 2 other examples"):
        render_rows(program, examples[:3], demos=RowDemos("resample", seed=0, n_demos=3))
    with pytest.raises(TrainingError, match="no examples"):
        render_rows(program, [], demos=RowDemos("none", seed=0))


@pytest.mark.parametrize(
    "options",
    [{"mode": "all"}, {"mode": "resample"}, {"mode": "none", "n_demos": 3}, {"mode": "program", "n_variants": 2}],
)
def test_arguments_that_do_not_fit_together_are_refused(options):
    with pytest.raises(ConfigurationError, match=r"expected|only with"):
        RowDemos(seed=0, **options)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "x"},
        {"messages": "x"},
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "x"}]},
    ],
)
def test_a_row_that_is_no_conversation_with_an_answer_is_refused(row):
    with pytest.raises(TrainingError, match="expected"):
        TrainingRow.from_chat(row)


def test_the_description_of_demonstrations_names_their_number():
    given = (RowDemos("none", seed=0), RowDemos("resample", seed=0, n_demos=9))
    assert [demos.served_with for demos in given] == ["none", "resample:9"]
