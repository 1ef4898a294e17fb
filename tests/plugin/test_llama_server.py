"""A whole suite against llama.cpp's own server, a real endpoint; skipped where its wheel or a model is not at hand."""

import importlib.util
import sys
from pathlib import Path

import pytest

STRICT = ("-W", "error", "--strict-markers", "--strict-config", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")

SUITE = """
from typing import Literal

import dspy
import pytest
from copa_harness import Task

SENTENCES = {
    "how many calories are in an apple": "calories",
    "book me a flight to london": "book_flight",
    "what is twelve times nine": "calculator",
    "is there much sugar and fat in cheese": "calories",
    "i need a plane ticket to rome": "book_flight",
    "add fifteen and seven": "calculator",
    "how fattening is a bagel": "calories",
    "find me a flight from paris to oslo": "book_flight",
    "how many calories does a banana have": "calories",
}


class Intent(dspy.Signature):
    '''Name the intent of the sentence.'''

    text: str = dspy.InputField()
    intent: Literal["calories", "book_flight", "calculator"] = dspy.OutputField()


def same(example, prediction, trace=None):
    return prediction.intent == example.intent


@pytest.fixture
def copa_task():
    rows = [dspy.Example(text=text, intent=intent).with_inputs("text") for text, intent in SENTENCES.items()]
    program = dspy.Predict(Intent)
    program.demos = rows[:5]
    return Task("intents", program, same, rows[:5], rows[5:7], rows[7:])


@pytest.mark.copa(strategy="p", budget="calls=8")
def test_intents(copa_run):
    assert copa_run.evaluation.n_unparsed == 0


@pytest.mark.copa(answer_tokens=12)
def test_an_answer_ends_at_its_ceiling(copa_evaluate):
    usage = copa_evaluate(dspy.Predict(Intent)).usage
    assert usage.truncated_calls == 2
    assert usage.output_tokens in (24, 0)  # none where they were bought before
"""


@pytest.fixture(scope="module")
def servers():
    """The module that starts the server."""
    path = Path(__file__).parents[1] / "lm" / "llama_server.py"
    spec = importlib.util.spec_from_file_location("llama_server", path)
    found = sys.modules["llama_server"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    if found.missing():
        pytest.skip(found.missing())
    return found


def test_a_real_server_gets_a_ceiling_and_a_stop_and_no_key_and_is_paid_once(servers, pytester, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    for name in ("OPENAI_API_KEY", "OPENAI_API_BASE", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    pytester.makepyfile(test_suite=SUITE)
    with servers.LlamaServer() as server:
        options = ("--copa-lm=openai/smollm2", f"--copa-api-base={server.url}")
        pytester.runpytest_subprocess(*STRICT, *options).assert_outcomes(passed=2)
        bodies = server.bodies()
        assert {body["max_completion_tokens"] for body in bodies} == {256, 12}
        assert all("[[ ## completed ## ]]" in "".join(body["stop"]) for body in bodies)
        pytester.runpytest_subprocess(*STRICT, *options).assert_outcomes(passed=2)
        assert server.n_seen() == len(bodies)
