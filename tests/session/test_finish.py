"""The end of a session, from rows alone: what fails the suite when no test did, and what is only said."""

import pytest

from copa_harness.report.records import RunRecord
from copa_harness.results import GateResult, Interval, Verdict
from copa_harness.session.entries import Entry, to_row
from copa_harness.session.evaluation import FailedCalls
from copa_harness.session.finish import BUDGET_EXHAUSTED, FAILED, Tests, finish
from copa_harness.session.options import Settings


def row(test, *gates, cut_short=False, **more):
    record = RunRecord(
        test=test,
        task="t",
        strategy="p",
        lm="m",
        split="test",
        score=0.5,
        n=9,
        n_failed=0,
        interval=Interval(0.2, 0.8),
        gates=gates,
        verdict=Verdict.UNDECIDED,
        cut_short=cut_short,
    )
    return to_row(Entry(test=test, order=0, record=record, **more))


def drop(p_value, verdict=Verdict.UNDECIDED):
    return GateResult("max_regression=0.05", verdict, "m", {"p_worse": p_value, "p_any_drop": p_value})


@pytest.fixture
def settings(tmp_path):
    return Settings(root=tmp_path, cache_dir=tmp_path / "cache", report_dir=tmp_path / "reports")


def test_what_holm_finds_beyond_the_single_gates_fails_the_session(settings):
    # Held to .05 / 3 each, the last two are undecided; over the suite all three are found.
    rows = [row("a", drop(0.001, Verdict.FAIL)), row("b", drop(0.02)), row("c", drop(0.03))]
    report = finish(rows, settings=settings)
    assert report.exit_status == FAILED
    assert "3 regression gates, Holm-corrected" in report.remarks[0]
    assert "fails over the suite" in report.remarks[0]


def test_gates_that_stay_undecided_over_the_suite_fail_nothing(settings):
    report = finish([row("a", drop(0.04)), row("b", drop(0.4))], settings=settings)
    assert report.exit_status == 0
    assert report.asides[0].startswith("2 regression gates")


def test_a_failure_over_the_suite_outranks_a_budget_that_ended(settings):
    short = row("d", cut_short=True)
    assert finish([short], settings=settings).exit_status == BUDGET_EXHAUSTED
    rows = [row("a", drop(0.001)), row("b", drop(0.002)), short]
    assert finish(rows, settings=settings).exit_status == FAILED


def test_failed_attempts_of_all_processes_are_summed_by_kind(settings):
    many = {"timeout": FailedCalls(2, "first")}
    few = {"timeout": FailedCalls(1, "later"), "refusal": FailedCalls(1, "")}
    rows = [row("a", failures=many), row("b", failures=few)]
    (note,) = finish(rows, settings=settings).notes
    assert "refusal 1, timeout 3" in note


def test_tests_that_were_refused_outside_any_evaluation_count_as_cut_short(settings):
    assert finish([row("a")], settings=settings, tests=Tests(n_refused=2)).exit_status == BUDGET_EXHAUSTED
