"""A malformed task is refused when it is made, with the split, the position and the remedy."""

import dspy
import pytest

from copa_harness.errors import TaskError
from copa_harness.tasks import Task


def examples(*questions):
    return [dspy.Example(question=q, answer=q.upper()).with_inputs("question") for q in questions]


def metric(example, prediction, trace=None):
    return 1.0


def make(**changes):
    parts = {
        "name": "toy",
        "program": dspy.Predict("question -> answer"),
        "metric": metric,
        "trainset": examples("a"),
        "valset": examples("b"),
        "testset": examples("c"),
    }
    return Task(**{**parts, **changes})


class TwoStep(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first = dspy.Predict("question -> thought")
        self.second = dspy.Predict("thought -> answer")

    def forward(self, question):
        return self.second(thought=self.first(question=question).thought)


def test_a_well_formed_task_keeps_its_splits_as_tuples():
    task = make()
    assert isinstance(task.trainset, tuple)
    assert task.testset[0].answer == "C"


def test_a_program_of_several_predictors_is_accepted():
    assert make(program=TwoStep()).name == "toy"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": " "}, "task name"),
        ({"trainset": []}, "trainset is empty"),
        ({"valset": []}, "valset is empty"),
        ({"testset": None}, "testset is NoneType"),
        ({"trainset": ["a"]}, r"trainset\[0\] is a str"),
        ({"trainset": [dspy.Example(question="z", answer="Z")]}, "with_inputs"),
        ({"trainset": [dspy.Example(query="z").with_inputs("query")]}, "lacks the input field 'question'"),
        ({"testset": examples("c", "a")}, r"testset\[1\] has the same inputs as trainset\[0\]"),
        ({"metric": None}, "metric is a NoneType"),
        ({"metric": lambda example: 1.0}, "cannot be called with"),
        ({"program": dspy.Module()}, "no predictor"),
        ({"program": dspy.Predict}, "program is Predict"),
        ({"program": object()}, "instance of dspy.Module"),
        ({"finetune_data": [{"messages": [{"role": "user", "content": "a"}]}]}, "role 'assistant'"),
        ({"finetune_data": []}, "finetune_data is empty"),
    ],
)
def test_a_malformed_task_is_refused_with_a_remedy(changes, message):
    with pytest.raises(TaskError, match=message):
        make(**changes)


def test_a_missing_field_is_found_for_a_program_of_several_predictors():
    with pytest.raises(TaskError, match="lacks the input field 'question'"):
        make(program=TwoStep(), valset=[dspy.Example(query="z").with_inputs("query")])
