"""One model behind several addresses: requests are spread, the dead are left out, who answers otherwise is refused."""

import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from copa_harness.errors import ConfigurationError, ConnectionFailedError
from copa_harness.lm.budget.ledger import whole_run
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.endpoint import replicas, transport
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local.files import CONFIG_FILE, WEIGHTS_FILE, write_manifest
from copa_harness.lm.metered import MeteredLM
from copa_harness.lm.scripted import ScriptedEngine
from copa_harness.results import Budget
from tests.plugin import test_shared

pytestmark = pytest.mark.usefixtures("no_gateways")

networks = test_shared.networks

N = 60


@pytest.fixture
def make(tmp_path):
    def make_(*urls, name="openai/m", **kwargs):
        given = {"api_base": ",".join(urls), "api_key": "k", "num_retries": 0, "max_tokens": 20, **kwargs}
        return build_lm(name, gateway=Gateway(cache=ResponseCache(tmp_path)), cache_dir=tmp_path, **given)

    return make_


@pytest.fixture
def two(stubs):
    with stubs.StubServer(lifetime_s=600.0) as first, stubs.StubServer(lifetime_s=600.0) as second:
        yield first, second


def ask(lm, n=N, *, threads=8, meanwhile=lambda number: None):
    def one(number):
        meanwhile(number)
        return lm(f"question {number}")[0]

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(n)))


def test_requests_are_spread_and_each_is_asked_of_one_replica(make, two, stubs):
    for stub in two:
        stub.default = stubs.Reply(latency_s=0.01)
    with open_scope("t") as scope:
        assert ask(make(*(stub.url for stub in two))) == [stubs.ANSWER] * N
    counts = [len([body for body in stub.bodies if "question" in body["messages"][0]["content"]]) for stub in two]
    assert sum(counts) == N == scope.usage().paid_calls
    assert min(counts) > N // 5
    assert [stub.n_requests for stub in two] == [count + 1 for count in counts]  # the handshakes


def test_one_that_is_busy_gets_less():
    released, asked = threading.Event(), {"slow": 0, "quick": 0}

    def answer(name, messages):
        if "question" in messages[-1]["content"]:
            asked[name] += 1
            if asked["quick"] >= 30:
                released.set()
            if name == "slow":
                released.wait(120)
        return "x"

    engines = [ScriptedEngine(partial(answer, name)) for name in asked]
    engine = replicas.ReplicaEngine(engines, urls=["http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"])
    ask(MeteredLM("openai/m", engine=engine, gateway=Gateway(cache=None)), 36, threads=4)
    assert sum(asked.values()) == 36
    assert asked["slow"] <= 6


class Process:
    """A stub server in a process of its own."""

    def __init__(self):
        command = [
            sys.executable,
            Path(__file__).parents[1] / "stub_server.py",
            "--latency",
            "0.02",
            "--lifetime",
            "600",
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/v1"

    def n_requests(self):
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/count") as reply:
            return json.load(reply)["n_requests"] - 1

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        self.kill()
        self.process.stdout.close()


def test_a_replica_that_dies_is_taken_out_and_its_requests_are_paid_once(make, tmp_path, stubs):
    servers = [Process() for _ in range(3)]
    before = []

    def dies(number):
        if number == N // 3:
            before.append(servers[0].n_requests())
            servers[0].kill()

    try:
        lm = make(*(server.url for server in servers))
        with (
            whole_run(Budget(calls=N + 3), directory=tmp_path, run_id="r") as ledger,
            open_scope("t", budget=Budget(calls=N)) as scope,
        ):
            assert ask(lm, meanwhile=dies) == [stubs.ANSWER] * N
            assert ledger.spent.calls == N + 3  # each request and each handshake
        usage = scope.usage()
        assert (usage.paid_calls, usage.failed_calls, scope.failures) == (N, 0, {})
        assert 1 < before[0] < N // 2
        others = [server.n_requests() for server in servers[1:]]
        assert before[0] + sum(others) + 8 >= N + 3  # threads had asked it more before it died
        assert sum(others) >= N + 2 - before[0] - 8
        assert re.search(f"{servers[0].url} .*gone: .*(no connection|Connection reset|broke)", lm.engine.description)
    finally:
        for server in servers:
            server.close()


FAR = """
import http.server, json, threading
from stub_server import completion

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, asked = "HTTP/1.1", 0

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        Handler.asked += 1
        if Handler.asked > 1:  # all but the handshake wait for ever
            print("waiting", flush=True)
            threading.Event().wait(120)
        body = json.dumps(completion()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

print("ready", flush=True)
http.server.ThreadingHTTPServer(("10.77.0.11", 8000), Handler).serve_forever()
"""


def test_a_machine_that_is_gone_without_a_word_is_noticed_while_its_answer_is_waited_for(
    networks, make, stubs, monkeypatch
):
    short = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 2000}
    monkeypatch.setattr(transport, "_KEPT_ALIVE", short)
    monkeypatch.setattr(transport, "PROBE_S", 1.0)
    (link, enter), _ = networks
    far = subprocess.Popen(
        [*enter, sys.executable, "-c", FAR],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(stubs.__file__).parent)},
    )
    try:
        assert far.stdout.readline() == "ready\n"
        with stubs.StubServer(lifetime_s=600.0) as near, ThreadPoolExecutor(1) as pool, open_scope("t") as scope:
            answer = pool.submit(lambda: make("http://10.77.0.11:8000/v1", near.url)("hello")[0])
            assert far.stdout.readline() == "waiting\n"
            test_shared.ip("link", "set", link, "down")
            assert answer.result(60) == stubs.ANSWER
            assert (near.n_requests, scope.usage().paid_calls) == (2, 1)
    finally:
        far.kill()
        far.communicate()


def test_one_that_answers_otherwise_is_one_clear_error(make, two, stubs):
    two[1].default = stubs.Reply(body=stubs.completion("something else"))
    lm = make(*(stub.url for stub in two))
    with pytest.raises(ConfigurationError, match=r"something else.* the same model behind every --copa-api") as caught:
        ask(lm, 4, threads=1)
    assert all(stub.url in str(caught.value) for stub in two)
    assert [stub.n_requests for stub in two] == [1, 1]  # nothing else was asked, so nothing is kept


def test_one_that_does_not_know_the_model_is_found_by_its_handshake(make, two, stubs):
    two[1].default = stubs.Reply(404, body={"error": {"message": "no such model"}})
    with pytest.raises(ConfigurationError, match="got 'EngineError 404' from"):
        ask(make(*(stub.url for stub in two)), 4, threads=1)


def test_a_connection_that_a_living_replica_breaks_is_paid(make, two, stubs):
    lm = make(*(stub.url for stub in two), num_retries=1)
    ask(lm, 2, threads=1)
    two[0].replies = two[1].replies = [stubs.Reply(cut_after=9)]
    with open_scope("t") as scope:
        assert lm("again")[0] == stubs.ANSWER
    assert (scope.usage().paid_calls, scope.failures) == (2, {"connection": 1})


def test_where_all_are_gone_the_call_fails_and_one_that_comes_back_is_examined_again(make, stubs):
    with stubs.StubServer() as first, stubs.StubServer() as second:
        lm = make(first.url, second.url)
        ask(lm, 4, threads=1)
    with pytest.raises(ConnectionFailedError):
        lm("nobody")
    with stubs.StubServer(port=second.port) as again:
        assert [lm(f"back {number}")[0] for number in range(3)] == [stubs.ANSWER] * 3
        assert again.n_requests == 4
        assert lm.engine.description.count("gone") == 1
    changed = stubs.Reply(body=stubs.completion("of another model"))
    with stubs.StubServer(port=first.port, default=changed), pytest.raises(ConfigurationError, match="another model"):
        lm("somebody else")


SUITE = """
import dspy, pytest
from copa_harness import Task

@pytest.fixture
def copa_task():
    rows = [dspy.Example(question=f"q {i}", answer="7").with_inputs("question") for i in range(30)]
    return Task("t", dspy.Predict("question -> answer"), lambda e, p, trace=None: p.answer == e.answer,
                rows[:5], rows[5:10], rows[10:])

def test_it(copa_evaluate):
    assert copa_evaluate().score == 1.0
"""


def test_a_suite_is_given_several_addresses_and_told_how_often_each_was_asked(two, pytester, monkeypatch):
    pytester.makepyfile(SUITE)
    urls = [stub.url for stub in two]
    arguments = ("-p", "no:cacheprovider", "--copa-lm=openai/m", "--copa-cache-dir=cache", "--copa-threads=1")
    given = [f"--copa-api-base={url}" for url in urls]
    told = f"requests by replica, a handshake of 16 tokens before them: {urls[0]} 10, {urls[1]} 10"
    pytester.runpytest_subprocess(*arguments, *given).stdout.fnmatch_lines([told, "runs: *; 20 calls paid*"])
    assert [stub.n_requests for stub in two] == [11, 11]
    monkeypatch.setenv("COPA_API_BASE", f"{urls[0]}, {urls[1]}")
    pytester.runpytest_subprocess(*arguments).stdout.fnmatch_lines(["runs: *; 0 calls paid, 20 from the cache*"])
    assert [stub.n_requests for stub in two] == [11, 11]


def test_answers_of_one_server_are_known_when_replicas_join(make, two):
    ask(make(two[0].url), 3)
    n_before = two[0].n_requests
    lm = make(*(stub.url for stub in two))
    ask(lm, 3)
    assert (two[0].n_requests, two[1].n_requests, lm.engine.description) == (n_before, 0, None)


def test_an_adapter_is_loaded_on_each_replica_and_on_one_that_comes_back(make, stubs, tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"base")
    monkeypatch.setattr(replicas, "OUT_S", 0.0)

    def says(model, path, messages):
        return f"{model} with {Path(path, WEIGHTS_FILE).read_bytes()}" if path else model

    with stubs.VllmStub(says) as first:
        with stubs.VllmStub(says) as second:
            name = "hosted_vllm/org/toy"
            lm = make(first.url, second.url, name=name, base_weights=f"hf:{folder}")
            directory = lm.engine.lora_dir / "mine"
            directory.mkdir(parents=True)
            (directory / WEIGHTS_FILE).write_bytes(b"one")
            (directory / CONFIG_FILE).write_text('{"r": 8}')
            write_manifest(directory, base_fingerprint=lm.engine.weights_fingerprint, details={})
            lm.engine.check_training()
            tuned = lm.copy(model=lm.engine.add_lora(directory))
            served = tuned.model.removeprefix("hosted_vllm/")
            assert list(first.loaded) == list(second.loaded) == [served]
            assert set(ask(tuned, 6, threads=2)) == {f"{served} with b'one'"}
            assert min(stub.answered.count(served) for stub in (first, second)) > 1
        lm.engine.unload(tuned.model)
        assert (list(first.loaded), list(second.loaded)) == ([], [served])
        assert tuned("while one is gone")[0] == f"{served} with b'one'"
        with stubs.VllmStub(says, port=second.port) as second:
            assert {tuned(f"back {number}")[0] for number in range(4)} == {f"{served} with b'one'"}
            assert list(second.loaded) == [served]
