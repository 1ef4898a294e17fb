"""The table of how searches ended."""

from dataclasses import replace

from copa_harness.documents import from_json, to_json
from copa_harness.report.records import RunRecord, as_reported
from copa_harness.report.tables import all_tables, ending_table
from copa_harness.results import Budget
from tests.report.conftest import optimization

SEARCH = optimization(reason="the budget: 400 of 400 calls used", n_trials=12, charged_calls=400)
RUN = RunRecord(
    test="test_it",
    task="iris",
    strategy="joint",
    lm="embedded",
    split="test",
    score=0.9,
    n=75,
    n_failed=0,
    interval=None,
    budget=Budget(400, "light"),
    optimization=SEARCH,
)


def test_it_says_why_and_after_how_much():
    lines = ending_table([RUN]).splitlines()
    assert lines[2].rstrip().endswith("12 | 400 of 400 | the budget: 400 of 400 calls used")
    assert "of" not in ending_table(
        [replace(RUN, budget=Budget(), optimization=replace(SEARCH, reason="all steps taken"))]
    )


def test_tests_that_share_an_optimization_tell_it_once_and_nothing_is_told_without_one():
    assert ending_table([RUN, replace(RUN, test="test_other")]).count("iris | joint") == 1
    assert ending_table([replace(RUN, optimization=None)]) == ""
    assert "how the searches ended" in dict(all_tables([RUN]))


def test_the_record_keeps_it_as_json():
    assert from_json(RunRecord, to_json(RUN)).optimization == SEARCH
    assert as_reported(RUN)["search"] == {
        "reason": "the budget: 400 of 400 calls used",
        "n_trials": 12,
        "calls": 400,
    }
