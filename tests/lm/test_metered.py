"""MeteredLM inside real DSPy programs: n, rollouts, copies, errors, async, saving."""

import asyncio
import copy
import json
import logging
import threading
from dataclasses import replace

import dspy
import pytest
from dspy.clients.provider import Provider, TrainingJob
from dspy.lm15 import ContextLengthError, Message, Request, ServerError

from copa_harness.errors import BudgetExhausted, ConfigurationError, ContextOverflowError, ProviderError
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.metered import HISTORY_LENGTH, MeteredLM
from copa_harness.lm.scripted import ScriptedEngine, ScriptedLM
from copa_harness.results import Budget, Phase

ADAPTER = dspy.ChatAdapter(use_json_adapter_fallback=False)


def counting_lm(**kwargs):
    """Answers 1, 2, 3, ... in the order of paid calls."""
    numbers = iter(range(1, 10_000))
    return ScriptedLM(lambda messages: {"answer": str(next(numbers))}, **kwargs)


@pytest.fixture
def ask():
    program = dspy.Predict("question -> answer")
    with dspy.context(adapter=ADAPTER):
        yield program


def test_three_candidates_are_three_independent_kept_answers_and_more_cost_only_the_rest(ask):
    ask.set_lm(counting_lm())
    three = ask(question="q", config={"n": 3, "temperature": 1.0}).completions.answer
    five = ask(question="q", config={"n": 5, "temperature": 1.0}).completions.answer
    assert three == ["1", "2", "3"]
    assert five == ["1", "2", "3", "4", "5"]
    assert ask.lm.calls == 5


def test_rollouts_are_asked_separately_and_remembered(ask):
    ask.set_lm(counting_lm())
    answers = [ask(question="q", config={"rollout_id": r, "temperature": 1.0}).answer for r in [1, 2, 1, 3, 2]]
    assert answers == ["1", "2", "1", "3", "2"]


def test_the_rollout_of_a_copied_lm_counts_too(ask):
    lm = counting_lm(temperature=1.0)
    answers = []
    for rollout_id in [7, 7, 8]:
        ask.set_lm(lm.copy(rollout_id=rollout_id))
        answers.append(ask(question="q").answer)
    assert answers == ["1", "1", "2"]


def test_best_of_n_gets_different_tries_and_replays_them_all(ask):
    ask.set_lm(counting_lm())
    best = dspy.BestOfN(ask, N=4, reward_fn=lambda args, prediction: int(prediction.answer) / 4, threshold=1.0)
    assert [best(question="q").answer for _ in range(2)] == ["4", "4"]
    assert ask.lm.calls == 4


def test_copies_of_programs_and_lms_share_engine_gateway_and_meter(ask):
    ask.set_lm(counting_lm())
    with open_scope("t", budget=Budget(1)) as scope:
        for program in [ask, ask.deepcopy(), copy.deepcopy(ask), ask.reset_copy()]:
            if program.lm is None:
                program.set_lm(ask.lm.copy())
            assert program(question="q").answer == "1"
    assert scope.usage().cached_calls == 3


def test_a_copy_with_another_model_name_asks_anew(ask):
    ask.set_lm(counting_lm())
    ask(question="q")
    ask.set_lm(ask.lm.copy(model="scripted/tuned@01"))
    assert ask(question="q").answer == "2"


def test_engine_and_gateway_can_be_replaced_in_a_copy():
    lm, other = counting_lm(), ScriptedLM("other")
    assert lm.copy(engine=other.engine)("x") == ["other"]
    gateway = Gateway(cache=None)
    assert lm.copy(gateway=gateway).gateway is gateway
    assert lm.copy().gateway is lm.gateway


def test_dspys_own_cache_stays_off_whatever_is_asked(ask, monkeypatch):
    monkeypatch.setattr(dspy, "cache", None)  # any use would raise
    lm = counting_lm()
    lm.cache = True
    ask.set_lm(lm)
    assert ask(question="q", config={"cache": True}).answer == "1"


def test_history_is_short_and_copies_carry_none():
    lm = counting_lm()
    for index in range(HISTORY_LENGTH + 5):
        lm(str(index))
    assert len(lm.history) == HISTORY_LENGTH
    assert lm.history[-1]["messages"] is None
    assert lm.history[-1]["prompt"] == str(HISTORY_LENGTH + 4)
    assert copy.deepcopy(lm).history == []


def test_a_replay_is_not_billed_by_dspys_usage_tracker_and_a_bought_answer_once(ask):
    ask.set_lm(counting_lm())
    with dspy.track_usage() as tracker:
        ask(question="q")
        bought = tracker.get_total_tokens()["scripted/model"]
        ask(question="q")
    assert tracker.get_total_tokens()["scripted/model"] == bought
    assert bought["completion_tokens"] > 0


def test_calls_of_evaluate_threads_carry_scope_and_phase(ask):
    ask.set_lm(ScriptedLM({"": {"answer": "yes"}}))
    devset = [dspy.Example(question=str(i), answer="yes").with_inputs("question") for i in range(12)]
    evaluate = dspy.Evaluate(devset=devset, metric=lambda e, p, t=None: e.answer == p.answer, num_threads=4)
    with open_scope("t") as scope, scope.phase(Phase.DEMOS):
        assert evaluate(ask).score == 100.0
    assert {name: usage.paid_calls for name, usage in scope.phase_usages().items()} == {"demos": 12}


@pytest.mark.parametrize("n_threads", [1, 4])
def test_a_spent_budget_ends_evaluate_at_once_and_is_not_a_wrong_answer(ask, n_threads):
    ask.set_lm(ScriptedLM({"": {"answer": "yes"}}))
    devset = [dspy.Example(question=str(i), answer="yes").with_inputs("question") for i in range(12)]
    evaluate = dspy.Evaluate(devset=devset, metric=lambda e, p, t=None: 1.0, num_threads=n_threads)
    with open_scope("t", budget=Budget(5)) as scope, pytest.raises(BudgetExhausted):
        evaluate(ask)
    assert ask.lm.calls == scope.charged_calls == 5


def test_async_calls_go_through_the_same_gateway(ask):
    ask.set_lm(counting_lm())

    async def gather():
        return await asyncio.gather(*[ask.acall(question="q", config={"n": 2, "temperature": 1.0}) for _ in range(5)])

    with open_scope("t", budget=Budget(2)) as scope:
        predictions = asyncio.run(gather())
        with pytest.raises(BudgetExhausted):
            asyncio.run(ask.acall(question="other"))
    assert [p.completions.answer for p in predictions] == [["1", "2"]] * 5
    assert (scope.usage().paid_calls, scope.usage().cached_calls) == (2, 8)


def test_streaming_programs_get_the_whole_answer(ask):
    ask.set_lm(counting_lm())

    async def last():
        async for item in dspy.streamify(ask)(question="q"):
            final = item
        return final

    assert asyncio.run(last()).answer == "1"


def test_an_explicit_request_is_answered_too():
    lm = counting_lm()
    response = lm(Request(model=lm.model, messages=(Message.user("q"),)))
    assert "1" in response.message.text


@pytest.mark.parametrize(
    ("raised", "ours", "dspys"),
    [
        (ProviderError("down"), ProviderError, dspy.LMError),
        (RuntimeError("CUDA error"), ProviderError, dspy.LMError),
        (ServerError("busy"), ProviderError, dspy.LMServerError),
        (ContextOverflowError("2,000 of 1,500 tokens"), ContextOverflowError, dspy.ContextWindowExceededError),
        (ContextLengthError("2,000 of 1,500 tokens"), ContextOverflowError, dspy.ContextWindowExceededError),
    ],
)
def test_a_failure_is_a_provider_error_of_ours_and_the_right_error_of_dspy(ask, raised, ours, dspys):
    ask.set_lm(ScriptedLM([raised]))
    with pytest.raises(ours, match=str(raised)) as caught:
        ask(question="q")
    assert isinstance(caught.value, dspys)
    assert isinstance(caught.value, ProviderError)


@pytest.mark.parametrize("raised", [MemoryError("full"), ConfigurationError("no such LoRA"), KeyboardInterrupt()])
def test_what_is_not_about_the_provider_passes_through_dspy_unchanged(ask, raised):
    ask.set_lm(ScriptedLM([raised]))
    with pytest.raises(type(raised)) as caught:
        ask(question="q")
    assert caught.value is raised


def test_a_local_engine_is_asked_once_even_if_its_error_looks_transient(ask):
    ask.set_lm(ScriptedLM([ServerError("busy"), {"answer": "late"}]))
    with pytest.raises(ProviderError):
        ask(question="q")
    assert ask.lm.calls == 1


def test_dspy_retries_transient_errors_when_asked_to_and_the_candidates_stay_in_order(ask, monkeypatch):
    monkeypatch.setattr("dspy.clients.execution.time.sleep", lambda seconds: None)
    ask.set_lm(ScriptedLM([{"answer": "1"}, ServerError("busy"), {"answer": "2"}], num_retries=1))
    with open_scope("t", budget=Budget(2)) as scope:
        assert ask(question="q", config={"n": 2, "temperature": 1.0}).completions.answer == ["1", "2"]
        assert ask(question="q", config={"n": 2, "temperature": 1.0}).completions.answer == ["1", "2"]
    assert (scope.usage().paid_calls, scope.usage().failed_calls) == (2, 1)


def test_an_answer_that_does_not_parse_is_dspys_parse_error_and_paid(ask):
    ask.set_lm(ScriptedLM(["no fields here"]))
    with open_scope("t") as scope, pytest.raises(dspy.AdapterParseError):
        ask(question="q")
    assert scope.usage().paid_calls == 1


def test_a_saved_program_holds_no_secret_and_says_how_to_load_it(ask, tmp_path):
    lm = counting_lm()
    ask.set_lm(lm)
    ask.save(tmp_path / "program.json")
    state = json.loads((tmp_path / "program.json").read_text())["lm"]
    assert state["model"] == "scripted/model"
    with pytest.raises(ConfigurationError, match=r"does not contain it; .*program.set_lm"):
        MeteredLM.load_state(state)
    bare = ask.deepcopy()
    bare.set_lm(None)
    bare.save(tmp_path / "bare.json")
    loaded = dspy.Predict("question -> answer")
    loaded.load(tmp_path / "bare.json")
    loaded.set_lm(lm)
    assert loaded(question="q").answer == "1"


class NamingProvider(Provider):
    """Fine-tuning that only makes up a name."""

    def __init__(self):
        super().__init__()
        self.finetunable = True
        self.TrainingJob = TrainingJob

    def __deepcopy__(self, memo):
        return self

    def finetune(self, job, model, train_data, train_data_format, train_kwargs=None):
        return f"{model}@tuned"


def test_finetune_returns_an_lm_with_the_same_engine_gateway_and_provider():
    provider = NamingProvider()
    lm = counting_lm(provider=provider)
    tuned = lm.finetune([{"messages": []}], train_data_format=None).result()
    assert tuned.model == "scripted/model@tuned"
    assert (tuned.engine, tuned.gateway, tuned.provider) == (lm.engine, lm.gateway, provider)
    assert copy.deepcopy(lm).provider is provider


def test_a_fine_tuning_thread_of_dspy_is_charged_to_the_open_scope():
    lm = counting_lm()
    with open_scope("t") as scope:
        thread = threading.Thread(target=lm, args=("q",))
        thread.start()
        thread.join()
    assert scope.usage().paid_calls == 1


def test_a_local_folder_called_like_an_openai_reasoning_model_is_no_such_model():
    assert ScriptedLM("x", model="hf:models/o1", temperature=0.0, max_tokens=8).kwargs["max_tokens"] == 8


def cut_off(**kwargs):
    """A model all of whose answers reach their ceiling."""

    class CutOff(ScriptedEngine):
        def complete(self, request, *, seed):
            return replace(super().complete(request, seed=seed), finish_reason="length")

    engine = CutOff("[[ ## answer ## ]]\nso so")
    return MeteredLM("scripted/long", engine=engine, gateway=Gateway(cache=None), **kwargs)


@pytest.mark.parametrize("fast", ["0", "1"])
def test_answers_that_were_cut_off_are_counted_bought_or_replayed_and_logged_by_nobody(caplog, monkeypatch, fast, ask):
    monkeypatch.setenv("COPA_FAST_PATH", fast)
    ask.set_lm(cut_off())
    with open_scope("test") as scope, dspy.context(disable_history=True):
        for question in "aab":
            ask(question=question)
    assert scope.usage().truncated_calls == 3
    assert not caplog.records


@pytest.mark.parametrize("fast", ["0", "1"])
def test_outside_every_scope_one_line_says_that_answers_are_cut_off(caplog, monkeypatch, fast, ask):
    monkeypatch.setenv("COPA_FAST_PATH", fast)
    ask.set_lm(cut_off(max_tokens=7))
    with dspy.context(disable_history=True):
        for question in "abc":
            ask(question=question)
    assert [record.getMessage() for record in caplog.records] == [
        "an answer of scripted/long was cut off at its ceiling (7 tokens); further ones are not told of"
    ]


def test_dspys_own_models_still_say_so_themselves(caplog):
    cut_off()
    logging.getLogger("dspy.clients.lm").warning("LM response was truncated; increase max_tokens")
    assert len(caplog.records) == 1
