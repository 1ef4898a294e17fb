"""The pooled engine against a server that misbehaves: every bad answer becomes one clear, typed error or a retry."""

import json
import socket
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest

from copa_harness.errors import (
    AuthenticationError,
    BillingError,
    BudgetExhausted,
    ConnectionFailedError,
    ContextOverflowError,
    MalformedAnswerError,
    ProviderError,
    ProviderTimeoutError,
    RateLimitError,
    RefusalError,
    ServerFailureError,
)
from copa_harness.evaluate.runner import evaluate
from copa_harness.lm.budget.ledger import whole_run
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.call_context import in_context, open_scope
from copa_harness.lm.dspy_internals import SWITCH
from copa_harness.lm.endpoint.engine import HttpEngine
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.retry import AdaptiveConcurrency
from copa_harness.results import Budget

API_KEY = "sk-test-0123456789abcdef"

pytestmark = pytest.mark.usefixtures("no_gateways")


@pytest.fixture
def make(stub, tmp_path):
    def make_(spec="openai/gpt-4o-mini", **kwargs):
        gateway = Gateway(cache=ResponseCache(tmp_path / "responses"))
        defaults = {"api_base": stub.url, "api_key": API_KEY, "num_retries": 0, "max_tokens": 50}
        return build_lm(spec, gateway=gateway, cache_dir=tmp_path, **{**defaults, **kwargs})

    return make_


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Pauses of a hundredth."""
    real = time.sleep
    monkeypatch.setattr("copa_harness.lm.gateway.time.sleep", lambda seconds: real(seconds / 100))


@pytest.mark.parametrize("fast_path", ["1", "0"])
def test_a_program_runs_through_the_pool_and_sends_what_dspy_would(make, stub, stubs, fast_path, monkeypatch):
    monkeypatch.setenv(SWITCH, fast_path)
    program = dspy.Predict("question -> answer")
    lm = make(temperature=0.3, stop=["END"])
    program.set_lm(lm)
    assert isinstance(lm.engine, HttpEngine)
    with open_scope("t") as scope:
        assert program(question="3 + 4").answer == "7"
    assert scope.usage().usd == pytest.approx(11 * 1.5e-7 + 3 * 6e-7)
    path, headers, body = stub.requests[0]
    assert (path, headers["authorization"]) == ("/v1/chat/completions", f"Bearer {API_KEY}")
    plain = dspy.LM(
        "openai/gpt-4o-mini", api_base=stub.url, api_key="k", cache=False, max_tokens=50, temperature=0.3, stop=["END"]
    )
    with dspy.context(lm=plain):
        dspy.Predict("question -> answer")(question="3 + 4")
    assert json.loads(body) == stub.bodies[1]


@pytest.mark.parametrize(
    ("spec", "path"),
    [("hosted_vllm/org/model", "/v1/chat/completions"), ("ollama_chat/llama3", "/v1/chat/completions")],
)
def test_other_openai_compatible_providers_go_through_the_pool_too(make, stub, spec, path):
    lm = make(spec)
    assert "7" in lm("hi")[0]
    assert lm.engine._route(spec) is not None
    assert stub.requests[0][0] == path


def test_providers_only_litellm_knows_and_gateways_of_the_environment_are_left_to_dspy(make, monkeypatch):
    assert make("together_ai/a/b").engine._route("together_ai/a/b") is None
    assert make(headers={"X-Team": "a"}).engine._route("openai/gpt-4o-mini") is None
    engine = make("openai/m", api_base=None).engine
    assert engine._route("openai/m") is not None
    monkeypatch.setenv("OPENAI_API_BASE", "http://127.0.0.1:9/v1")
    assert engine._route("openai/m") is None


ERROR = {"error": {"message": "no good"}}


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        ({"status": 401, "body": ERROR}, AuthenticationError, "no good"),
        ({"status": 402, "body": ERROR}, BillingError, "no good"),
        (
            {"status": 429, "body": {"error": {"message": "no quota", "code": "insufficient_quota"}}},
            BillingError,
            "no quota",
        ),
        ({"status": 429, "body": ERROR, "headers": {"Retry-After": "3"}}, RateLimitError, "no good"),
        ({"status": 500, "body": ERROR}, ServerFailureError, "no good"),
        ({"status": 503, "body": b"<html>down</html>"}, ServerFailureError, "down"),
        (
            {"status": 400, "body": {"error": {"message": "too long", "code": "context_length_exceeded"}}},
            ContextOverflowError,
            "too long",
        ),
        ({"status": 404, "body": ERROR}, ProviderError, "no good"),
        ({"status": 302, "headers": {"Location": "http://127.0.0.1:9/"}, "body": b""}, ProviderError, "302"),
        ({"body": b'{"choices": [{"mess'}, MalformedAnswerError, "not JSON"),
        ({"body": b"<html>welcome</html>"}, MalformedAnswerError, "not JSON"),
        ({"body": {"hello": 1}}, MalformedAnswerError, "openai/gpt-4o-mini"),
        ({"body": {"choices": []}}, MalformedAnswerError, "openai/gpt-4o-mini"),
        ({"body": [1, 2]}, MalformedAnswerError, "openai/gpt-4o-mini"),
        ({"cut_after": 20}, ConnectionFailedError, "connection broke before the answer was complete"),
        ({"cut_after": 0, "headers": {"Content-Length": "x"}}, ConnectionFailedError, "connection broke"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_every_bad_answer_is_an_error_of_its_kind_that_says_what_came(make, stub, stubs, reply, kind, message):
    stub.replies = [stubs.Reply(**reply)]
    with open_scope("t") as scope, pytest.raises(kind, match=message) as caught:
        make()("hi")
    assert scope.failures == {caught.value.kind: 1}
    assert API_KEY not in str(caught.value) + scope.first_failures[caught.value.kind]
    assert stub.n_requests == 1


def test_a_hang_ends_at_the_timeout_with_a_remedy(make, stub, stubs):
    stub.replies = [stubs.Reply(hang=True)]
    with pytest.raises(ProviderTimeoutError, match=r"no complete answer within 0\.2 s.*timeout="):
        make(timeout=0.2)("hi")


def test_a_slow_drip_does_not_keep_a_call_alive(make, stub, stubs):
    stub.replies = [stubs.Reply(drip_s=0.02)]  # seconds for the whole answer, never a long pause
    with pytest.raises(ProviderTimeoutError, match=r"within 0\.3 s"):
        make(timeout=0.3)("hi")


def test_the_seconds_of_a_budget_end_a_call_that_hangs(make, stub, stubs):
    stub.replies = [stubs.Reply(hang=True)]
    lm = make(num_retries=3)
    with open_scope("t", budget=Budget(seconds=1.5)), pytest.raises(ProviderTimeoutError, match=r"within [01]\.\d+ s"):
        lm("hi")
    assert stub.n_requests == 1


def test_nobody_listening_is_an_unbilled_connection_failure(make, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lm = make(api_base=f"http://127.0.0.1:{port}/v1")
    with open_scope("t", budget=Budget(calls=1)) as scope, pytest.raises(ConnectionFailedError, match="no connection"):
        lm("hi")
    assert (scope.usage().paid_calls, scope.usage().failed_calls, scope.charged_calls) == (0, 1, 0)


def test_an_answer_cut_off_may_have_been_billed(make, stub, stubs):
    stub.replies = [stubs.Reply(cut_after=20)]
    with open_scope("t", budget=Budget(tokens=2000)) as scope, pytest.raises(ConnectionFailedError):
        make()("hi")
    assert (scope.usage().paid_calls, scope.usage().estimated_calls, scope.usage().output_tokens) == (1, 1, 50)


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": -5, "completion_tokens": 3},
        {"prompt_tokens": "many", "completion_tokens": 3},
        {"prompt_tokens": 1.5, "completion_tokens": None},
        {"prompt_tokens": 0, "completion_tokens": 0},
        None,
    ],
)
def test_wrong_usage_numbers_cost_the_worst_case_and_not_the_answer(make, stub, stubs, usage):
    stub.replies = [stubs.Reply(body=stubs.completion(usage=usage))]
    with open_scope("t", budget=Budget(tokens=2000)) as scope:
        assert "7" in make()("hi")[0]
    spent = scope.usage()
    assert (spent.paid_calls, spent.estimated_calls) == (1, 1)
    assert spent.input_tokens > 100 or spent.output_tokens == 50


def test_transient_failures_are_retried_and_retry_after_is_respected(make, stub, stubs, monkeypatch):
    pauses = []
    monkeypatch.setattr("copa_harness.lm.gateway.time.sleep", pauses.append)
    monkeypatch.setattr(AdaptiveConcurrency, "_shrink", lambda *args: None)
    stub.replies = [
        stubs.Reply(429, {"Retry-After": "7"}, ERROR),
        stubs.Reply(500, body=ERROR),
        stubs.Reply(cut_after=3),
        stubs.Reply(body=b"{"),
    ]
    with open_scope("t") as scope:
        assert "7" in make(num_retries=3)("hi")[0]
    assert 7 <= pauses[0] < 8
    assert all(low <= pause <= 2 * low for low, pause in zip([0.5, 1.0, 2.0], pauses[1:], strict=True))
    assert scope.failures == {"rate limit": 1, "server error": 1, "connection": 1, "malformed answer": 1}


def test_a_provider_that_asks_for_more_patience_than_there_is_is_given_up(make, stub, stubs):
    stub.replies = [stubs.Reply(429, {"Retry-After": "3600"}, ERROR)]
    with pytest.raises(RateLimitError) as caught:
        make(num_retries=3)("hi")
    assert caught.value.retry_after == 3600
    assert stub.n_requests == 1


def test_a_signed_url_keeps_its_query_behind_the_path_and_out_of_sight(make, stub, stubs, tmp_path):
    url = f"{stub.url}?sig=SIGNATURE-a1b2c3&token=TICKET-a1b2c3&api-version=2"
    assert "7" in make(api_base=url)("hi")[0]
    assert stub.requests[0][0] == "/v1/chat/completions?sig=SIGNATURE-a1b2c3&token=TICKET-a1b2c3&api-version=2"
    stub.replies = [stubs.Reply(404, body={"error": {"message": f"nothing at {stub.requests[0][0]}"}})]
    with open_scope("t") as scope, pytest.raises(ProviderError) as caught:
        make(api_base=url)("hello")
    said = str(caught.value) + repr(scope.first_failures) + "".join(traceback.format_exception(caught.value))
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "sig=***&token=***&api-version=2" in said
    assert "a1b2c3" not in said
    assert b"a1b2c3" not in stored


def test_a_key_from_the_environment_is_concealed_whatever_it_looks_like(make, stub, stubs, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "plain words 77")
    stub.replies = [stubs.Reply(401, body={"error": {"message": "Incorrect API key provided: plain words 77."}})]
    with open_scope("t") as scope, pytest.raises(AuthenticationError, match=r"provided: \*\*\*\.") as caught:
        make(api_key=None)("hi")
    assert "words 77" not in repr(scope.first_failures) + "".join(traceback.format_exception(caught.value))


def test_a_refusal_is_told_apart_and_paid_once(make, stub, stubs):
    stub.replies = [stubs.Reply(body=stubs.completion(None, refusal="I cannot help"))]
    lm = make()
    for _ in range(2):
        with pytest.raises(RefusalError, match="I cannot help"):
            lm("hi")
    assert stub.n_requests == 1


def test_a_server_that_ends_connections_without_saying_so_is_asked_and_paid_once_each(make, stub):
    stub.answers_per_connection = 1
    lm = make()
    with open_scope("t", budget=Budget(calls=16)) as scope:
        assert all("7" in lm(f"question {index}")[0] for index in range(16))
    assert (stub.n_requests, scope.usage().paid_calls, scope.usage().failed_calls) == (16, 16, 0)


@pytest.mark.parametrize("place", ["before", "after"])
def test_an_answer_nobody_asked_for_goes_to_no_request_and_is_not_kept(make, stub, stubs, place):
    def said(index):
        return json.dumps(stubs.completion(f"answer {index}")).encode()

    def reply(index):
        if place == "before":
            return stubs.Reply(body=said(index), before=b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
        stray = said("nobody asked for")
        return stubs.Reply(body=said(index), after=b"HTTP/1.1 200 X\r\nContent-Length: %d\r\n\r\n" % len(stray) + stray)

    stub.replies = [reply(index) for index in range(8)]
    lm = make()
    for _ in range(2):  # bought, and replayed
        assert [lm(f"question {index}")[0] for index in range(8)] == [f"answer {index}" for index in range(8)]
    assert stub.n_requests == 8


def test_many_threads_share_the_pool_and_more_are_under_way_at_once(make, stub, stubs):
    stub.default = stubs.Reply(latency_s=0.03)
    lm = make()
    with ThreadPoolExecutor(48) as pool:
        answers = list(pool.map(lambda index: lm(str(index))[0], range(300)))
    assert len(answers) == stub.n_requests == 300
    assert lm.engine.concurrency.limit > 48
    assert stub.most_under_way > 20
    assert stub.n_connections <= 48


def test_concurrency_backs_off_from_a_provider_that_bears_less(make, stub, stubs):
    stub.default = stubs.Reply(latency_s=0.01)
    stub.refuse_above = 4
    lm = make(num_retries=3)
    with open_scope("t") as scope, ThreadPoolExecutor(32) as pool:

        def ask(index):
            with in_context(scope=scope):
                return lm(str(index))[0]

        assert len(list(pool.map(ask, range(200)))) == 200
    assert scope.usage().paid_calls == 200
    assert lm.engine.concurrency.limit <= 16
    assert scope.failures["rate limit"] < 200


def test_the_ceiling_holds_against_a_server_with_many_threads(make, stub, stubs):
    stub.default = stubs.Reply(latency_s=0.005)
    lm = make()
    with open_scope("t", budget=Budget(usd=3e-3)) as scope, ThreadPoolExecutor(32) as pool:

        def ask(index):
            with in_context(scope=scope):
                try:
                    return bool(lm(f"{index:04d}"))
                except BudgetExhausted:
                    return False

        bought = sum(pool.map(ask, range(900)))
    assert bought == stub.n_requests == scope.usage().paid_calls < 900
    assert 2.7e-3 < scope.usage().usd <= 3e-3


# -- whatever happens after a request left is paid


def answered(stubs, *, choices=None, usage=None, **choice):
    """The body of an answer whose only choice has these parts, or with these choices."""
    body = stubs.completion(usage=usage or stubs.USAGE)
    body["choices"][0] |= choice
    return body if choices is None else {**body, "choices": body["choices"] * choices}


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize("fast_path", ["1", "0"])
@pytest.mark.parametrize(
    "body",
    [
        lambda stubs: answered(stubs, choices=2),
        lambda stubs: b"[" * 100_000,
        lambda stubs: b'{"choices":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        lambda stubs: {"error": {"message": "the upstream is busy", "code": 429}},
    ],
    ids=["several choices", "deeply nested", "deeply nested choices", "an error told as a success"],
)
def test_what_cannot_be_read_is_paid_and_stays_under_the_ceiling(make, stub, stubs, body, fast_path, monkeypatch):
    monkeypatch.setenv(SWITCH, fast_path)
    stub.default = stubs.Reply(body=body(stubs))
    lm = make()
    with open_scope("t", budget=Budget(calls=5)) as scope:
        for index in range(16):
            with pytest.raises((dspy.utils.exceptions.LMError, BudgetExhausted)):
                lm(f"question {index}")
    assert stub.n_requests == scope.usage().paid_calls == scope.usage().failed_calls == scope.charged_calls == 5


def test_several_choices_are_a_malformed_answer_and_asked_for_once_a_try(make, stub, stubs):
    stub.replies = [stubs.Reply(body=answered(stubs, choices=2))]
    with open_scope("t") as scope:
        assert "7" in make(num_retries=1)("hi")[0]
    assert (stub.n_requests, scope.usage().paid_calls, scope.failures) == (2, 2, {"malformed answer": 1})


# -- what is no answer becomes no score


@pytest.mark.parametrize("fast_path", ["1", "0"])
@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (lambda stubs: answered(stubs, choices=0), MalformedAnswerError, "no choices"),
        (lambda stubs: answered(stubs, message=said(None)), MalformedAnswerError, "no text"),
        (lambda stubs: answered(stubs, message={"role": "assistant"}), MalformedAnswerError, "no text"),
        (
            lambda stubs: answered(stubs, message=said(None, reasoning_content="well, seven")),
            MalformedAnswerError,
            "no text",
        ),
        (
            lambda stubs: answered(
                stubs, message=said(""), finish_reason="error", error={"code": 502, "message": "upstream died"}
            ),
            ServerFailureError,
            "upstream died",
        ),
        (
            lambda stubs: answered(stubs, message=said("[[ ## ans"), finish_reason="error"),
            ServerFailureError,
            "broke off",
        ),
        (
            lambda stubs: answered(stubs, message=said("", reasoning_content="well"), finish_reason="length"),
            ProviderError,
            "ceiling of 50 tokens before it began",
        ),
        (
            lambda stubs: answered(stubs, message=said(None), finish_reason="length"),
            ProviderError,
            "--copa-answer-tokens",
        ),
    ],
    ids=[
        "no choices",
        "null",
        "no content",
        "only thoughts",
        "error in a choice",
        "broken off",
        "length",
        "length, null",
    ],
)
def test_what_is_no_answer_is_an_error_paid_and_not_kept(
    make, stub, stubs, body, kind, message, fast_path, monkeypatch
):
    monkeypatch.setenv(SWITCH, fast_path)
    stub.replies = [stubs.Reply(body=body(stubs))]
    with open_scope("t") as scope, pytest.raises(kind, match=message):
        make()("hi")
    assert (scope.usage().paid_calls, scope.usage().failed_calls) == (1, 1)
    assert "7" in make()("hi")[0]  # asked anew: nothing was stored
    assert stub.n_requests == 2


@pytest.mark.parametrize("fast_path", ["1", "0"])
def test_a_model_that_says_nothing_has_answered(make, stub, stubs, fast_path, monkeypatch):
    monkeypatch.setenv(SWITCH, fast_path)
    stub.default = stubs.Reply(body=answered(stubs, message=said("")))
    assert [make()("hi")[0] for _ in range(2)] == ["", ""]
    assert stub.n_requests == 1


def test_a_call_of_a_tool_needs_no_text(make, stub, stubs):
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    stub.replies = [
        stubs.Reply(body=answered(stubs, message=said(None, tool_calls=[call]), finish_reason="tool_calls"))
    ]
    assert make()("hi")[0]["tool_calls"]


def test_an_evaluation_with_such_answers_has_no_zeros(make, stub, stubs):
    examples = [dspy.Example(question=str(index), answer="7").with_inputs("question") for index in range(4)]
    stub.replies = [stubs.Reply(body=answered(stubs, choices=0))]
    result = evaluate(
        dspy.Predict("question -> answer"),
        examples,
        metric=lambda example, prediction: example.answer == prediction.answer,
        split="test",
        lm=make(),
        threads=1,
    )
    assert (result.score, result.n_failed, result.n_unparsed) == (1.0, 1, 0)


@pytest.mark.parametrize("fast_path", ["1", "0"])
def test_token_counts_no_model_can_have_cost_the_worst_case_and_not_the_answer(
    make, stub, stubs, tmp_path, fast_path, monkeypatch
):
    monkeypatch.setenv(SWITCH, fast_path)
    usage = {"prompt_tokens": 10**20, "completion_tokens": 3, "total_tokens": 10**20 + 3}
    stub.default = stubs.Reply(body=stubs.completion(usage=usage))
    budget = Budget(usd=1.0, calls=50)
    with whole_run(budget, directory=tmp_path, run_id="r") as ledger, open_scope("t", budget=Budget(usd=1.0)) as scope:
        assert ["7" in make()(f"question {index}")[0] for index in range(3)] == [True] * 3
        assert ledger.spent.calls == 3
    assert (scope.usage().paid_calls, scope.usage().estimated_calls, stub.n_requests) == (3, 3, 3)
    assert scope.usage().usd < 0.01
    with open_scope("again", budget=Budget(usd=1.0)) as scope:
        assert "7" in make()("question 1")[0]
    assert stub.n_requests == 3


# -- secrets


def shown(caught, scope):
    return str(caught.value) + repr(scope.first_failures) + "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "echo",
    [
        "x" * 185 + "KEY and more",  # cut in its middle, were it cut first
        "the key KEY1 " + "y" * 300,
        "authorization=Basic%20KEY",
        "ending in TAIL",
        "beginning with HEAD...",
    ],
)
def test_echoes_of_a_key_are_masked_before_anything_is_cut(make, stub, stubs, echo, monkeypatch):
    key = "plain/words+77 of a secret&key"
    quoted = "plain%2Fwords%2B77%20of%20a%20secret%26key"
    text = echo.replace("KEY", quoted if "%20" in echo else key).replace("TAIL", key[-14:]).replace("HEAD", key[:14])
    for status, body in ((200, text.encode()), (401, json.dumps({"error": {"message": text}}).encode())):
        stub.replies = [stubs.Reply(status, body=body)]
        with open_scope("t") as scope, pytest.raises(ProviderError) as caught:
            make(api_key=key)(f"hi {status}")
        seen = shown(caught, scope)
        assert not [seen for start in range(len(key) - 9) if key[start : start + 10] in seen]
        assert not [seen for start in range(len(quoted) - 11) if quoted[start : start + 12] in seen]
        assert "***" in seen


def test_a_key_that_an_answer_repeats_is_neither_kept_nor_shown(make, stub, stubs, tmp_path):
    stub.default = stubs.Reply(body=stubs.completion(f"you are Bearer {API_KEY}, are you not?"))
    assert [make()("hi")[0] for _ in range(2)] == ["you are Bearer ***, are you not?"] * 2
    assert stub.n_requests == 1
    assert API_KEY.encode() not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_refusal_that_repeats_a_key_is_masked_before_it_is_cut(make, stub, stubs):
    text = "I will not, " + "x" * 275 + API_KEY
    stub.default = stubs.Reply(body=stubs.completion(None, refusal=text))
    with open_scope("t") as scope, pytest.raises(RefusalError) as caught:
        make()("hi")
    assert API_KEY[:10] not in shown(caught, scope)


# -- where a prompt goes


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize(("fast_path", "engine"), [("1", "auto"), ("0", "auto"), ("1", "litellm")])
def test_no_client_takes_a_prompt_where_a_server_points(make, stub, stubs, status, fast_path, engine, monkeypatch):
    monkeypatch.setenv(SWITCH, fast_path)
    with stubs.StubServer() as elsewhere:
        stub.default = stubs.Reply(status, headers={"Location": f"{elsewhere.url}/chat/completions"}, body=b"")
        with open_scope("t") as scope, pytest.raises(ProviderError):
            make(engine=engine)("hi")
    assert (stub.n_requests, elsewhere.n_requests) == (1, 0)
    assert scope.usage().paid_calls == 0


# -- a provider that lets nobody in


def evaluated(lm, n=100):
    examples = [dspy.Example(question=f"number {index}", answer="7").with_inputs("question") for index in range(n)]
    program = dspy.Predict("question -> answer")
    return evaluate(program, examples, metric=lambda e, p: e.answer == p.answer, split="test", lm=lm, threads=32)


@pytest.mark.parametrize("status", [401, 402])
def test_a_provider_that_lets_nobody_in_is_asked_no_more(make, stub, stubs, status):
    stub.default = stubs.Reply(status, body={"error": {"message": "go away"}}, latency_s=0.05)
    with open_scope("t") as scope, pytest.raises(ProviderError, match=r"any of the 100 examples.*go away"):
        evaluated(make())
    n_asked = AdaptiveConcurrency().limit
    assert stub.n_requests <= n_asked
    assert scope.usage().failed_calls == stub.n_requests
    assert scope.charged_calls == 0
    stub.default = stubs.Reply()
    with open_scope("mended"):
        assert evaluated(make()).score == 1.0


def test_a_prompt_that_is_refused_stops_no_other(make, stub, stubs):
    stub.replies = [stubs.Reply(403, body={"error": {"message": "flagged"}})]
    with open_scope("t"):
        assert evaluated(make()).n_failed == 1
    assert stub.n_requests == 100


def test_stored_answers_are_replayed_where_nobody_is_let_in_and_a_key_that_worked_is_tried_on(make, stub, stubs):
    lm = make()
    with open_scope("paid"):
        evaluated(lm, 50)
    stub.default = stubs.Reply(401, body={"error": {"message": "go away"}}, latency_s=0.05)
    with open_scope("t"):
        result = evaluated(lm)
    assert (result.score, result.n_failed) == (1.0, 50)
    assert stub.n_requests < 100
    stub.replies = [stubs.Reply()]
    stub.default = stubs.Reply(401, body={"error": {"message": "go away"}}, latency_s=0.2)
    before = stub.n_requests
    with open_scope("late"):
        assert evaluated(lm).n_failed == 49
    assert stub.n_requests - before == 50
