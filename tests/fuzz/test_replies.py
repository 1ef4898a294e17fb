"""Whatever a provider sends: an answer to the request that asked, or one error of ours; booked once, replayed for good.

An own server gives a true answer with something wrong in it (a byte, a value, a status, a header, an end too soon,
something unasked before or behind it), another one to the same question each time. After each there is a question with
a sound answer, which must come through word for word.

    FUZZ=1 pytest tests/fuzz     ten thousand replies instead of a hundred
"""

import copy
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from copa_harness.errors import BudgetExhausted, ProviderError
from copa_harness.lm.budget.ledger import whole_run
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.results import Budget

WRONG = (None, True, -1, 10**400, 0.5, "x", "", "a\ud83dz", [], [[]], {}, {"a": 1}, [1, "x"], [None] * 3)

HEADERS = (
    b"Content-Length: 3",
    b"Transfer-Encoding: chunked",
    b"Content-Encoding: gzip",
    b"Connection: close",
    b"x",
    b": ",
)

STRAY = (b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", b"\r\n", b"x" * 300)


@st.composite
def faults(draw):
    """A function from the JSON of a sound answer to the bytes that are sent."""
    kinds = st.sampled_from(["value", "left out", "byte", "cut", "status", "header", "before", "after", "word"])
    chosen = draw(st.lists(kinds, min_size=1, max_size=2))
    seed = draw(st.integers(0, 2**32))
    wrong = draw(st.sampled_from(WRONG))
    status = draw(
        st.sampled_from([100, 101, 201, 204, 206, 301, 304, 307, 400, 401, 403, 404, 408, 413, 422, 429, 500, 503])
    )
    header, stray = draw(st.sampled_from(HEADERS)), draw(st.sampled_from(STRAY))

    def spoiled(document):
        for kind in chosen:
            if kind in ("value", "left out"):
                paths = list(places(document))
                path = paths[seed % len(paths)]
                place = document
                for key in path[:-1]:
                    place = place[key]
                if kind == "value":
                    place[path[-1]] = wrong
                else:
                    del place[path[-1]]
        body = json.dumps(document).encode()
        if "word" in chosen:
            body = body.replace(
                b'"stop"', (b"NaN", b'"length"', b'"error"', b'"content_filter"', b"[" * 5000)[seed % 5]
            )
        head = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d" % (
            status if "status" in chosen else 200,
            len(body),
        )
        if "header" in chosen:
            head += b"\r\n" + header
        data = head + b"\r\n\r\n" + body
        if "byte" in chosen:
            at = seed % len(data)
            data = data[:at] + bytes([data[at] ^ (1 + seed % 255)]) + data[at + 1 :]
        if "cut" in chosen:
            data = data[: 1 + seed % len(data)]
        return (stray if "before" in chosen else b"") + data + (stray if "after" in chosen else b"")

    return spoiled


def sound(document):
    """The bytes of a sound answer."""
    body = json.dumps(document).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def places(value, path=()):
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


@pytest.fixture(scope="module")
def server(stubs):
    """A stub whose next reply is spoiled by `fault`, if there is one, and whose every answer is another one."""

    class Server(stubs.StubServer):
        fault = None

        def takes_over(self, connection, path, headers, body):
            fault, self.fault = self.fault, None
            connection.write((fault or sound)(answer_to(json.loads(body)["messages"][-1]["content"], self.n_requests)))
            if fault is not None:
                connection.transport.close()  # else each wrong length is waited for
            return True

    def answer_to(question, number):
        return copy.deepcopy(stubs.completion(f"{question} has answer <{number}>"))  # it is spoiled in place

    with Server(lifetime_s=3600) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def prices():
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        yield


def model(server, folder):
    gateway = Gateway(cache=ResponseCache(folder / "responses"))
    own = {"api_base": server.url, "api_key": "sk-test-0123456789abcdef", "num_retries": 0, "max_tokens": 50}
    return build_lm("openai/gpt-4o-mini", gateway=gateway, cache_dir=folder, timeout=5, **own)


# A forged 401 is an answer too, after which nothing else is asked: drawn at random, scripts with one are no bug.
@pytest.mark.skipif(not os.environ.get("FUZZ"), reason="at length only: make fuzz")
@settings(
    max_examples=2000 if os.environ.get("FUZZ") else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(script=st.lists(faults(), min_size=1, max_size=8))
def test_any_reply_is_an_answer_to_its_request_or_one_error_and_is_booked_once(server, script):
    with tempfile.TemporaryDirectory() as name:
        folder, answers = Path(name), {}
        began, n_free = server.n_requests, 0
        lm = model(server, folder)
        with whole_run(Budget(calls=12), directory=folder, run_id="r") as ledger, open_scope("t") as scope:
            for number, fault in enumerate(script):
                for question, spoil in ((f"spoiled {number}", fault), (f"sound {number}", None)):
                    server.fault = spoil
                    asked = server.n_requests
                    try:
                        (text,) = lm(question)
                    except BudgetExhausted:
                        assert ledger.spent.calls == 12
                        assert server.n_requests == asked
                        continue
                    except ProviderError as error:
                        assert spoil is not None, question
                        n_free += error.billed is False
                        continue
                    others = {f"{kind} {other}" for kind in ("spoiled", "sound") for other in range(8)} - {question}
                    assert not any(f"{other} has answer" in (text or "") for other in others)
                    assert spoil is not None or text == f"{question} has answer <{asked + 1}>"
                    answers[question] = text
            n_asked = server.n_requests - began
            assert ledger.reserved.calls == 0
            assert scope.usage().paid_calls == ledger.spent.calls <= n_asked <= ledger.spent.calls + n_free
        again = model(server, folder)
        for question, text in answers.items():
            assert again(question) == [text]
        assert server.n_requests == began + n_asked


def test_a_server_that_restarts_in_the_middle_of_a_run_is_waited_for_and_nothing_is_paid_twice(stubs, tmp_path):
    with stubs.StubServer() as first:
        gateway = Gateway(cache=ResponseCache(tmp_path / "responses"))
        own = {"api_base": first.url, "api_key": "sk-test-0123456789abcdef", "num_retries": 8, "max_tokens": 50}
        lm = build_lm("openai/gpt-4o-mini", gateway=gateway, cache_dir=tmp_path, **own)
        with open_scope("t") as scope:
            for number in range(5):
                lm(f"before {number}")
    down = threading.Timer(1.0, lambda: second.__enter__())
    second = stubs.StubServer(port=first.port)
    down.start()  # nobody listens until then
    try:
        began = time.monotonic()
        with open_scope("t") as after:
            for number in range(5):
                lm(f"before {number}")
                lm(f"after {number}")
        assert time.monotonic() - began > 0.5
    finally:
        down.join()
        second.__exit__()
    assert (scope.usage().paid_calls, after.usage().paid_calls, after.usage().cached_calls) == (5, 5, 5)
    assert (first.n_requests, second.n_requests) == (5, 5)
