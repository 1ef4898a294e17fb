"""The end of a session, from rows alone: what fails the suite when no test did, and what is only said."""

import pytest

from copa_harness.report.records import RunRecord
from copa_harness.results import Interval, Verdict
from copa_harness.session.entries import Entry, to_row
from copa_harness.session.evaluation import FailedCalls
from copa_harness.session.finish import BUDGET_EXHAUSTED, Tests, finish
from copa_harness.session.options import Settings


def row(test, *gates, cut_short=False, verdict=Verdict.UNDECIDED, **more):
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
        verdict=verdict,
        cut_short=cut_short,
    )
    return to_row(Entry(test=test, order=0, record=record, **more))


@pytest.fixture
def settings(tmp_path):
    return Settings(root=tmp_path, cache_dir=tmp_path / "cache", report_dir=tmp_path / "reports")


def test_runs_without_a_verdict_are_counted(settings):
    rows = [row(each.value, verdict=each) for each in (Verdict.UNDECIDED, Verdict.NOT_COMPARABLE, Verdict.PASS)]
    report = finish(rows, settings=settings)
    assert report.exit_status == 0
    assert report.open_runs == {"undecided": 1, "not comparable": 1}


def test_an_exit_status_comes_with_its_reason(settings):
    report = finish([row("d", cut_short=True)], settings=settings)
    assert report.exit_status == BUDGET_EXHAUSTED
    assert report.reasons[0].startswith("budget exhausted")
    assert finish([row("a")], settings=settings).reasons == ()


def test_failed_attempts_of_all_processes_are_summed_by_kind(settings):
    many = {"timeout": FailedCalls(2, "first")}
    few = {"timeout": FailedCalls(1, "later"), "refusal": FailedCalls(1, "")}
    rows = [row("a", failures=many), row("b", failures=few)]
    (note,) = finish(rows, settings=settings).notes
    assert "refusal 1, timeout 3" in note


def test_tests_that_were_refused_outside_any_evaluation_count_as_cut_short(settings):
    assert finish([row("a")], settings=settings, tests=Tests(n_refused=2)).exit_status == BUDGET_EXHAUSTED
