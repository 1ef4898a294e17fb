"""`--copa-against`: the suite of another commit beside this one, and what a pull request gets to see of it.

The model is a script that answers rightly unless the program's instruction asks it to whisper.
"""

import subprocess
import xml.etree.ElementTree as ElementTree

import pytest

CONFTEST = """
import os
import dspy
import pytest
from copa_harness import ScriptedLM, Task
from program import INSTRUCTION

WORDS = [a + b for a in "abcdefgh" for b in "stuvwxyz"]


def shouted(example, prediction, trace=None):
    return prediction.answer == example.answer


def answer(messages):
    word = messages[-1]["content"].split("[[ ## question ## ]]")[1].strip().split()[0]
    is_wrong = "whisper" in messages[0]["content"] and word[0] in "defgh" or "DRIFTS" in os.environ
    return {"answer": word if is_wrong else word.upper()}


def rows(words):
    return [dspy.Example(question=word, answer=word.upper()).with_inputs("question") for word in words]


@pytest.fixture(scope="session")
def copa_task():
    program = dspy.Predict(dspy.Signature("question -> answer", INSTRUCTION))
    return Task("shout", program, shouted, rows(WORDS[:12]), rows(WORDS[12:18]), rows(WORDS[18:]))


@pytest.fixture(scope="session")
def copa_base_lm(copa_session):
    return ScriptedLM(answer, model="scripted/shout", fingerprint="shout", gateway=copa_session.models.gateway)
"""

SUITE = """
import pytest


@pytest.mark.copa(strategy="none")
def test_it(copa_run):
    copa_run.check()
"""
"""A newcomer's: no threshold, no accepted baseline."""

STRICT = ("-p", "no:cacheprovider", "--strict-markers", "-p", "no:hypothesispytest")


def git(*arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(pytester):
    """A repository on a branch that has left main."""
    pytester.makeini("[pytest]\npythonpath = .\n")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(program="INSTRUCTION = 'Shout the word.'\n", test_suite=SUITE)
    (pytester.path / ".gitignore").write_text(".copa_cache/\nreports/\n__pycache__/\n")
    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("switch", "-q", "-c", "change")
    return pytester


def change(repository, **files):
    repository.makepyfile(**files)
    git("commit", "-q", "-a", "-m", "change")


WORSE = "INSTRUCTION = 'Please whisper the word.'\n"


def test_a_worse_branch_fails_and_the_comment_says_it_in_its_first_line(repository, monkeypatch):
    change(repository, program=WORSE)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(repository.path / "reports" / "summary.md"))
    (repository.path / "reports").mkdir()
    result = repository.runpytest_subprocess(*STRICT, "--copa-against=main", "--junitxml=junit.xml")
    assert result.ret == 1
    commit = git("rev-parse", "main")[:10]
    result.stdout.fnmatch_lines(
        [
            f"copa: first the suite of main ({commit}), to compare with",
            "::error file=test_suite.py,line=4,title=shout%2C none%3A fail::max_regression=0.05: *",
        ]
    )
    first = (repository.path / "reports" / "comment.md").read_text().splitlines()[1]
    assert f"Worse than main ({commit}): shout, none: -0.870" in first
    assert "on 46 examples, 40 worse and 0 better; were nothing changed" in first
    assert "chance would do this with p \\< 0.0001" in first
    assert first in (repository.path / "reports" / "summary.md").read_text()
    assert "against main" in (repository.path / "reports" / "latest.html").read_text()
    (case,) = ElementTree.parse(repository.path / "junit.xml").iter("testcase")
    told = {one.get("name"): one.get("value") for one in case.iter("property")}
    assert (told["copa_n"], told["copa_verdict"], told["copa_calls"]) == ("46", "fail", "46")
    assert float(told["copa_score"]) == pytest.approx(6 / 46, abs=1e-4)
    assert git("worktree", "list").count("\n") == 0
    assert git("status", "--porcelain", "--untracked-files=no") == ""


def test_an_unchanged_branch_pays_nothing_and_is_one_line(repository):
    result = repository.runpytest_subprocess(*STRICT, "--copa-against=merge-base")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["runs: 1 pass; 0 calls paid, 46 from the cache, *"])
    first = (repository.path / "reports" / "comment.md").read_text().splitlines()[1]
    assert first.startswith("**No run is worse than merge-base (")
    assert first.endswith(": 1 pass, 0 calls paid.**")


def test_stored_answers_of_the_other_commit_that_are_no_longer_the_models_are_told_here(repository, monkeypatch):
    repository.runpytest_subprocess(*STRICT)
    change(repository, program="INSTRUCTION = 'Shout the word!'")
    monkeypatch.setenv("DRIFTS", "1")
    result = repository.runpytest_subprocess(*STRICT, "--copa-against=main", "--copa-canaries=5")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "shout, none: no canaries: no answer is older than this session*",
            "shout, none in main: FAULT: 5 of 5 stored*",
        ]
    )


def test_workers_compare_with_the_other_commit_too(repository):
    change(repository, program=WORSE)
    result = repository.runpytest_subprocess(*STRICT, "--copa-against=main", "-n", "2")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*FAIL*max_regression=0.05*"])


def test_a_test_that_asks_for_no_verdict_fails_the_session(repository):
    quiet = SUITE.replace("copa_run.check()", "assert copa_run.completed")
    change(repository, program=WORSE, test_suite=quiet)
    git("switch", "-q", "main")
    change(repository, test_suite=quiet)
    git("switch", "-q", "change")
    result = repository.runpytest_subprocess(*STRICT, "--copa-against=main")
    result.assert_outcomes(passed=1)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*a gate failed, but the test passed it by*"])


def test_what_stands_on_one_side_only_is_said_and_fails_nothing_in_ci(repository, monkeypatch):
    monkeypatch.setenv("CI", "true")
    change(repository, test_suite=SUITE + SUITE.replace("import pytest", "").replace("none", "p").replace("it", "new"))
    result = repository.runpytest_subprocess(*STRICT, "--copa-against=main", "--copa-budget=calls=20")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["only here: shout, p (scripted/shout)", "main (*) paid: runs: 1 pass; *"])


def test_a_suite_that_the_other_commit_does_not_have_is_no_error(repository):
    (repository.path / "test_other.py").write_text(SUITE)
    git("add", ".")
    git("commit", "-q", "-m", "a new suite")
    result = repository.runpytest_subprocess(*STRICT, "--copa-against=main", "test_other.py")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["main (*) has no runs to compare with; its output is in *log.txt"])


def test_a_suite_that_breaks_at_the_other_commit_is_one_error(repository):
    git("switch", "-q", "main")
    change(repository, program="INSTRUCTION = (\n")
    git("switch", "-q", "change")
    result = repository.runpytest_subprocess(*STRICT, "--copa-against=main")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --copa-against=main: the suite of * could not be run*log.txt"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--copa-against=nowhere"], "ERROR: --copa-against: got 'nowhere', expected a commit*fetch-depth: 0*"),
        (["--copa-against=main", "--copa-bless"], "ERROR: --copa-against compares*expected one of the two."),
    ],
)
def test_what_cannot_be_compared_with_is_refused_before_anything_runs(repository, options, message):
    result = repository.runpytest_subprocess(*STRICT, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])
    assert not (repository.path / "reports").exists()
