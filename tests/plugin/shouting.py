"""The suite of the plugin's tests: a scripted model is to write words in capitals. A file adds `answer`, its model."""

import json

SHOUTING = """
import dspy
import pytest
from copa_harness import ScriptedLM, Task

WORDS = [a + b for a in "abcdef" for b in "uvwxyz"]


def shouted(example, prediction, trace=None):
    return prediction.answer == example.answer


def asked(messages):
    return messages[-1]["content"].split("[[ ## question ## ]]")[1].strip().split()[0]


def pay(messages):
    with open("paid.txt", "a") as log:
        log.write(repr(messages) + "\\n")


def rows(words):
    return [dspy.Example(question=word, answer=word.upper()).with_inputs("question") for word in words]


@pytest.fixture
def copa_task():
    program = dspy.Predict("question -> answer")
    return Task("shout", program, shouted, rows(WORDS[:12]), rows(WORDS[12:18]), rows(WORDS[18:]))


@pytest.fixture
def copa_base_lm(copa_session):
    return ScriptedLM(answer, model="scripted/shout", fingerprint="shout", gateway=copa_session.models.gateway)
"""


def runner(pytester, *, conftest, suite, always):
    """Runs a suite with its conftest: `run(*arguments)` gives pytester's result and the last run of the report."""
    pytester.makeconftest(conftest)
    pytester.makepyfile(test_suite=suite)

    def run(*arguments):
        result = pytester.runpytest_inprocess(*always, *arguments)
        return result, json.loads((pytester.path / "reports" / "latest.json").read_text())["runs"][-1]

    return run
