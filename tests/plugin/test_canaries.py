"""`--copa-canaries`: a drift is named beside the verdict, a fault ends in status 1, and nothing stored is replaced."""

# pytester forgets what an inner run imported; these are imported once, here, for all of them.
import dspy  # noqa: F401
import pytest

import copa_harness.evaluate.runner
import copa_harness.judge.flaky
import copa_harness.optimize.copa
import copa_harness.report.files
import copa_harness.session.session  # noqa: F401
from tests.plugin.shouting import runner

STRICT = ("-W", "error", "--strict-markers", "--strict-config", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")

CONFTEST = """
import os
import dspy
import pytest
from copa_harness import ScriptedLM, Task

WORDS = [a + b for a in "abcdefgh" for b in "uvwxyz"]


def answer(messages, seed):
    word = messages[-1]["content"].split("[[ ## question ## ]]")[1].strip().split()[0]
    return {"answer": word if word[0] in os.environ.get("SCRIPT_DRIFTS", "") else word.upper()}


def rows(words):
    return [dspy.Example(question=word, answer=word.upper()).with_inputs("question") for word in words]


@pytest.fixture
def copa_task():
    program = dspy.Predict(os.environ.get("SCRIPT_SIGNATURE", "question -> answer"))
    metric = lambda example, prediction, trace=None: prediction.answer == example.answer
    return Task("shout", program, metric, rows(WORDS[:6]), rows(WORDS[6:12]), rows(WORDS[12:]))


@pytest.fixture
def copa_base_lm(copa_session):
    temperature = float(os.environ.get("SCRIPT_TEMPERATURE", "1"))
    gateway = copa_session.models.gateway
    return ScriptedLM(answer, model="scripted/m", fingerprint="m", gateway=gateway, temperature=temperature)
"""

SUITE = """
import pytest

@pytest.mark.copa(strategy="none", min_score=0.5)
def test_it(copa_run):
    copa_run.check()
"""


@pytest.fixture
def suite(pytester):
    return runner(pytester, conftest=CONFTEST, suite=SUITE, always=STRICT)


def test_a_drift_is_named_beside_the_verdict_and_does_not_change_it(suite, pytester, monkeypatch):
    suite()
    monkeypatch.setenv("SCRIPT_DRIFTS", "cdefgh")
    result, run = suite("--copa-canaries=12", "--junitxml=junit.xml")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["*shout*none*36*1.000*24*pass, DRIFT", "shout, none: DRIFT: 12 of 12 stored answers (the oldest of 20*"]
    )
    assert run["verdict"] == "pass"
    assert run["drift"]["n_changed"] == 12
    assert run["score"] == 1.0
    assert run["drift"]["p_value"] == pytest.approx(2 * 3**-12)
    assert run["usage"]["paid_calls"] == 24  # each twice, paid and counted
    assert [phase["phase"] for phase in run["phases"]] == ["test evaluation", "canaries"]
    assert 'name="copa_drift" value="DRIFT: 12 of 12' in (pytester.path / "junit.xml").read_text()
    page = (pytester.path / "reports" / "latest.html").read_text()
    assert '<span class="chip undecided">drift</span>' in page
    assert "Canaries" in page
    again, run = suite()  # what is stored is still what it was
    assert run["score"] == 1.0
    assert run["usage"]["paid_calls"] == 0
    assert run["drift"] is None
    again.stdout.no_fnmatch_line("*DRIFT*")


def test_a_model_that_is_what_it_was_is_said_to_be(suite):
    suite()
    result, run = suite("--copa-canaries=5")
    result.stdout.fnmatch_lines(["shout, none: no drift: all of 5 stored answers*when scripted/m is asked again."])
    assert run["usage"]["paid_calls"] == 10
    same, other = suite("--copa-canaries=5"), suite("--copa-canaries=500")
    assert same[1]["drift"]["n"] == 5
    assert other[1]["drift"]["n"] == 36


def test_a_local_model_that_answers_otherwise_at_temperature_0_fails_the_session(suite, monkeypatch):
    monkeypatch.setenv("SCRIPT_TEMPERATURE", "0")
    suite()
    monkeypatch.setenv("SCRIPT_DRIFTS", "c")
    result, run = suite("--copa-canaries=36")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["exit status 1: shout, none: FAULT: 6 of 36 stored answers*"])
    assert run["usage"]["paid_calls"] == 36  # once each: a second answer could not be another


def test_where_every_answer_is_new_there_is_no_canary_and_it_is_said(suite, monkeypatch):
    result, run = suite("--copa-canaries=5")
    result.stdout.fnmatch_lines(["shout, none: no canaries: no answer is older than this session*"])
    assert run["usage"]["paid_calls"] == 36
    assert run["drift"] is None


def test_of_a_new_program_the_program_as_written_is_asked(suite, pytester, monkeypatch):
    suite()
    pytester.makepyfile(test_suite=SUITE.replace("none", "p"))
    monkeypatch.setenv("SCRIPT_DRIFTS", "cdefgh")
    _, run = suite("--copa-canaries=4", "--copa-budget=60")
    assert run["strategy"] == "p"
    assert run["drift"]["n_changed"] == 4


def test_the_ceilings_of_the_session_hold_for_canaries(suite):
    suite()
    result, run = suite("--copa-canaries=5", "--copa-total-budget=calls=3")
    assert result.ret == 0
    assert run["verdict"] == "pass"
    result.stdout.fnmatch_lines(["shout, none: canaries could not be asked: budget*"])
    assert run["usage"]["paid_calls"] <= 3


def test_a_plan_counts_canaries_at_twice_their_calls(suite, pytester):
    result = pytester.runpytest_inprocess(*STRICT, "--copa-plan", "--copa-canaries=5")
    result.stdout.fnmatch_lines(["*canaries, stored answers asked for again (at most)*10*"])
