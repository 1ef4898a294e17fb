"""The table of how searches ended."""

from dataclasses import replace

from copa_harness.report.records import RunRecord
from copa_harness.report.tables import all_tables, ending_table
from copa_harness.results import Budget

SEARCH = {"reason": "the budget: 400 of 400 calls used", "n_trials": 12, "calls": 400}
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
    search=SEARCH,
)


def test_it_says_why_and_after_how_much():
    lines = ending_table([RUN]).splitlines()
    assert lines[2].rstrip().endswith("12 | 400 of 400 | the budget: 400 of 400 calls used")
    assert "of" not in ending_table([replace(RUN, budget=Budget(), search={**SEARCH, "reason": "all steps taken"})])


def test_tests_that_share_an_optimization_tell_it_once_and_nothing_is_told_without_one():
    assert ending_table([RUN, replace(RUN, test="test_other")]).count("iris | joint") == 1
    assert ending_table([replace(RUN, search={})]) == ""
    assert "how the searches ended" in dict(all_tables([RUN]))


def test_the_record_keeps_it_as_json():
    assert RunRecord.from_json(RUN.to_json()).search == SEARCH
