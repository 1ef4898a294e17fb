"""Fine-tuning jobs of endpoints go through DSPy's own providers: unchanged, metered, under the job's model name."""

import dspy
import pytest
from dspy.clients.openai import OpenAIProvider
from dspy.clients.provider import Provider, TrainingJob

from copa_harness import COPA
from copa_harness.errors import TrainingError
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.factory import build_lm, meter_lm
from copa_harness.lm.gateway import Gateway

WORDS = [a + b for a in "abcd" for b in "uvwxyz"]
TUNED = "ft:gpt-4o-mini-2024-07-18:org::0001"


def answered(model, path, messages):
    word = messages[-1]["content"].split("[[ ## question ## ]]")[1].strip().split()[0]
    said = word.upper() if model.startswith("ft:") or model.endswith("tuned") else word
    return f"[[ ## answer ## ]]\n{said}\n\n[[ ## completed ## ]]"


@pytest.fixture
def stub(stubs, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    for name in ("OPENAI_API_BASE", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789abcdef")
    with stubs.VllmStub(answered, base="gpt-4o-mini") as running:
        running.loaded.update({TUNED: "", "org/tuned": ""})  # what the provider serves once it is trained
        running.sees = lambda path: None
        yield running


@pytest.fixture
def openai_jobs(monkeypatch):
    """OpenAI's fine-tuning service, answering at once; the data of every job that was started."""
    jobs = []
    for name, answer in (("upload_data", "file-1"), ("wait_for_job", None), ("get_trained_model", TUNED)):
        monkeypatch.setattr(OpenAIProvider, name, staticmethod(lambda *args, answer=answer, **kwargs: answer))
    monkeypatch.setattr(
        OpenAIProvider, "_start_remote_training", staticmethod(lambda **kwargs: jobs.append(kwargs) or "job-1")
    )
    return jobs


@pytest.fixture
def make(stub, tmp_path):
    def make_():
        gateway = Gateway(cache=ResponseCache(tmp_path / "responses"))
        return build_lm(
            "openai/gpt-4o-mini",
            gateway=gateway,
            cache_dir=tmp_path,
            api_base=stub.url,
            num_retries=0,
            max_tokens=50,
            provider=OpenAIProvider(),
        )

    return make_


def rows(words):
    return [dspy.Example(question=word, answer=word.upper()).with_inputs("question") for word in words]


def shouted(example, prediction, trace=None):
    return prediction.answer == example.answer


def optimize(lm):
    optimizer = COPA(metric=shouted, strategy="w", budget=200, lm=lm)
    return optimizer.compile(dspy.Predict("question -> answer"), trainset=rows(WORDS[:8]), valset=rows(WORDS[8:14]))


def test_a_weights_step_runs_openais_job_and_serves_its_model(make, stub, openai_jobs, tmp_path, monkeypatch):
    monkeypatch.setattr("dspy.clients.utils_finetune.get_finetune_directory", lambda: str(tmp_path))
    lm = make()
    assert isinstance(lm.provider, OpenAIProvider)
    program = optimize(lm)
    assert [job["model"] for job in openai_jobs] == ["gpt-4o-mini"]
    assert program.copa_result.score_after == 1.0
    assert program.predictors()[0].lm.model == TUNED
    assert {phase.usage.paid_calls for phase in program.copa_result.phases} == {6}
    assert set(stub.answered) == {"gpt-4o-mini", TUNED}

    n_before = stub.n_requests
    assert optimize(make()).copa_result.score_after == 1.0
    assert stub.n_requests == n_before


def test_the_jobs_model_has_a_key_of_its_own_and_its_calls_are_booked_where_they_are_made(make, openai_jobs, tmp_path):
    lm = make()
    with open_scope("run") as scope:
        tuned = lm.copy(model=TUNED)
        program = dspy.Predict("question -> answer")
        assert [program(question="au", lm=one).answer for one in (lm, tuned, lm, tuned)] == ["au", "AU", "au", "AU"]
    assert lm.fingerprint != tuned.fingerprint
    usage = scope.phase_usages()["evaluate"]
    assert (usage.paid_calls, usage.cached_calls) == (2, 2)


class OwnProvider(Provider):
    """As a user may write one, or Databricks': given to the LM, not inferred from its name."""

    def __init__(self, result):
        super().__init__()
        self.finetunable, self.TrainingJob, self.result = True, TrainingJob, result

    def finetune(self, job, model, train_data, train_data_format, train_kwargs=None):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_a_provider_given_to_a_plain_lm_is_kept_and_used(stub, tmp_path):
    plain = dspy.LM(
        "openai/gpt-4o-mini", provider=OwnProvider("openai/org/tuned"), api_base=stub.url, cache=False, max_tokens=50
    )
    lm = meter_lm(plain, gateway=Gateway(cache=ResponseCache(tmp_path / "responses")))
    program = optimize(lm)
    assert program.copa_result.score_after == 1.0
    assert program.predictors()[0].lm.model == "openai/org/tuned"


def test_a_job_that_fails_says_why(stub, tmp_path):
    plain = dspy.LM(
        "openai/gpt-4o-mini", provider=OwnProvider(RuntimeError("quota of jobs")), api_base=stub.url, cache=False
    )
    lm = meter_lm(plain, gateway=Gateway(cache=ResponseCache(tmp_path / "responses")))
    with pytest.raises(TrainingError, match=r"fine-tuning 'openai/gpt-4o-mini' failed: quota of jobs"):
        optimize(lm)
