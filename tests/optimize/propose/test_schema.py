"""What the data look like."""

from typing import Literal

import dspy
import numpy as np
import pytest

from copa_harness.errors import TaskError
from copa_harness.optimize.propose.schema import (
    categories_of,
    columns_of,
    labelled_field,
    split_off_validation,
    strata_of,
    stratified_order,
)


def make(i, kind):
    return dspy.Example(x=str(i), kind=kind).with_inputs("x")


def test_repeated_values_are_categories_and_free_text_is_not():
    assert categories_of(["b", "a"] * 3) == ("a", "b")
    assert categories_of([f"text {i}" for i in range(6)]) == ()


def test_a_literal_says_its_categories_itself():
    assert categories_of(["x"], annotation=Literal["no", "yes"]) == ("no", "yes")


def test_the_labelled_field_is_the_last_output_the_examples_hold():
    rows = [make(i, "ab"[i % 2]) for i in range(6)]
    field = labelled_field("self", dspy.Signature("x -> reasoning, kind"), rows)
    assert (field.name, field.categories) == ("kind", ("a", "b"))
    assert labelled_field("self", dspy.Signature("y -> kind"), rows) is None
    assert labelled_field("self", dspy.Signature("x -> reasoning"), rows) is None


def test_every_prefix_of_a_stratified_order_has_about_the_whole_mix():
    strata = ["a"] * 20 + ["b"] * 10
    order = stratified_order(strata, np.random.default_rng(0))
    assert sorted(order) == list(range(30))
    for n in (6, 12, 18, 24):
        assert abs(sum(strata[i] == "b" for i in order[:n]) - n / 3) <= 1.5


def test_the_split_is_stratified_seeded_and_without_overlap():
    rows = [make(i, "ab"[i % 2]) for i in range(30)]
    train, val = split_off_validation(rows, share=1 / 3, seed=3)
    assert (len(train), len(val)) == (20, 10)
    assert sorted([*train, *val], key=lambda e: int(e.x)) == rows
    assert abs(sum(e.kind == "a" for e in val) - 5) <= 1
    assert split_off_validation(rows, share=1 / 3, seed=3) == (train, val)
    assert split_off_validation(rows, share=1 / 3, seed=4) != (train, val)


def test_too_few_examples_to_split_are_refused():
    with pytest.raises(TaskError, match="at least 4"):
        split_off_validation([make(1, "a"), make(2, "b"), make(3, "a")], share=1 / 3, seed=0)


def test_pairs_in_one_field_become_columns():
    rows = [dspy.Example(features=f"size={i}, colour=red").with_inputs("features") for i in range(3)]
    assert columns_of(rows, ["features"]) == {"size": ["0", "1", "2"], "colour": ["red"] * 3}


def test_other_fields_are_columns_as_they_are():
    rows = [dspy.Example(a=str(i), b="some text, with a comma").with_inputs("a", "b") for i in range(2)]
    assert columns_of(rows, ["a", "b"]) == {"a": ["0", "1"], "b": ["some text, with a comma"] * 2}


def test_strata_are_the_categorical_labels():
    assert strata_of([make(i, "ab"[i % 2]) for i in range(6)]) == ("a", "b") * 3
    assert strata_of([make(i, f"free text {i}") for i in range(6)]) == ("",) * 6
