"""The gateway: replayed if known, bought once if not, counted either way, refunded on failure."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from dspy.lm15 import Config, Message, Request, Response, TextPart, Usage

from copa_harness.errors import BudgetExhausted, ProviderError
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.call_context import Afresh, CallContext, current_context, in_context, open_scope
from copa_harness.lm.engine import Engine
from copa_harness.lm.gateway import Gateway
from copa_harness.results import Budget


class CountingEngine(Engine):
    """Answers with the number of the call; waits for `gate` if there is one; fails the first `n_failures` times."""

    name = "counting"

    def __init__(self, *, gate=None, n_failures=0, error=ProviderError, usd=None):
        self.lock = threading.Lock()
        self.seeds = []
        self.gate = gate
        self.n_failures = n_failures
        self.error = error
        self.weights = "w1"

    def fingerprint(self, model):
        return self.weights

    def complete(self, request, *, seed):
        with self.lock:
            self.seeds.append(seed)
            number = len(self.seeds)
        if self.gate is not None:
            assert self.gate.wait(5)
        if number <= self.n_failures:
            raise self.error("no answer")
        return Response(
            id=None,
            model=request.model,
            message=Message.assistant(TextPart(str(number))),
            finish_reason="stop",
            usage=Usage(input_tokens=5, output_tokens=1),
        )


class PricedCountingEngine(CountingEngine):
    def complete_priced(self, request, *, seed):
        return self.complete(request, seed=seed), 0.25


def ask(gateway, engine, prompt="x", *, rollout_id=None, candidate=0):
    request = Request(model="m", messages=(Message.user(prompt),))
    context = replace(current_context(), rollout_id=rollout_id)
    return gateway.call(engine, request, context=context, candidate=candidate)


@pytest.fixture(params=["memory", "disk"])
def gateway(request, tmp_path):
    if request.param == "memory":
        yield Gateway(cache=None)
    else:
        cache = ResponseCache(tmp_path / "responses")
        yield Gateway(cache=cache)
        cache.close()


def test_the_same_request_is_bought_once_and_its_replay_costs_nothing(gateway):
    engine = CountingEngine()
    with open_scope("t") as scope:
        first, second = ask(gateway, engine), ask(gateway, engine)
    assert (first.message.text, second.message.text) == ("1", "1")
    assert (first.usage.input_tokens, second.usage) == (5, Usage())
    usage = scope.usage()
    assert (usage.paid_calls, usage.cached_calls, usage.input_tokens, usage.output_tokens) == (1, 1, 5, 1)


def test_rollouts_and_candidates_are_independent_and_each_is_kept(gateway):
    engine = CountingEngine()
    repeats = [(None, 0), (None, 1), (1, 0), (1, 1), (2, 0)]
    once = [ask(gateway, engine, rollout_id=r, candidate=c).message.text for r, c in repeats]
    again = [ask(gateway, engine, rollout_id=r, candidate=c).message.text for r, c in repeats]
    assert once == again == ["1", "2", "3", "4", "5"]
    assert len(set(engine.seeds)) == 5
    assert engine.seeds[0] == 0


def test_other_weights_behind_the_same_name_are_never_answered_from_the_old_ones(gateway):
    engine = CountingEngine()
    ask(gateway, engine)
    engine.weights = "w2"
    assert ask(gateway, engine).message.text == "2"
    engine.weights = "w1"
    assert ask(gateway, engine).message.text == "1"


def test_the_same_request_from_many_threads_at_once_is_paid_once(gateway):
    gate = threading.Event()
    engine = CountingEngine(gate=gate)
    with open_scope("t", budget=Budget(1)) as scope, ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(ask, gateway, engine) for _ in range(16)]
        gate.set()
        assert {future.result().message.text for future in futures} == {"1"}
    assert (scope.usage().paid_calls, scope.usage().cached_calls) == (1, 15)


def test_different_requests_are_answered_side_by_side(gateway):
    meet = threading.Barrier(8, timeout=5)

    class MeetingEngine(CountingEngine):
        def complete(self, request, *, seed):
            meet.wait()  # breaks unless all eight are inside at once
            return super().complete(request, seed=seed)

    engine = MeetingEngine()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: ask(gateway, engine, str(i)).message.text, range(8)))
    assert sorted(answers) == [str(i) for i in range(1, 9)]


def test_the_budget_counts_distinct_requests_and_then_refuses(gateway):
    engine = CountingEngine()
    with open_scope("t", budget=Budget(2)) as scope:
        for prompt in ["a", "b", "a", "b"]:
            ask(gateway, engine, prompt)
        with pytest.raises(BudgetExhausted):
            ask(gateway, engine, "c")
        ask(gateway, engine, "a")
    assert scope.exhausted
    assert len(engine.seeds) == 2


def test_a_replayed_answer_counts_against_the_budget_like_a_bought_one(gateway):
    engine = CountingEngine()
    for prompt in "abc":
        ask(gateway, engine, prompt)
    with open_scope("resumed", budget=Budget(2)) as scope:
        ask(gateway, engine, "a")
        ask(gateway, engine, "b")
        with pytest.raises(BudgetExhausted):
            ask(gateway, engine, "c")
    assert (scope.usage().paid_calls, scope.usage().cached_calls) == (0, 2)


def test_many_threads_asking_different_things_pay_exactly_the_budget(gateway):
    engine = CountingEngine()

    def work(index):
        try:
            return ask(gateway, engine, str(index)).message.text
        except BudgetExhausted:
            return None

    with open_scope("t", budget=Budget(25)) as scope, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(work, [index % 60 for index in range(180)]))
    assert len(engine.seeds) == scope.charged_calls == scope.usage().paid_calls == 25
    assert len({answer for answer in answers if answer}) == 25


@pytest.mark.parametrize("error", [ProviderError, RuntimeError, MemoryError, KeyboardInterrupt])
def test_a_failed_call_is_refunded_and_not_remembered(gateway, error):
    engine = CountingEngine(n_failures=1, error=error)
    expected = error if error in (MemoryError, KeyboardInterrupt) else ProviderError
    with open_scope("t", budget=Budget(1)) as scope:
        with pytest.raises(expected):
            ask(gateway, engine)
        assert ask(gateway, engine).message.text == "2"
    usage = scope.usage()
    assert (usage.paid_calls, usage.failed_calls) == (1, 0 if error is KeyboardInterrupt else 1)


def test_threads_waiting_for_a_call_that_fails_try_themselves(gateway):
    gate = threading.Event()
    engine = CountingEngine(gate=gate, n_failures=1)

    def work(_):
        try:
            return ask(gateway, engine).message.text
        except ProviderError:
            return "failed"

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(work, i) for i in range(4)]
        gate.set()
        assert sorted(future.result() for future in futures) == ["2", "2", "2", "failed"]
    assert len(engine.seeds) == 2


def test_an_engine_that_knows_its_price_is_billed_in_dollars(gateway):
    with open_scope("t") as scope:
        for prompt in "aab":
            ask(gateway, PricedCountingEngine(), prompt)
    assert scope.usage().usd == 0.5


def test_answers_on_disk_are_found_by_a_later_gateway(tmp_path):
    engine = CountingEngine()
    ask(Gateway(cache=ResponseCache(tmp_path)), engine)
    with open_scope("later") as scope:
        assert ask(Gateway(cache=ResponseCache(tmp_path)), engine).message.text == "1"
    assert scope.usage().paid_calls == 0


def test_an_answer_asked_for_afresh_is_paid_and_given_back_and_the_stored_one_stays(gateway):
    engine = CountingEngine()
    assert ask(gateway, engine).message.text == "1"
    afresh = Afresh(math.inf)
    with open_scope("run", budget=Budget(calls=2)) as scope, in_context(afresh=afresh):
        assert [ask(gateway, engine).message.text for _ in range(2)] == ["2", "3"]
        with pytest.raises(BudgetExhausted):
            ask(gateway, engine)
    assert scope.usage().paid_calls == 2
    assert (len(afresh.stored_s), afresh.varying) == (3, {None})
    assert ask(gateway, engine).message.text == "1"


def test_what_is_young_or_unknown_is_no_old_answer(gateway):
    engine, began = CountingEngine(), time.time()
    ask(gateway, engine)
    with in_context(afresh=Afresh(began)) as context:
        assert [ask(gateway, engine, text).message.text for text in "xyx"] == ["1", "2", "1"]
    assert not context.afresh.stored_s
    assert ask(gateway, engine, "y").message.text == "3"  # what follows from a canary is not kept either


def test_a_local_model_at_temperature_0_cannot_vary(gateway):
    engine, afresh = CountingEngine(), Afresh(math.inf)
    request = Request(model="m", messages=(Message.user("x"),), config=Config(temperature=0.0))
    for context in (CallContext(), CallContext(afresh=afresh)):
        gateway.call(engine, request, context=context)
    assert (len(afresh.stored_s), afresh.varying) == (1, set())
    assert abs(afresh.stored_s[0] - time.time()) < 60
