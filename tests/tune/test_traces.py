"""Rows from traces: one bad example costs one example."""

from __future__ import annotations

import dspy
import pytest

from copa_harness.errors import BudgetExhausted, MetricError, ProviderError
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.results import Budget
from copa_harness.tune import RowDemos, rows_from_traces


def metric(example, prediction, trace=None):
    return prediction.colour == example.colour


def by_number(messages):
    """Right for sizes below 4, wrong for 4, unreadable for 5, no answer for 6, right above."""
    text = messages[-1]["content"]
    if "4.5" in text:
        return {"colour": "red"}
    if "5.5" in text:
        return "mumble"
    if "6.5" in text:
        raise ProviderError("the server is on fire")
    return {"colour": next(colour for colour in ("red", "green", "blue") if f"n{colour}" in text)}


@pytest.fixture
def scripted():
    return ScriptedLM(by_number)


def test_passing_traces_become_rows_and_the_others_are_counted_apart(program, examples, scripted):
    with dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        result = rows_from_traces(
            program, examples, metric=metric, demos=RowDemos("none", seed=0), lm=scripted, threads=4
        )
    assert (result.n_passed, result.n_wrong, result.n_unparsed, result.n_failed) == (6, 1, 1, 1)
    assert len(result.rows["self"]) == 6
    assert "on fire" in result.errors[0]
    assert "nred 0" in result.rows["self"][0].prompt[-1]["content"]


def test_traces_give_reasoning_that_labels_lack():
    program = dspy.ChainOfThought("question -> answer")
    examples = [dspy.Example(question=f"q{i}", answer="a").with_inputs("question") for i in range(3)]
    lm = ScriptedLM(lambda messages: {"reasoning": "since so", "answer": "a"})
    result = rows_from_traces(
        program,
        examples,
        metric=lambda e, p, trace: p.answer == e.answer,
        demos=RowDemos("resample", seed=0, n_demos=2),
        lm=lm,
    )
    row = result.rows["predict"][0]
    assert "since so" in row.answer
    assert "since so" in row.prompt[2]["content"]  # demonstrations from traces have it too


def test_a_broken_metric_is_reported_as_such(program, examples, scripted):
    with pytest.raises(MetricError, match="no_such_field"):
        rows_from_traces(
            program, examples[:1], metric=lambda e, p, t: e.no_such_field, demos=RowDemos("none", seed=0), lm=scripted
        )


def test_a_spent_budget_ends_it(program, examples, scripted):
    with open_scope("small", budget=Budget(calls=2)), pytest.raises(BudgetExhausted):
        rows_from_traces(program, examples[:4], metric=metric, demos=RowDemos("none", seed=0), lm=scripted, threads=1)


def test_predictors_without_rows_are_listed_empty(program, examples):
    wrong = ScriptedLM(lambda messages: {"colour": "blue"})
    result = rows_from_traces(program, examples[:1], metric=metric, demos=RowDemos("none", seed=0), lm=wrong)
    assert result.rows == {"self": ()}
