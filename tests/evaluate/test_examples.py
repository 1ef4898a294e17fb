"""Stable ids for examples."""

import subprocess
import sys

import dspy
import numpy as np

from copa_harness.evaluate.examples import example_id, example_ids, label_values


def make(**fields):
    return dspy.Example(**fields).with_inputs("question")


def test_equal_content_has_equal_ids_whatever_the_order_of_fields():
    assert example_id(make(question="a", answer="b")) == example_id(make(answer="b", question="a"))


def test_different_labels_have_different_ids():
    assert example_id(make(question="a", answer="b")) != example_id(make(question="a", answer="c"))


def test_repeats_of_an_example_are_told_apart():
    ids = example_ids([make(question="a"), make(question="b"), make(question="a")])
    assert ids[2] == ids[0] + "-2"
    assert len(set(ids)) == 3


def test_numpy_values_sets_and_objects_without_json_have_stable_ids():
    class Thing:
        pass

    first = make(question=np.float64(1.5), tags={"b", "a"}, thing=Thing())
    second = make(question=1.5, tags={"a", "b"}, thing=Thing())
    assert example_id(first) == example_id(second)


def test_an_id_is_the_same_in_another_process():
    code = (
        "import dspy; from copa_harness.evaluate.examples import example_id;"
        "print(example_id(dspy.Example(question='a', tags={'x', 'y', 'z'}).with_inputs('question')))"
    )
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == example_id(make(question="a", tags={"z", "y", "x"}))


def test_labels_are_the_fields_that_are_no_inputs():
    assert label_values(make(question="a", answer="b", score=1)) == {"answer": "b", "score": 1}
