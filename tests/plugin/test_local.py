"""Suites on a local model: constrained answers, the chat template option, and what the terminal says of the model."""

import json

# pytester forgets what an inner run imported; these are imported once, here, for all of them.
import dspy  # noqa: F401
import pytest
import torch  # noqa: F401
import transformers  # noqa: F401
from dspy.lm15 import Config, Message, Request

import copa_harness.evaluate.runner
import copa_harness.lm.local.constrained
import copa_harness.lm.local.engine
import copa_harness.session.session  # noqa: F401
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.testing.tiny_models import write_tiny_model

STRICT = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:xdist")

SUITE = """
from typing import Literal

import dspy
import pytest
from copa_harness import Task


@pytest.fixture(scope="session")
def copa_task():
    rows = [dspy.Example(question=f"zebra {i}", label="red").with_inputs("question") for i in range(12)]
    program = dspy.Predict(dspy.Signature("question -> label: Literal['red', 'blue']"))
    return Task("colour", program, lambda example, prediction, trace=None: prediction.label in ("red", "blue"),
                rows[:4], rows[4:8], rows[8:])


def test_all_parse(copa_evaluate):
    evaluation = copa_evaluate()
    assert evaluation.score == 1.0, [r.error for r in evaluation.results]


@pytest.mark.copa(constrain=True)
def test_marker(copa_evaluate):
    assert copa_evaluate().score == 1.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model; asking it imports, before pytester looks, what pytester would otherwise make Python forget."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", chat_template=None, seed=4)
    engine = TransformersEngine(folder, name="warm", lora_dir=folder, chat_template="{{ messages[0]['content'] }}")
    engine.complete(Request(model="warm", messages=(Message.user("zebra"),), config=Config(max_tokens=1)), seed=0)
    return folder


@pytest.fixture
def suite(folder, pytester):
    """Runs the suite with a random model and some options."""
    template = pytester.path / "plain.jinja"
    template.write_text("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}")
    pytester.makepyfile(SUITE)

    def run(*options):
        return pytester.runpytest_inprocess(
            *STRICT, f"--copa-lm=hf:{folder}", "--copa-chat-template=plain.jinja", "--copa-device=cpu", *options
        )

    return run


def test_constrained_answers_always_parse_and_the_report_says_so(suite, pytester):
    free = suite("--copa-report=full")
    free.assert_outcomes(passed=1, failed=1)  # the marker's test passes: its answers are constrained
    free.stdout.fnmatch_lines(["*tiny: LlamaForCausalLM,*float32 on cpu*cascade; 8 answers, * at a time"])
    constrained = suite("--copa-constrain")
    constrained.assert_outcomes(passed=2)
    constrained.stdout.fnmatch_lines(["*constrained answers*"])
    assert "LlamaForCausalLM" not in constrained.stdout.str()  # every answer was known, no weights were loaded
    report = json.loads((pytester.path / "reports" / "latest.json").read_text())
    assert report["environment"]["constrained"] is True
    assert all(run["label"].endswith(", constrained") for run in report["runs"])


def test_an_endpoint_cannot_be_constrained(pytester):
    pytester.makepyfile(SUITE)
    result = pytester.runpytest_inprocess(*STRICT, "--copa-lm=openai/gpt-4o-mini", "--copa-constrain")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*constrain=True for 'openai/gpt-4o-mini'*"])


@pytest.mark.parametrize("words", ["gpu", "cuda:one"])
def test_a_device_that_cannot_be_is_refused_before_any_test_runs(words, pytester):
    pytester.makepyfile(SUITE)
    result = pytester.runpytest_inprocess(*STRICT, f"--copa-device={words}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--copa-device: got the device '{words}'; expected cpu, cuda*"])


def test_every_xdist_worker_hands_its_number_to_the_engine(pytester):
    pytester.makepyfile("""
        import pytest

        @pytest.mark.parametrize("n", range(4))
        def test_number(n, copa_base_lm, worker_id):
            print(worker_id, "has number", copa_base_lm.engine._worker)
    """)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-n", "2", "-rP")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines_random(["gw0 has number 0", "gw1 has number 1"])


def test_answers_that_were_cut_off_are_told_of(suite):
    result = suite("--copa-answer-tokens=3")
    result.stdout.fnmatch_lines(["*4 of 4 answers reached the ceiling on answers and were cut off*"])
