"""Names, texts and answers of strangers: a terminal obeys none, no page or comment takes one for markup."""

import re

# pytester forgets what an inner run imported; these are imported once, here, for all of them.
import copa_harness.lm.factory
import copa_harness.optimize.copa
import copa_harness.session.session  # noqa: F401

STRICT = ("-W", "error", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")

SUITE = r"""
import logging
import dspy
import pytest
from copa_harness import ScriptedLM, Task

HALF = "\ud83d"
OBEYED = "\x1b]0;owned\x07\x1b[2J\u202egnp\u200b"
MARKUP = "</details><img src=x onerror=f()>[a](//e.test)@everyone #1 `c` ![i](//e)"
NAME = "../../../" + MARKUP + "|%0A\\"


def metric(example, prediction, trace=None):
    if "raise" in example.question:
        raise ValueError(OBEYED + MARKUP)
    return float(prediction.answer == example.answer)


def rows(prefix, n=8):
    return [
        dspy.Example(question=f"{prefix} {i} {MARKUP}{OBEYED}", answer="yes" + OBEYED).with_inputs("question")
        for i in range(n)
    ]


@pytest.fixture
def copa_task(request):
    name = OBEYED if "refused" in request.node.name else NAME
    test = rows("raise") if "raises" in request.node.name else rows("test")
    return Task(name, dspy.Predict("question -> answer"), metric, rows("train"), rows("val"), test, description=MARKUP)


@pytest.fixture
def copa_base_lm(copa_session):
    def answer(messages):
        return {"answer": "no" + HALF + OBEYED + MARKUP}

    return ScriptedLM(answer, model="scripted/" + MARKUP + OBEYED, fingerprint="x", gateway=copa_session.models.gateway)


def test_refused(copa_run): pass

def test_raises(copa_run): pass

@pytest.mark.copa(strategy="p", budget="calls=60", min_score=0.9)
def test_fails(copa_run):
    copa_run.check()

def test_evaluates(copa_evaluate):
    logging.getLogger("copa_harness").warning("%s", copa_evaluate().summary())
    assert False
"""

OBEYED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u202e\ud800-\udfff]")


def test_strangers_texts_are_obeyed_nowhere(pytester, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "summary.md"))
    pytester.makepyfile(test_suite=SUITE)
    shown = ("-v", "-rA", "--copa-report=full", "--junitxml=junit.xml", "--color=no", "--copa-bless")
    result = pytester.runpytest_inprocess(*STRICT, *shown)
    result.assert_outcomes(errors=2, failed=2)
    result.stdout.fnmatch_lines(["TaskError: task name: got *", "MetricError: the metric failed on all 8 *<U+001B>*"])
    made = sorted(path for path in pytester.path.rglob("*") if path.is_file())
    texts = {path.name: path.read_text() for path in made if path.suffix in (".html", ".md", ".xml", ".jsonl")}
    assert {"latest.html", "comment.md", "summary.md", "junit.xml"} <= set(texts)
    for name, text in {**texts, "terminal": result.stdout.str(), "paths": " ".join(map(str, made))}.items():
        assert OBEYED.search(text) is None, name
    for name in ("comment.md", "summary.md"):
        assert re.search(r"(?<!\\)(<img|\[a\]|!\[i|`c`)|@everyone|#1", texts[name]) is None, name
    assert "<img" not in texts["latest.html"]
    assert "<img" not in texts["junit.xml"]
