"""Endpoint models: DSPy's own client behind the gateway, against a loopback server; no credential ever shows."""

import json
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import dspy
import pytest
from dspy.clients.openai import OpenAIProvider

from copa_harness.errors import ConfigurationError, ContextOverflowError, ProviderError
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.endpoint.engine import EndpointEngine, public_url
from copa_harness.lm.factory import build_lm, meter_lm
from copa_harness.lm.gateway import Gateway

API_KEY = "sk-test-0123456789abcdef"


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server that answers `answer` and counts; `failures` are sent first."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = "[[ ## answer ## ]]\n7\n\n[[ ## completed ## ]]"
        self.failures = []
        self.bodies = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        status, reply, headers = 200, None, {}
        if self.server.failures:
            status, reply, headers = self.server.failures.pop(0)
        if reply is None:
            reply = {
                "id": "r",
                "object": "chat.completion",
                "created": 1,
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": self.server.answer},
                    }
                ],
                "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
            }
        data = json.dumps(reply).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join(5)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    # DSPy would otherwise ask the network for a fresh price list, and wait.
    monkeypatch.setattr("dspy.clients.model_metadata.model_info", lambda *args, **kwargs: PRICES)
    monkeypatch.setattr("dspy.clients.costs.model_info", lambda *args, **kwargs: PRICES)
    monkeypatch.setattr("dspy.clients.capabilities.model_info", lambda *args, **kwargs: {})
    monkeypatch.setattr("dspy.clients.execution.time.sleep", lambda seconds: None)
    for name in ("OPENAI_API_BASE", "OPENAI_BASE_URL", "HOSTED_VLLM_API_BASE", "HOSTED_VLLM_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


PRICES = {"input_cost_per_token": 0.01, "output_cost_per_token": 0.1}


@pytest.fixture
def lm(server, tmp_path):
    gateway = Gateway(cache=ResponseCache(tmp_path / "responses"))
    return build_lm("openai/gpt-4o-mini", gateway=gateway, cache_dir=tmp_path, api_base=server.url, api_key=API_KEY)


def test_a_program_runs_against_the_endpoint_and_its_rerun_asks_nothing(lm, server):
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    with open_scope("t") as scope:
        assert [program(question="3 + 4").answer for _ in range(2)] == ["7", "7"]
    usage = scope.usage()
    assert len(server.bodies) == usage.paid_calls == usage.cached_calls == 1
    assert (usage.input_tokens, usage.output_tokens) == (11, 3)
    assert usage.usd == pytest.approx(11 * 0.01 + 3 * 0.1)
    assert "litellm.main" not in sys.modules


def test_only_what_the_user_set_is_sent(lm, server):
    lm("hi")
    assert set(server.bodies[0]) <= {"model", "messages", "n", "temperature"}
    assert server.bodies[0]["temperature"] == 0.0  # a server of one's own
    lm.copy(temperature=0.5, max_tokens=9)("hi", rollout_id=3, n=2)
    assert len(server.bodies) == 3
    assert server.bodies[1]["temperature"] == 0.5
    assert "rollout_id" not in server.bodies[1]
    assert "seed" not in server.bodies[1]


def test_callbacks_and_usage_are_seen_once_by_dspy(lm):
    starts = []

    class Recorder(dspy.utils.BaseCallback):
        def on_lm_start(self, call_id, instance, inputs):
            starts.append(instance)

    with dspy.context(callbacks=[Recorder()]), dspy.track_usage() as tracker:
        lm("hi")
    assert starts == [lm]
    assert tracker.get_total_tokens()["openai/gpt-4o-mini"]["prompt_tokens"] == 11


def test_transient_errors_are_retried_by_the_gateway_and_refunded(lm, server):
    busy = (429, {"error": {"message": "slow down", "type": "rate_limit"}}, {"Retry-After": "1"})
    broken = (500, {"error": {"message": "oops"}}, {})
    server.failures = [busy, broken]
    with open_scope("t") as scope:
        assert "7" in lm("hi")[0]
    assert (scope.usage().paid_calls, scope.usage().failed_calls, len(server.bodies)) == (1, 2, 3)


def test_a_context_overflow_is_not_retried_and_is_told_apart(lm, server):
    message = "This model's maximum context length is 8 tokens. However, your messages resulted in 900 tokens."
    server.failures = [(400, {"error": {"message": message, "code": "context_length_exceeded"}}, {})]
    with pytest.raises(ContextOverflowError, match="maximum context length"):
        lm("hi")
    assert len(server.bodies) == 1


def test_an_error_that_repeats_the_key_shows_it_nowhere(lm, server):
    server.failures = [(401, {"error": {"message": f"Incorrect API key provided: {API_KEY}"}}, {})]
    with pytest.raises(ProviderError, match="Incorrect API key") as caught:
        lm("hi")
    text = "".join(traceback.format_exception(caught.value))
    assert API_KEY not in text


def test_a_url_with_a_password_and_a_signature_shows_neither(tmp_path):
    url = "http://user:hunter22@127.0.0.1:1/v1?sig=abcdef&api-version=2"
    gateway = Gateway(cache=None)
    lm = build_lm("openai/m", gateway=gateway, cache_dir=tmp_path, api_base=url, api_key=API_KEY, num_retries=0)
    with pytest.raises(ProviderError) as caught:
        lm("hi")
    seen = "".join(traceback.format_exception(caught.value)) + json.dumps(
        [lm.dump_state(), lm.engine.connection("openai/m"), lm.fingerprint]
    )
    assert not any(secret in seen for secret in ["hunter22", "abcdef", API_KEY])
    assert lm.engine.connection("openai/m")["url"] == "http://127.0.0.1:1/v1?api-version=2"


def test_nothing_secret_is_on_disk(lm, tmp_path):
    lm("hi")
    lm.gateway.cache.close()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"prompt_tokens" in written or b"input_tokens" in written
    assert API_KEY.encode() not in written


def fingerprint(model="openai/m", **kwargs):
    return EndpointEngine(dspy.LM(model, **kwargs)).fingerprint(model)


@pytest.mark.parametrize(
    "change",
    [
        {"api_base": "http://127.0.0.1:9000/v1"},
        {"api_base": "http://127.0.0.1:8000/v2"},
        {"api_base": "http://127.0.0.1:8000/v1?api-version=2"},
        {"model": "openai/n"},
        {"model_type": "responses"},
        {"engine": "litellm"},
        {"api_version": "2024-01"},
        {"extra_headers": {"X-Model-Revision": "2"}},
        {"custom_llm_provider": "together_ai"},
    ],
)
def test_another_url_model_or_connection_parameter_is_another_fingerprint(change):
    base = {"api_base": "http://127.0.0.1:8000/v1"}
    assert fingerprint(**base) != fingerprint(**{**base, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"api_key": "another"},
        {"timeout": 5},
        {"num_retries": 9},
        {"extra_headers": {"Authorization": "Bearer x", "x-api-key": "k"}},
        {"api_base": "http://me:pw@127.0.0.1:8000/v1/?sig=x"},
    ],
)
def test_who_asks_and_how_patiently_does_not_change_the_fingerprint(change):
    base = {"api_base": "http://127.0.0.1:8000/v1"}
    assert fingerprint(**base) == fingerprint(**{**base, **change})


def test_a_url_from_the_environment_is_another_endpoint(monkeypatch):
    engine = EndpointEngine(dspy.LM("openai/m"))
    public = engine.fingerprint("openai/m")
    monkeypatch.setenv("OPENAI_API_BASE", "http://127.0.0.1:8000/v1")
    assert engine.fingerprint("openai/m") != public
    monkeypatch.delenv("OPENAI_API_BASE")
    assert engine.fingerprint("openai/m") == public


def test_the_model_behind_the_same_name_on_another_url_is_asked_itself(tmp_path):
    gateway = Gateway(cache=ResponseCache(tmp_path / "responses"))
    answers = []
    for word in ["one", "other"]:
        with Server() as server:
            server.answer = word
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
            lm = build_lm("hosted_vllm/m", gateway=gateway, cache_dir=tmp_path, api_base=server.url, api_key="x")
            answers += lm("hi") + lm("hi")
            server.shutdown()
    assert answers == ["one", "one", "other", "other"]


def test_a_plain_lm_is_metered_with_its_provider_and_defaults(server):
    defaults = {"temperature": 0.3, "max_tokens": 5}
    plain = dspy.LM("openai/m", api_base=server.url, api_key=API_KEY, train_kwargs={"a": 1}, **defaults)
    lm = meter_lm(plain, gateway=Gateway(cache=None))
    assert lm.provider is plain.provider
    assert isinstance(lm.provider, OpenAIProvider)
    assert (lm.kwargs, lm.train_kwargs, lm.engine.retry_policy.n_retries) == (defaults, {"a": 1}, 3)
    lm.copy(model="openai/ft:m:1")("hi")
    assert server.bodies[0]["model"] == "ft:m:1"
    assert meter_lm(lm, gateway=Gateway(cache=None)) is lm


def test_a_program_saved_with_an_endpoint_model_loads_as_plain_dspy(lm, tmp_path):
    program = dspy.Predict("question -> answer")
    program.set_lm(lm.copy(temperature=0.25))
    program.save(tmp_path / "program.json")
    assert API_KEY not in (tmp_path / "program.json").read_text()
    loaded = dspy.Predict("question -> answer")
    loaded.load(tmp_path / "program.json")
    assert type(loaded.lm) is dspy.LM
    assert (loaded.lm.model, loaded.lm.kwargs["temperature"]) == ("openai/gpt-4o-mini", 0.25)


def test_text_completion_models_and_custom_engines_are_refused_with_the_reason():
    with pytest.raises(ConfigurationError, match="got model_type='text'"):
        EndpointEngine(dspy.LM("openai/m", model_type="text"))

    class Custom:
        def complete(self, request):
            raise AssertionError

    with pytest.raises(ConfigurationError, match=r"custom engine already; give that engine to MeteredLM"):
        meter_lm(dspy.LM("x/m", engine=Custom()), gateway=Gateway(cache=None))


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://Key:Secret@API.Example.com/v1/", "https://api.example.com/v1"),
        ("http://h/v1?api_key=1&model=m&X-Amz-Signature=2#f", "http://h/v1?model=m"),
        ("localhost:8000/v1", "//localhost:8000/v1"),
    ],
)
def test_public_url_keeps_the_address_and_drops_credentials(url, public):
    assert public_url(url) == public
