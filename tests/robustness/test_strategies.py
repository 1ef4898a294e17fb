"""Hypothesis draws and shrinks perturbations: only of what there is, and down to what matters."""

import dspy
import pytest
from hypothesis import find, given, settings

from copa_harness.errors import ConfigurationError
from copa_harness.robustness import changed_examples, changed_programs, smallest
from copa_harness.robustness.perturbations import Edit, Step, changed_example, steps_in_example

ROW = dspy.Example(question="what do four new pens cost in town", answer="x").with_inputs("question")
PROGRAM = dspy.Predict("a, b, c -> d")


@given(changed_examples(ROW, "case", "white_space"))
@settings(max_examples=30)
def test_examples_stay_what_they_are_but_for_what_is_perturbed(changed):
    assert changed.question.casefold().split() == ROW.question.split()
    assert changed.answer == "x"


@given(changed_programs(PROGRAM, "field_order"))
@settings(max_examples=30)
def test_programs_stay_what_they_are_but_for_what_is_perturbed(changed):
    assert sorted(changed.signature.input_fields) == ["a", "b", "c"]
    assert list(PROGRAM.signature.input_fields) == ["a", "b", "c"]


def test_hypothesis_shrinks_to_the_one_word_that_matters():
    found = find(changed_examples(ROW, "case"), lambda one: "PENS" in one.question, settings=settings(database=None))
    assert found.question == "what do four new PENS cost in town"


def test_unknown_names_are_refused():
    with pytest.raises(ConfigurationError, match="typos"):
        changed_examples(ROW, "typo")


def steps_of_case():
    return steps_in_example("case", ROW, 0)


def test_a_change_is_shrunk_to_the_steps_that_matter_and_each_part_is_asked_once():
    asked = []

    def is_broken(part):
        asked.append(part)
        words = changed_example(ROW, part).question
        return "PENS" in words and "TOWN" in words

    found = smallest(steps_of_case(), is_broken, seed=0)
    assert changed_example(ROW, found).question == "what do four new PENS cost in TOWN"
    assert len(asked) == len(set(asked))
    assert () not in asked
    assert steps_of_case() not in asked
    again = list(asked)
    asked.clear()
    assert smallest(steps_of_case(), is_broken, seed=0) == found
    assert asked == again


def test_shrinking_keeps_to_its_tries_and_to_a_change_that_is_known_to_fail():
    asked = []

    def never(part):
        asked.append(part)
        return False

    assert smallest(steps_of_case(), never, seed=0, max_tries=5) == steps_of_case()
    assert len(asked) <= 5
    one = (Step(("input", "question"), Edit(0, "what", "WHAT")),)
    assert smallest(one, never, seed=0) == one


def test_nothing_is_written_to_the_folder_it_runs_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smallest(steps_of_case(), lambda part: len(part) > 2, seed=0)
    assert not list(tmp_path.iterdir())
