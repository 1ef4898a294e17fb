"""Rules learned from rows, in words."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from copa_harness.optimize.rules import Condition, Rule, learn_rules


def follow(rule, row):
    """What a careful reader of the rule answers."""

    def holds(condition):
        value = row[condition.column]
        if condition.word == "below":
            return float(value) < float(condition.value)
        if condition.word == "at least":
            return float(value) >= float(condition.value)
        return (value != condition.value) if condition.word == "not" else (value == condition.value)

    for conditions, label in rule.clauses:
        if all(holds(condition) for condition in conditions):
            return label
    return rule.otherwise


def test_the_words_are_a_chain_of_if_and_otherwise():
    rule = Rule(
        (((Condition("petal_length", "below", "2.5"),), "setosa"),
         ((Condition("petal_width", "below", "1.7"),), "versicolor")),
        "virginica",
        1.0,
    )  # fmt: skip
    assert rule.text == (
        "If petal_length is below 2.5 answer setosa, otherwise if petal_width is below 1.7 answer versicolor, "
        "otherwise answer virginica."
    )


def test_three_classes_in_a_row_give_two_clauses():
    values = [f"{v:.1f}" for v in np.linspace(0.1, 9.0, 60)]
    labels = ["low" if float(v) < 3 else "middle" if float(v) < 6 else "high" for v in values]
    rule = learn_rules({"size": values}, labels)[0]
    assert len(rule.clauses) == 2
    assert rule.accuracy == 1.0
    assert "is " in rule.text
    assert rule.text.startswith("If size is ")


def test_a_threshold_has_the_precision_of_the_printed_values():
    rule = learn_rules({"size": ["1", "2", "8", "9"] * 5}, ["a", "a", "b", "b"] * 5)[0]
    (condition,), _ = rule.clauses[0]
    assert condition.value == "5"


def test_text_columns_become_conditions_on_words():
    rule = learn_rules({"sky": ["sunny", "rain", "snow"] * 6}, ["go", "stay", "stay"] * 6)[0]
    assert rule.accuracy == 1.0
    assert "sunny" in rule.text


def test_rows_that_say_nothing_give_no_rule():
    assert learn_rules({"size": ["1"] * 8}, ["a", "b"] * 4) == ()
    assert learn_rules({"size": ["1", "2"] * 4}, ["a"] * 8) == ()
    assert learn_rules({}, ["a", "b"] * 4) == ()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 30), st.sampled_from(["red", "blue"]), st.sampled_from("abc")),
        min_size=12,
        max_size=40,
    )
)
def test_following_the_words_gives_the_accuracy_the_rule_claims(rows):
    columns = {
        "x": [f"{r[0] / 10:.1f}" for r in rows],
        "y": [str(r[1]) for r in rows],
        "colour": [r[2] for r in rows],
    }
    labels = [r[3] for r in rows]
    for rule in learn_rules(columns, labels):
        answers = [follow(rule, {name: values[i] for name, values in columns.items()}) for i in range(len(rows))]
        assert np.mean([a == b for a, b in zip(answers, labels, strict=True)]) == rule.accuracy
