"""Rules learned from rows, in words."""

import re
from decimal import Decimal, InvalidOperation

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from copa_harness.optimize.propose.rules import Condition, Rule, learn_rules
from copa_harness.optimize.propose.schema import MISSING


def answers(rule, columns):
    """What whoever follows the rule answers for every row of printed columns."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    found = []
    for row in rows:
        met = (label for conditions, label in rule.clauses if all(holds(one, row) for one in conditions))
        found.append(next(met, rule.otherwise))
    return found


def holds(condition, row):
    text = row[condition.column].strip()
    if condition.word in ("below", "at least"):
        if text.casefold() in MISSING:
            return condition.or_missing
        try:
            return (Decimal(text) < Decimal(condition.value)) == (condition.word == "below")
        except InvalidOperation:
            return False
    if condition.word in ("missing", "given"):
        return (text.casefold() in MISSING) == (condition.word == "missing")
    if "mention" in condition.word:
        return (condition.value in re.findall(r"\w+", text.casefold())) == (condition.word == "mentions")
    return (row[condition.column] == condition.value) != (condition.word == "not")


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
        (
            ((Condition("petal_length", "below", "2.5"),), "setosa"),
            ((Condition("petal_width", "below", "1.7"),), "versicolor"),
        ),
        "virginica",
        1.0,
    )
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


def agreement(rule, columns, labels):
    return float(np.mean([a == b for a, b in zip(answers(rule, columns), labels, strict=True)]))


def test_a_rule_followed_on_the_printed_rows_is_as_right_as_it_says():
    generator = np.random.default_rng(3)
    columns = {
        "size": [f"{v:.1f}" if v > 1 else "?" for v in generator.uniform(0, 9, 80)],
        "sky": generator.choice(["sunny", "rain", "snow"], 80).tolist(),
        "note": [" ".join(generator.choice(["tall", "short", "green", "round", "late"], 3)) for _ in range(80)],
    }
    labels = [
        "a" if size == "?" or float(size) > 6 else "b" if sky == "rain" else "c" if "green" in note else "d"
        for size, sky, note in zip(*columns.values(), strict=True)
    ]
    rules = learn_rules(columns, labels)
    assert rules
    for rule in rules:
        assert agreement(rule, columns, labels) == rule.accuracy
    assert rules[0].accuracy > 0.7


def test_many_classes_have_a_rule_each():
    values = [f"{v:.1f}" for v in np.linspace(0.1, 9.9, 100)]
    labels = ["abcde"[min(4, int(float(v) // 2))] for v in values]
    rule = max(learn_rules({"size": values}, labels, max_depth=4), key=lambda one: one.accuracy)
    assert rule.accuracy == 1.0
    assert {label for _, label in rule.clauses} | {rule.otherwise} == set("abcde")


def test_longer_texts_become_conditions_on_what_they_mention():
    texts = [f"customer {i} wants a {'refund' if i % 2 else 'new plan'} for order {i * 7}" for i in range(40)]
    labels = ["billing" if i % 2 else "sales" for i in range(40)]
    rule = learn_rules({"message": texts}, labels)[0]
    assert rule.accuracy == 1.0
    assert "message mentions" in rule.text or "message does not mention" in rule.text
    assert answers(rule, {"message": ["I want my refund now"]}) == ["billing"]


def test_rows_without_a_number_take_part():
    values = [f"{v:.1f}" for v in np.linspace(1, 9, 30)] + ["n/a", "", "None"] * 5
    labels = ["small"] * 15 + ["large"] * 15 + ["large"] * 15
    rule = learn_rules({"size": values}, labels)[0]
    assert rule.accuracy == 1.0
    assert answers(rule, {"size": ["nan", "2.0"]}) == ["large", "small"]


def test_whether_a_number_is_given_can_be_all_that_matters():
    values = ["1.0", "2.5", "4.0"] * 8 + ["?"] * 24
    rule = learn_rules({"dose": values}, ["treated"] * 24 + ["control"] * 24)[0]
    assert rule.accuracy == 1.0
    assert "dose is missing" in rule.text or "dose is given" in rule.text


def test_stressed_rows_decide_which_rule_is_learned():
    columns = {"a": [str(i % 2) for i in range(40)], "b": [str(i // 2 % 2) for i in range(40)]}
    labels = ["yes" if columns["a" if i < 28 else "b"][i] == "1" else "no" for i in range(40)]
    plain = learn_rules(columns, labels, max_depth=1)[0]
    stressed = learn_rules(columns, labels, max_depth=1, weights=[1.0] * 28 + [9.0] * 12)[0]
    assert plain.clauses[0][0][0].column == "a"
    assert stressed.clauses[0][0][0].column == "b"
