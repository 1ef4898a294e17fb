"""`Task(human=...)` through the plugin, and a judge that changed: its baselines are not comparable."""

import json

# pytester forgets what an inner run imported; these are imported once, here, for all of them.
import dspy
import pytest

import copa_harness.evaluate.runner
import copa_harness.judge.human_scores
import copa_harness.optimize.copa
import copa_harness.report.files
import copa_harness.session.session  # noqa: F401
from copa_harness import Task
from copa_harness.errors import TaskError
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
    is_wrong = word[0] in os.environ.get("SCRIPT_FORGETS", "")
    return {"answer": word if is_wrong else word.upper()}


judge_lm = ScriptedLM(
    lambda messages, seed: {"is_fine": "yes"}, model=os.environ.get("JUDGE", "scripted/judge"), fingerprint="1"
)
judge = dspy.Predict(dspy.Signature("answer -> is_fine", os.environ.get("RULES", "Is it fine?")))


def judged(example, prediction, trace=None):
    with dspy.context(lm=judge_lm):
        return judge(answer=prediction.answer).is_fine == "yes"


def people(example, prediction):
    if os.environ.get("RATES_BADLY"):
        return 7
    return float(prediction.answer == example.answer) if example.question[1] in "uvw" else None


def rows(words):
    return [dspy.Example(question=word, answer=word.upper()).with_inputs("question") for word in words]


@pytest.fixture
def copa_task():
    program = dspy.Predict("question -> answer")
    return Task("shout", program, judged, rows(WORDS[:6]), rows(WORDS[6:12]), rows(WORDS[12:]), human=people)


@pytest.fixture
def copa_base_lm(copa_session):
    version = os.environ.get("SCRIPT_FORGETS", "") + "m"
    return ScriptedLM(answer, model="scripted/m", fingerprint=version, gateway=copa_session.models.gateway)
"""

SUITE = """
import pytest

@pytest.mark.copa(strategy="none", max_regression=0.05)
def test_it(copa_run):
    copa_run.check()
"""


@pytest.fixture
def suite(pytester):
    return runner(pytester, conftest=CONFTEST, suite=SUITE, always=STRICT)


def test_people_see_a_loss_that_the_judge_does_not(suite, pytester, monkeypatch):
    _, run = suite("--copa-bless")
    assert run["human"]["n_rated"] == 18
    (baseline,) = (pytester.path / "baselines").glob("*/*.json")
    assert sum("human" in row for row in json.loads(baseline.read_text())["examples"]) == 18
    monkeypatch.setenv("SCRIPT_FORGETS", "cdef")
    result, run = suite()
    assert run["score"] == 1.0
    assert run["human"]["difference"]["mean"] == pytest.approx(-12 / 18)
    assert run["human"]["difference"]["interval"]["high"] < 0
    result.stdout.fnmatch_lines(
        ["shout, none: people rated 18 of 36 answers: metric and people agree on 0.333 of them*kinder by 0.667*"]
    )
    assert "What people say" in (pytester.path / "reports" / "latest.html").read_text()


@pytest.mark.parametrize(("name", "value"), [("RULES", "Is it very fine?"), ("JUDGE", "scripted/other")])
def test_a_judge_of_another_prompt_or_model_is_not_comparable(suite, pytester, monkeypatch, name, value):
    suite("--copa-bless")
    monkeypatch.setenv(name, value)
    result, run = suite()
    assert run["verdict"] == "not comparable"
    result.stdout.fnmatch_lines(["*not comparable*the metric changed since baseline*"])
    assert run["human"]["difference"] is None


def test_a_rating_that_is_no_score_is_an_error_of_the_metric(suite, pytester, monkeypatch):
    monkeypatch.setenv("RATES_BADLY", "1")
    result = pytester.runpytest_inprocess(*STRICT)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*got 7.0 from the metric 'human'; expected a number in 0..1*"])


def test_a_field_is_refused_for_a_rating_is_of_an_answer():
    rows = [[dspy.Example(question=word, answer=word).with_inputs("question")] for word in "abc"]
    with pytest.raises(TaskError, match="human is 'rating'; expected a function human"):
        Task("t", dspy.Predict("question -> answer"), lambda e, p, trace=None: 1.0, *rows, human="rating")
