"""A full disk, and calls that fail, through the plugin: what stands, what is said, and what the next run does."""

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys

# pytester forgets what an inner run imported; these are imported once, here, for all of them.
import pytest

import copa_harness.lm.cache.store
import copa_harness.lm.factory
import copa_harness.optimize.copa
import copa_harness.report.files
import copa_harness.session.session
import copa_harness.store.artifacts
import copa_harness.store.stages  # noqa: F401
from tests.plugin.shouting import SHOUTING

FLAGS = ("-W", "default", "--strict-markers", "--strict-config", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")

CONFTEST = f"""{SHOUTING}
from copa_harness.errors import ServerFailureError

BROKEN = ()


def answer(messages):
    word = asked(messages)
    pay(messages)
    if word in BROKEN:
        raise ServerFailureError("boom")
    return {{"answer": word.upper() if len(messages) > 2 else word}}
"""

SUITE = """
import pytest

@pytest.mark.copa(strategy="p", budget="calls=40", min_score=0.5)
def test_prompts(copa_run):
    copa_run.check()
"""


@pytest.fixture
def folder(pytester):
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_suite=SUITE)
    return pytester


def full(*arguments, **settings):
    raise OSError(errno.ENOSPC, "No space left on device")


def n_paid(folder):
    return len((folder.path / "paid.txt").read_text().splitlines())


def test_a_full_disk_at_the_end_of_a_search_costs_the_search_not_its_result(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("copa_harness.store.stages.write_atomic", full)
        result = folder.runpytest_inprocess(*FLAGS)
    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines(
        ["*the finished optimization of shout could not be kept in *stages (No space left on device)*--copa-cache-dir*"]
    )
    before = n_paid(folder)
    folder.runpytest_inprocess(*FLAGS, "-W", "error").assert_outcomes(passed=1)
    assert n_paid(folder) == before


@pytest.mark.parametrize("place", ["copa_harness.store.artifacts.pretty_json", "optuna.create_study"])
def test_a_full_disk_in_the_middle_of_a_search_is_one_clear_error_and_nothing_paid_is_lost(folder, monkeypatch, place):
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        result = folder.runpytest_inprocess(*FLAGS)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            "CacheError: the optimization of shout cannot go on: the cache directory * takes no more (No space left on "
            "device). Next: free some space *then run again*"
        ]
    )
    assert "Traceback" not in result.stdout.str()
    assert not list(folder.path.rglob("*.tmp"))
    folder.runpytest_inprocess(*FLAGS, "-W", "error").assert_outcomes(passed=1)
    paid = (folder.path / "paid.txt").read_text().splitlines()
    assert len(paid) == len(set(paid))


def test_answers_that_a_full_disk_refuses_are_used_and_said_once(folder, monkeypatch):
    def refuse(self, key, row):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("diskcache.Cache.set", refuse)
        result = folder.runpytest_inprocess(*FLAGS)
    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines(["*cannot be written (database or disk is full); answers of this run are kept*"])
    plain, optimized = json.loads((folder.path / "reports" / "latest.json").read_text())["runs"]
    assert (plain["n_unparsed"], optimized["score"]) == (0, 1.0)
    assert n_paid(folder) == plain["usage"]["paid_calls"] + optimized["usage"]["paid_calls"]


def test_a_warm_cache_that_cannot_be_written_replays_the_whole_run(folder):
    weaker = ("--bounding-set", "-dac_override", "--inh-caps", "-dac_override")
    root = [] if os.geteuid() else [shutil.which("setpriv"), *weaker]
    if None in root:
        pytest.skip("the superuser may write everywhere, and there is no setpriv to do without that")
    folder.runpytest_inprocess(*FLAGS, "-W", "error").assert_outcomes(passed=1)
    reports, cache = folder.path / "reports", folder.path / ".copa_cache"
    before = n_paid(folder)
    scores = [run["scores"] for run in json.loads((reports / "latest.json").read_text())["runs"]]
    for path in (*cache.rglob("*"), cache):
        path.chmod(path.stat().st_mode & ~0o222)
    command = [*root, sys.executable, "-m", "pytest", *FLAGS, "-W", "error"]
    done = subprocess.run(command, cwd=folder.path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert n_paid(folder) == before
    assert [run["scores"] for run in json.loads((reports / "latest.json").read_text())["runs"]] == scores


def test_where_warnings_are_errors_a_refused_answer_ends_the_run_and_is_no_wrong_answer(folder, monkeypatch):
    def refuse(self, key, row):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("diskcache.Cache.set", refuse)
    result = folder.runpytest_inprocess(*FLAGS, "-W", "error")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["CacheError: the response cache in *(database or disk is full)*"])


def test_an_evaluation_with_unanswered_examples_is_no_pass(folder):
    folder.makepyfile(
        test_suite="def test_base(copa_evaluate):\n    assert copa_evaluate().n == 18\n",
    )
    folder.makeconftest(CONFTEST.replace("BROKEN = ()", "BROKEN = ('du', 'ez')"))
    result = folder.runpytest_inprocess(*FLAGS, "-W", "error")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["ERROR *max_error_rate=0: 2 of 18 examples have no score (11.1 %, allowed 0 %)*", "runs: 1 error; *"]
    )
    (run,) = json.loads((folder.path / "reports" / "latest.json").read_text())["runs"]
    assert (run["verdict"], run["n_failed"]) == ("error", 2)
    allowed = folder.runpytest_inprocess(*FLAGS, "-o", "copa_max_error_rate=0.2")
    allowed.stdout.fnmatch_lines(["runs: 1 pass; *"])
