"""What calls may cost: bounded before they are paid, settled at what was reported, refunded only if not billed."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from dspy.lm15 import BillingError as LM15BillingError
from dspy.lm15 import Config, ImagePart, Message, Request, Response, TextPart, Usage
from dspy.lm15 import RateLimitError as LM15RateLimitError
from dspy.lm15 import ServerError as LM15ServerError
from dspy.lm15 import TimeoutError as LM15TimeoutError

from copa_harness.errors import BillingError, BudgetExhausted, ConfigurationError, ProviderTimeoutError, RefusalError
from copa_harness.lm.budget.cost import Limits, prompt_tokens_from_above
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.call_context import booked_as, in_context, open_scope, time_left_s
from copa_harness.lm.engine import Engine
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.metered import MeteredLM
from copa_harness.lm.retry import RetryPolicy
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.results import Budget, Phase


class PaidEngine(Engine):
    """Answers `answers` in order (the last one again and again); 1 cent per prompt token, 10 per completion token."""

    name = "paid"

    def __init__(self, *answers, limits=None, retries=0, latency_s=0.0):
        self.answers = list(answers)
        self.n_asked = 0
        self.retry_policy = RetryPolicy(retries, first_pause_s=0.001)
        self._limits = limits or Limits(None, 0.01, 0.1)
        self.latency_s = latency_s
        self.lock = threading.Lock()

    def fingerprint(self, model):
        return "paid"

    def limits(self, model):
        return self._limits

    def complete(self, request, *, seed):
        return self.complete_priced(request, seed=seed)[0]

    def complete_priced(self, request, *, seed):
        with self.lock:
            answer = self.answers[min(self.n_asked, len(self.answers) - 1)]
            self.n_asked += 1
        time.sleep(self.latency_s)
        if isinstance(answer, Exception):
            raise answer
        usage, price = answer if isinstance(answer, tuple) else (answer, 0.0)
        message, reason = Message.assistant(TextPart("fine")), "stop"
        return Response(id=None, model=request.model, message=message, finish_reason=reason, usage=usage), price


def lm_of(engine, *, gateway=None, max_tokens=10, **kwargs):
    gateway = Gateway(cache=None) if gateway is None else gateway
    return MeteredLM("paid/model", engine=engine, gateway=gateway, max_tokens=max_tokens, **kwargs)


def ask_all(lm, n):
    for index in range(n):
        lm(f"{index:03d}")


KNOWN = (Usage(input_tokens=20, output_tokens=2), 0.4)


def test_a_token_ceiling_is_never_passed_and_what_was_not_used_is_given_back():
    engine = PaidEngine(KNOWN)
    lm = lm_of(engine)
    request = Request(model=lm.model, messages=(Message.user("000"),), config=Config(max_tokens=10))
    affordable = (1000 - prompt_tokens_from_above(request) - 10) // 22 + 1
    with open_scope("t", budget=Budget(tokens=1000, name="small")) as scope:
        with pytest.raises(BudgetExhausted, match=r"'small' of 't' is spent: \d+ of 1,000 tokens spent, .* up to \d+"):
            ask_all(lm, 200)
        assert scope.usage().tokens == 22 * affordable <= 1000
        assert engine.n_asked == affordable
        assert scope.exhausted


def test_a_dollar_ceiling_is_held_at_the_highest_price_and_settled_at_the_real_one():
    engine = PaidEngine(KNOWN, latency_s=0.002)
    lm = lm_of(engine)
    with open_scope("t", budget=Budget(usd=10.0)) as scope, ThreadPoolExecutor(8) as pool:

        def ask(index):
            with in_context(scope=scope):
                try:
                    return lm(str(index))
                except BudgetExhausted as error:
                    return error

        answers = list(pool.map(ask, range(60)))
    assert any(isinstance(answer, BudgetExhausted) for answer in answers)
    assert scope.usage().usd == pytest.approx(0.4 * engine.n_asked)
    assert 5 < scope.usage().usd <= 10.0


@pytest.mark.parametrize("budget", [Budget(tokens=1e6), Budget(usd=1e6), Budget(output_tokens=1e6)])
def test_calls_without_max_tokens_are_refused_when_their_cost_is_capped(budget):
    engine = PaidEngine(KNOWN)
    with open_scope("t", budget=budget), pytest.raises(ConfigurationError, match=r"set no max_tokens.*max_tokens=512"):
        lm_of(engine, max_tokens=None)("hi")
    assert engine.n_asked == 0


def test_the_longest_answer_known_of_a_model_stands_in_for_max_tokens():
    engine = PaidEngine(KNOWN, limits=Limits(40, 0.01, 0.1))
    lm = lm_of(engine, max_tokens=None)
    with open_scope("t", budget=Budget(output_tokens=41)):
        lm("a")
        with pytest.raises(BudgetExhausted, match="2 of 41 output tokens spent, the next call may cost up to 40"):
            lm("b")


def test_dollars_cannot_be_capped_where_no_price_is_known():
    engine = PaidEngine(KNOWN, limits=Limits(None, None, None))
    with open_scope("t", budget=Budget(usd=5)), pytest.raises(ConfigurationError, match="no price is known for 'paid"):
        lm_of(engine)("hi")
    with open_scope("t", budget=Budget(tokens=5000)):
        lm_of(engine)("hi")


def test_media_cannot_be_capped_in_tokens():
    message = Message(role="user", parts=(TextPart("what is it?"), ImagePart(url="https://example.org/cat.png")))
    with open_scope("t", budget=Budget(tokens=5000)), pytest.raises(ConfigurationError, match=r"ImagePart.* of calls"):
        lm_of(PaidEngine(KNOWN))(Request(model="paid/model", messages=(message,), config=Config(max_tokens=9)))


@pytest.mark.parametrize("usage", [Usage(), Usage(input_tokens=0, output_tokens=0), Usage(input_tokens=20)])
def test_unknown_usage_counts_as_the_worst_case_and_is_said(usage):
    lm = lm_of(PaidEngine((usage, None)))
    with open_scope("t", budget=Budget(usd=100.0)) as scope:
        lm("hi")
    spent = scope.usage()
    assert (spent.estimated_calls, spent.output_tokens) == (1, 10)
    assert spent.usd == scope._account.spent.usd > 2.0


def test_an_unknown_price_without_a_cap_is_said():
    with open_scope("t") as scope:
        lm_of(PaidEngine((Usage(input_tokens=1, output_tokens=1), None)))("hi")
    assert (scope.usage().unpriced_calls, scope.usage().usd) == (1, 0.0)


def test_a_failed_call_is_refunded():
    lm = lm_of(PaidEngine(LM15BillingError("no credit"), KNOWN))
    with open_scope("t", budget=Budget(tokens=400)) as scope:
        with pytest.raises(BillingError, match="no credit"):
            lm("hi")
        assert scope._account.spent.output_tokens == 0
        assert scope.failures == {"billing": 1}
        assert "no credit" in scope.first_failures["billing"]
        lm_of(PaidEngine(KNOWN))("hi")
    assert (scope.usage().paid_calls, scope.usage().failed_calls) == (1, 1)


def test_a_timeout_may_have_been_billed_and_counts_as_the_worst_case():
    lm = lm_of(PaidEngine(LM15TimeoutError("too slow"), KNOWN, retries=1))
    with open_scope("t", budget=Budget(calls=2, usd=100.0)) as scope:
        lm("hi")
    spent = scope.usage()
    assert (spent.paid_calls, spent.failed_calls, spent.estimated_calls) == (2, 1, 1)
    assert spent.usd > 0.4 + 1.0
    assert scope.charged_calls == 2
    with open_scope("t", budget=Budget(calls=1)), pytest.raises(BudgetExhausted):
        lm_of(PaidEngine(LM15TimeoutError("too slow"), KNOWN, retries=1))("hi")


def test_transient_failures_are_retried_and_counted_by_kind():
    slow, broken = LM15RateLimitError("slow"), LM15ServerError("oops")
    engine = PaidEngine(slow, broken, slow, KNOWN, retries=2)
    with open_scope("t", budget=Budget(calls=1)) as scope:
        lm_of(engine)("hi")
    assert scope.failures == {"rate limit": 2, "server error": 1}
    assert (scope.usage().paid_calls, scope.usage().failed_calls) == (1, 3)


def test_a_failure_that_stays_is_raised_after_the_last_retry():
    engine = PaidEngine(LM15TimeoutError("too slow"), retries=2)
    with open_scope("t") as scope, pytest.raises(ProviderTimeoutError):
        lm_of(engine)("hi")
    assert engine.n_asked == scope.failures["timeout"] == 3


def test_a_resumed_run_is_charged_what_its_answers_cost_when_they_were_bought(tmp_path):
    spent, bought = [], []
    for _ in range(2):
        engine = PaidEngine(KNOWN)
        lm = lm_of(engine, gateway=Gateway(cache=ResponseCache(tmp_path)))
        with open_scope("t", budget=Budget(usd=5.0)) as scope:
            with pytest.raises(BudgetExhausted):
                ask_all(lm, 50)
            spent.append((scope._account.spent.usd, scope.charged_calls))
        bought.append(scope.usage().usd)
        assert engine.n_asked == scope.usage().paid_calls
    assert spent[0] == spent[1]
    assert bought[1] == 0.0


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test says so."""
    now = [100.0]
    monkeypatch.setattr("copa_harness.lm.budget.scope.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_an_engine_is_told_how_many_seconds_the_budget_leaves(clock):
    told = []
    lm = ScriptedLM(lambda messages: told.append(time_left_s()) or "x")
    with open_scope("t", budget=Budget(seconds=30)):
        clock[0] += 1
        lm("a")
    assert told == [29]


def test_seconds_over_buy_nothing_more_but_replay(clock):
    lm = ScriptedLM("x")
    with open_scope("t", budget=Budget(seconds=0.05)) as scope:
        lm("a")
        clock[0] += 0.06
        with pytest.raises(BudgetExhausted, match=r"its 0\.05 seconds are over"):
            lm("b")
        lm("a")
    assert scope.usage().cached_calls == 1


def test_training_steps_can_be_held_before_they_are_trained():
    from copa_harness.lm.budget.cost import Cost

    with open_scope("t", budget=Budget(train_steps=100)) as scope:
        scope.reserve(Cost(train_steps=80)).settle(Cost(train_steps=60))
        with pytest.raises(BudgetExhausted, match="60 of 100 train steps spent, the next call may cost up to 41"):
            scope.reserve(Cost(train_steps=41))


def test_calls_hidden_in_a_metric_are_booked_apart():
    lm = ScriptedLM("x")
    with open_scope("t") as scope, scope.phase(Phase.SEARCH):
        lm("a")
        with booked_as(Phase.METRIC):
            lm("b")
            lm("c")
    usages = scope.phase_usages()
    assert (usages["search"].paid_calls, usages["metric"].paid_calls) == (1, 2)


def test_a_refusal_is_an_error_of_its_own_paid_once(tmp_path):
    from dspy.lm15 import RefusalPart

    class Refusing(PaidEngine):
        def complete_priced(self, request, *, seed):
            self.n_asked += 1
            message = Message.assistant(RefusalPart("I cannot help with that"))
            return Response(None, request.model, message, "stop", Usage(input_tokens=5, output_tokens=5)), 0.1

    engine = Refusing()
    lm = lm_of(engine, gateway=Gateway(cache=ResponseCache(tmp_path)))
    with open_scope("t") as scope:
        for _ in range(2):
            with pytest.raises(RefusalError, match=r"refused to answer .*I cannot help with that"):
                lm("hi")
    assert engine.n_asked == scope.usage().paid_calls == 1
    assert scope.failures == {"refusal": 2}
