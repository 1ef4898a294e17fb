"""The two-stage task: what each stage sees, what the rows say, and that the code between the stages is forgiving."""

import dspy
import pytest

from copa_harness.lm.scripted import ScriptedLM
from copa_harness.tasks import staged_wine


def contents(examples):
    return {tuple(sorted(example.inputs().items())) for example in examples}


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_have_the_promised_sizes_and_share_no_printed_row(seed):
    task = staged_wine(seed)
    assert (len(task.trainset), len(task.valset), len(task.testset)) == (50, 25, 75)
    train, val, test = map(contents, (task.trainset, task.valset, task.testset))
    assert not train & val
    assert not train & test
    assert not val & test


def test_rows_say_what_both_stages_should_answer():
    for row in staged_wine().trainset:
        assert row.type == ("light" if row.answer == "grignolino" else "full")
        assert row.body == {"light": "1.0", "full": "9.0"}[row.type]
        assert sorted(row.inputs().keys()) == ["alcohol", "color_intensity", "flavanoids", "hue"]


def test_the_second_stage_reads_the_first_ones_word_as_a_number():
    seen = []

    def answer(messages):
        seen.append(messages[-1]["content"])
        return {"type": " Light"} if len(seen) == 1 else {"answer": "grignolino"}

    task = staged_wine()
    with dspy.context(lm=ScriptedLM(answer)):
        prediction = task.program(**task.testset[0].inputs())
    assert prediction.answer == "grignolino"
    assert "[[ ## body ## ]]\n1.0" in seen[1]


def test_a_word_the_program_does_not_know_counts_as_unsure():
    seen = []

    def answer(messages):
        seen.append(messages[-1]["content"])
        return {"type": "heavy"} if len(seen) == 1 else {"answer": "barolo"}

    task = staged_wine()
    with dspy.context(lm=ScriptedLM(answer)):
        task.program(**task.testset[0].inputs())
    assert "[[ ## body ## ]]\n5.0" in seen[1]


def test_a_training_row_is_a_demonstration_for_either_stage():
    task = staged_wine()
    names = set(task.trainset[0].keys())
    for _, predictor in task.program.named_predictors():
        assert set(predictor.signature.fields) <= names
