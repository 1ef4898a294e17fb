"""Runs that would look alike are told apart, and those that are alike are not."""

from dataclasses import replace

import pytest

from copa_harness.report.grouping import disambiguated, kind_of
from copa_harness.report.records import RunRecord
from copa_harness.report.tables import all_tables, compare_table, copa_table
from copa_harness.results import Budget, Interval, Usage
from tests.report.conftest import optimization

BIG = RunRecord(
    test="suite.py::test_big",
    task="iris",
    strategy="p",
    lm="embedded",
    split="test",
    score=0.9,
    n=10,
    n_failed=0,
    interval=Interval(0.6, 1.0),
    usage=Usage(300),
    budget=Budget(400, "light"),
    optimization=optimization(
        reason="every combination was tried", n_trials=12, charged_calls=300, score_after=0.9, strategy="p"
    ),
    seed=0,
    scores={str(i): float(i > 0) for i in range(10)},
)
SMALL = replace(
    BIG,
    test="suite.py::test_small",
    budget=Budget(100, "calls=100"),
    score=0.8,
    scores={str(i): float(i > 1) for i in range(10)},
    optimization=replace(BIG.optimization, charged_calls=99, score_after=0.7),
)
BASE = replace(BIG, strategy="none", score=0.5, scores={str(i): float(i > 4) for i in range(10)}, optimization=None)


def labels(*runs):
    return [run.strategy for run in disambiguated(runs)]


def test_runs_of_one_strategy_with_other_settings_are_named_after_their_tests():
    assert labels(BASE, BIG, SMALL) == ["none", "p (test_big)", "p (test_small)"]
    assert kind_of("p -> w (test_big[a -> b])") == kind_of("p -> w")
    assert labels(*disambiguated([BIG, SMALL])) == ["p (test_big)", "p (test_small)"]


def test_the_same_budget_with_other_results_is_disambiguated_too():
    other = replace(SMALL, budget=BIG.budget)
    forbids = replace(BIG.optimization, notes=("forbids 'sepal'",))
    assert labels(BIG, other) == ["p (test_big)", "p (test_small)"]
    assert labels(BIG, replace(BIG, test="b", optimization=forbids))[1] == "p (b)"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"test": "other.py::test_big"}, "p (other.py::test_big)"),
        ({"test": BIG.test}, "p (test_big, 100 calls)"),
        ({"test": BIG.test, "budget": BIG.budget}, "p (test_big, no. 2)"),
    ],
)
def test_where_the_name_is_the_same_something_else_tells_them_apart(changes, expected):
    assert labels(BIG, replace(SMALL, **changes))[1] == expected


def test_tests_that_share_an_optimization_keep_its_name():
    assert labels(BIG, replace(BIG, test="suite.py::test_other", usage=Usage(0, 300))) == ["p", "p"]
    assert labels(BASE, replace(BASE, test="b", budget=Budget(5))) == ["none", "none"]
    assert labels(BIG, replace(SMALL, task="wine"), replace(SMALL, split="val")) == ["p", "p", "p"]


def test_both_stand_in_every_table_and_in_the_comparison():
    tables = dict(all_tables([BASE, BIG, SMALL]))
    for title in ("strategies compared", "how the searches ended", "what it cost"):
        assert "p (test_big)" in tables[title]
        assert "p (test_small)" in tables[title]
    assert "0.900" in compare_table([BIG, SMALL])
    assert "0.800" in compare_table([BIG, SMALL])
    assert tables["weights, prompts, and both"] == copa_table([BASE, BIG, SMALL])
    assert "the best validation score stands for it" in tables["strategies ranked"].replace("\n", " ")


def test_alike_runs_of_one_strategy_are_no_comparison():
    assert "strategies compared" not in dict(all_tables([BASE, BIG, replace(BIG, test="c")]))
