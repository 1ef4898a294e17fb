"""What a caller of a local model can ask for beyond text, and what happens when he asks for too much or goes away."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest
from dspy.lm15 import Config, Message, Request

from copa_harness.errors import ConfigurationError, OutOfMemoryError, ProviderTimeoutError
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.call_context import CallContext, calling, open_scope
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.local.llama import LlamaDecoder
from copa_harness.testing.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("serving") / "tiny", seed=11)


@pytest.fixture
def engine(folder, tmp_path):
    return TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path)


@pytest.fixture
def lm(folder, tmp_path):
    gateway = Gateway(cache=ResponseCache(tmp_path / "cache"))
    return build_lm(f"hf:{folder}", gateway=gateway, cache_dir=tmp_path, max_tokens=8)


def request(text="zebra", **config):
    return Request(model="hf:tiny", messages=(Message.user(text),), config=Config(**{"max_tokens": 6, **config}))


@pytest.mark.parametrize("cascades", [True, False])
def test_log_probabilities_are_those_of_a_plain_forward(cascades, engine):
    import torch

    engine.generator.cascades = cascades
    with ThreadPoolExecutor(5) as pool:
        asked = [request("zebra " * n, logprobs=2 if n != 3 else None) for n in range(1, 6)]
        answers = list(pool.map(lambda one: engine.complete(one, seed=0), asked))
    engine.generator.cascades = True
    assert answers[2].logprobs is None
    got = answers[1]
    ids = list(engine.chat.prompt([{"role": "user", "content": "zebra " * 2}]).ids)
    for token in got.logprobs:
        with torch.inference_mode():
            expected = engine.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-4)
        assert [top.logprob for top in token.top] == pytest.approx(expected.topk(2).values.tolist(), abs=1e-4)
        ids.append(token.token_id)
    assert len(got.logprobs) == got.usage.output_tokens


def test_log_probabilities_reach_a_dspy_prediction_and_its_replay(lm):
    text = lm("zebra", logprobs=True)[0]
    assert len(text["logprobs"]["content"]) == 8
    with open_scope("again") as scope:
        assert lm("zebra", logprobs=True)[0] == text
    assert scope.usage().paid_calls == 0


def test_candidates_of_one_call_are_independent_cached_and_keep_their_places(lm):
    with open_scope("first") as scope:
        five = lm("question zebra", n=5, temperature=1.5)
    assert scope.usage().paid_calls == 5
    assert len(set(five)) > 1
    with open_scope("again") as scope:
        assert lm("question zebra", n=5, temperature=1.5) == five
        assert lm("question zebra", n=2, temperature=1.5) == five[:2]
    assert scope.usage().paid_calls == 0


def test_an_answer_that_takes_longer_than_the_budget_leaves_is_given_up_and_the_engine_goes_on(engine, monkeypatch):
    read = LlamaDecoder.read

    def slow(*args, **kwargs):
        time.sleep(0.05)
        return read(*args, **kwargs)

    monkeypatch.setattr(LlamaDecoder, "read", slow)
    with calling(CallContext(time_left_s=0.08)), pytest.raises(ProviderTimeoutError, match="seconds"):
        engine.complete(request(max_tokens=200), seed=0)
    monkeypatch.undo()
    assert engine.complete(request(), seed=0).usage.output_tokens == 6


def test_a_request_whose_caller_is_gone_is_dropped_from_the_queue(engine, monkeypatch):
    entered, release = threading.Event(), threading.Event()
    read = LlamaDecoder.read

    def gated(*args, **kwargs):
        entered.set()
        release.wait(10)
        return read(*args, **kwargs)

    generator = engine.generator
    monkeypatch.setattr(LlamaDecoder, "read", gated)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(engine.complete, request("first"), seed=0)
        assert entered.wait(10)
        before = generator.n_rows
        with calling(CallContext(time_left_s=0.01)), pytest.raises(ProviderTimeoutError):
            engine.complete(request("second"), seed=0)
        release.set()
        first.result()
        engine.complete(request("third"), seed=0)
    assert generator.n_rows == before + 2


def test_a_prompt_that_needs_more_memory_than_there_is_says_how_much(engine, monkeypatch):
    monkeypatch.setattr("copa_harness.lm.local.scheduler.free_bytes", lambda device: 1000)
    with pytest.raises(OutOfMemoryError, match=r"prompt of \d+ tokens with max_tokens=6 needs .* MB on cpu.*free"):
        engine.complete(request(), seed=0)


def test_batches_are_split_to_what_memory_allows(engine, monkeypatch):
    expected = [engine.complete(request(f"case {i}"), seed=0).text for i in range(6)]
    monkeypatch.setattr(engine.generator, "_bytes", lambda jobs, free: len(jobs))  # a byte a row, and free for two
    monkeypatch.setattr("copa_harness.lm.local.scheduler.free_bytes", lambda device: 2.5)
    before = engine.generator.n_batches
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: engine.complete(request(f"case {i}"), seed=0).text, range(6)))
    assert answers == expected
    assert engine.generator.n_batches - before >= 3


def test_device_dtype_and_path_are_told_once_in_one_line(engine):
    engine.complete(request(), seed=0)
    assert engine.description is not None
    for word in ("hf:tiny", "cpu", "float32", "cascade"):
        assert word in engine.description


def test_nothing_is_described_before_weights_are_loaded(folder, tmp_path):
    assert TransformersEngine(folder, name="hf:other", lora_dir=tmp_path).description is None


def test_a_chat_template_can_be_given_as_a_file(tmp_path):
    bare = write_tiny_model(tmp_path / "bare", chat_template=None)
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    given = {"gateway": Gateway(cache=None), "cache_dir": tmp_path, "max_tokens": 2}
    with pytest.raises(ConfigurationError, match="--copa-chat-template=FILE"):
        build_lm(f"hf:{bare}", **given)("x")
    assert build_lm(f"hf:{bare}", chat_template=template, **given)("x")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        build_lm(f"hf:{bare}", chat_template=tmp_path / "none.jinja", **given)
    with pytest.raises(ConfigurationError, match="dtype"):
        build_lm("openai/gpt-4o-mini", dtype="bfloat16", **given)


def test_a_dspy_program_runs_on_half_precision_when_asked(folder, tmp_path):
    lm = build_lm(f"hf:{folder}", gateway=Gateway(cache=None), cache_dir=tmp_path, dtype="bfloat16", max_tokens=4)
    assert isinstance(lm("zebra")[0], str)
    assert "bfloat16" in lm.engine.description
    assert isinstance(dspy.Predict("question -> answer"), dspy.Predict)
