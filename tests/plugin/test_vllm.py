"""Weights and prompts of a model behind a vLLM server through the plugin: trained here, served and scored there."""

import json

# pytester forgets what an inner run imported; these are imported once, here, for all of them.
import dspy  # noqa: F401
import pytest

import copa_harness.evaluate.runner
import copa_harness.lm.budget.ledger
import copa_harness.lm.endpoint.vllm
import copa_harness.lm.factory
import copa_harness.lm.local.attention
import copa_harness.lm.local.decoding
import copa_harness.lm.local.engine
import copa_harness.lm.local.scheduler
import copa_harness.optimize.copa
import copa_harness.report.files
import copa_harness.session.session
import copa_harness.store.artifacts
import copa_harness.tune.batches
import copa_harness.tune.loop
import copa_harness.tune.trainer  # noqa: F401
from copa_harness.testing.tiny_models import write_tiny_model

STRICT = ("-W", "error", "--strict-markers", "--strict-config", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")
API_KEY = "sk-vllm-0123456789abcdef"

SUITE = """
import dspy
import pytest
from copa_harness import Task

WORDS = [a + b for a in "abcd" for b in "uvwxyz"]


def shouted(example, prediction, trace=None):
    return prediction.answer == example.answer


def rows(words):
    return [dspy.Example(question=word, answer=word.upper()).with_inputs("question") for word in words]


@pytest.fixture
def copa_task():
    program = dspy.Predict("question -> answer")
    return Task("shout", program, shouted, rows(WORDS[:4]), rows(WORDS[4:8]), rows(WORDS[8:]))


def test_as_it_is(copa_evaluate):
    assert copa_evaluate().score == 0.0


@pytest.mark.copa(strategy="w -> p", budget="calls=60", min_score=0.5)
def test_both(copa_run):
    copa_run.check()
    assert copa_run.lm.model.startswith("hosted_vllm/org/toy@")
    assert copa_run.program(question="ux").answer == "UX"
"""


def answer(model, path, messages):
    """The tuned model shouts; the base model repeats."""
    word = messages[-1]["content"].split("[[ ## question ## ]]")[1].strip().split()[0]
    return f"[[ ## answer ## ]]\n{word if path is None else word.upper()}\n\n[[ ## completed ## ]]"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", context_length=16384)


@pytest.fixture
def stub(stubs, tiny_folder):
    with stubs.VllmStub(answer, root=str(tiny_folder), api_key=API_KEY) as running:
        yield running


@pytest.fixture
def run(pytester, stub, tiny_folder, monkeypatch):
    for name in ("API_BASE", "API_KEY", "BASE_URL"):
        monkeypatch.delenv(f"HOSTED_VLLM_{name}", raising=False)
    monkeypatch.setenv("HOSTED_VLLM_API_KEY", API_KEY)
    pytester.makepyfile(test_suite=SUITE)

    def run_(*more, weights=True):
        options = [f"--copa-api-base={stub.url}", "--copa-lm=hosted_vllm/org/toy", *more]
        if weights:
            options.append(f"--copa-base-weights=hf:{tiny_folder}")
        return pytester.runpytest_inprocess(*STRICT, *options)

    return run_


def latest(pytester):
    return json.loads((pytester.path / "reports" / "latest.json").read_text())["runs"]


def test_a_suite_improves_a_served_model_and_the_second_run_asks_and_trains_nothing(run, stub, pytester):
    run().assert_outcomes(passed=2)
    first = latest(pytester)
    assert (first[0]["score"], first[1]["score"]) == (0.0, 1.0)
    assert any(phase["usage"]["train_steps"] > 0 for phase in first[1]["phases"])
    assert len(stub.loaded) == 2  # bare, and behind demonstrations, since prompts follow

    n_before = stub.n_requests
    stub.restart()
    again = run()
    again.assert_outcomes(passed=2)
    assert stub.n_requests == n_before
    assert [row["score"] for row in latest(pytester)] == [0.0, 1.0]
    assert all(phase["usage"]["train_steps"] == 0 for row in latest(pytester) for phase in row["phases"])

    written = [path for path in pytester.path.rglob("*") if path.is_file()]
    assert [path for path in written if API_KEY.encode() in path.read_bytes()] == []


def test_a_restarted_server_gets_the_adapter_again_for_what_is_missing(run, stub, pytester):
    run().assert_outcomes(passed=2)
    stub.restart()
    pytester.makepyfile(test_suite=SUITE.replace('"ux"', '"zz"').replace('"UX"', '"ZZ"'))
    run().assert_outcomes(passed=2)
    assert len(stub.loaded) == 1


@pytest.mark.parametrize(
    ("misfortune", "said"),
    [
        ({"updating": False}, "*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve*"),
        ({"max_lora_rank": 8}, "*LoRA rank 16 is greater than max_lora_rank 8*--max-lora-rank*"),
        ({"sees": lambda path: None}, "*No adapter found*--copa-served-lora-path*"),
    ],
)
def test_what_the_server_refuses_fails_the_test_with_what_to_do(misfortune, said, run, stub):
    for name, value in misfortune.items():
        setattr(stub, name, value)
    result = run("-k", "both")
    result.assert_outcomes(errors=1, deselected=1)
    result.stdout.fnmatch_lines([said])


def test_without_base_weights_the_weights_step_says_which_option_names_them(run):
    result = run("-k", "both", weights=False)
    result.assert_outcomes(errors=1, deselected=1)
    result.stdout.fnmatch_lines(["*--copa-base-weights=hf:*"])


def test_a_wrong_key_is_said_with_the_variable_to_set(run, stub, monkeypatch):
    monkeypatch.setenv("HOSTED_VLLM_API_KEY", "wrong")
    result = run("-k", "as_it_is")
    result.assert_outcomes(failed=1, deselected=1)
    result.stdout.fnmatch_lines(["*HOSTED_VLLM_API_KEY*"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--copa-lm=embedded", "--copa-base-weights=hf:org/toy"), "*whose weights are its own*"),
        (("--copa-lm=hosted_vllm/org/toy", "--copa-base-weights=hf:org/toy"), "*--copa-api-base=http://localhost*"),
        (("--copa-lm=embeded",), "*did you mean 'embedded'*"),
        (("--copa-prompt-lm=nobody/x",), "*neither DSPy nor LiteLLM knows a provider 'nobody'*"),
    ],
)
def test_a_model_that_cannot_be_made_is_a_usage_error_that_leaves_no_folder(options, said, pytester):
    pytester.makepyfile(test_suite=SUITE)
    result = pytester.runpytest_inprocess(*STRICT, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([said])
    assert not (pytester.path / ".copa_cache").exists()
