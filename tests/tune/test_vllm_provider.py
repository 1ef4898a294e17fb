"""Fine-tuning a model that a vLLM server runs: trained here on a copy, served there, by DSPy's interface."""

from __future__ import annotations

import dspy
import pytest
from dspy.lm15 import Config, Message, Request

from copa_harness.errors import ConfigurationError
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.tune import LoraSettings, RowDemos, attach_provider, finetune, render_rows

QUICK = LoraSettings(rank=4, epochs=1, batch_size=4)
NAME = "hosted_vllm/org/toy"


class Serving:
    """Answers as the server does: with an engine of its own that knows an adapter by the path it was given."""

    def __init__(self, folder, lora_dir):
        self.engine = TransformersEngine(folder, name="served", lora_dir=lora_dir, device="cpu")

    def __call__(self, model, path, messages):
        request = Request(
            model="served" if path is None else self.engine.add_lora(path),
            messages=tuple(Message.user(message["content"]) for message in messages if message["role"] == "user"),
            config=Config(max_tokens=6, temperature=0.0),
        )
        return self.engine.complete(request, seed=0).message.text


@pytest.fixture
def stub(stubs, tiny_folder, tmp_path):
    with stubs.VllmStub(Serving(tiny_folder, tmp_path / "server"), root=str(tiny_folder)) as running:
        yield running


@pytest.fixture
def make(stub, tiny_folder, tmp_path):
    def make_():
        gateway = Gateway(cache=ResponseCache(tmp_path / "responses"))
        lm = build_lm(
            NAME,
            gateway=gateway,
            cache_dir=tmp_path,
            api_base=stub.url,
            base_weights=f"hf:{tiny_folder}",
            num_retries=0,
            max_tokens=6,
            temperature=0.0,
        )
        return attach_provider(lm, settings=QUICK)

    return make_


@pytest.fixture
def chat_rows(program, examples):
    rows = render_rows(program, examples, demos=RowDemos("none", seed=0))["self"]
    return [{"messages": list(row.messages)} for row in rows]


def n_loads(stub):
    return [route for route, _ in stub.shelf_requests].count("load_lora_adapter")


def test_lm_finetune_trains_here_and_the_server_answers_with_the_trained_weights(make, stub, chat_rows, tmp_path):
    lm = make()
    base = lm("hello there")
    with open_scope("run") as scope:
        tuned = lm.finetune(chat_rows, "chat", {"epochs": 6, "learning_rate": 0.1}).result(timeout=60)
        answer = tuned("hello there")
    assert scope.usage().train_steps == 18
    assert scope.phase_usages().keys() == {"evaluate"}
    assert tuned.model.startswith(f"{NAME}@")
    assert answer != base
    local = TransformersEngine(lm.engine.weights.directory, name=NAME, lora_dir=tmp_path / "lora", device="cpu")
    request = Request(
        model=tuned.model, messages=(Message.user("hello there"),), config=Config(max_tokens=6, temperature=0.0)
    )
    assert answer == [local.complete(request, seed=0).message.text]


def test_a_second_run_trains_nothing_and_asks_the_server_nothing(make, stub, chat_rows):
    first = make().finetune(chat_rows, "chat").result(timeout=60)
    answer = first("hello")
    stub.restart()
    n_before = stub.n_requests
    with open_scope("again") as scope:
        again = make().finetune(chat_rows, "chat").result(timeout=60)
        assert again.model == first.model
        assert again("hello") == answer
    assert scope.usage().train_steps == 0
    assert stub.n_requests == n_before
    again("something new")
    assert n_loads(stub) == 2 + 1  # a probe before training, the first run's, and the restarted server's


def test_a_server_that_would_not_take_the_adapter_is_found_out_before_training(make, stub, chat_rows):
    stub.updating = False
    with open_scope("run") as scope:
        result = make().finetune(chat_rows, "chat").result(timeout=60)
    assert isinstance(result, ConfigurationError)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in str(result)
    assert scope.usage().train_steps == 0


def test_a_rank_the_server_refuses_costs_the_training_once(make, stub, chat_rows):
    stub.max_lora_rank = 2
    result = make().finetune(chat_rows, "chat").result(timeout=60)
    assert isinstance(result, ConfigurationError)
    assert "LoRA rank 4 is greater than max_lora_rank 2" in str(result)
    stub.max_lora_rank = 16
    with open_scope("run") as scope:
        assert isinstance(make().finetune(chat_rows, "chat").result(timeout=60)("hello")[0], str)
    assert scope.usage().train_steps == 0


def test_finetune_without_a_provider_serves_there_too(make, stub, chat_rows, tmp_path):
    tuned = finetune(make(), chat_rows, directory=tmp_path / "lora", served_with="none", settings=QUICK)
    assert list(stub.loaded) == [tuned.model.removeprefix("hosted_vllm/")]
    tuned.kill()
    assert stub.loaded == {}
    tuned.launch()
    assert isinstance(tuned("hello")[0], str)


def right(example, prediction, trace=None):
    return float(prediction.colour == example.colour)


def test_better_together_with_bootstrap_finetune_works_on_the_server(make, stub, program, examples):
    lm = make()
    program.set_lm(lm)
    teacher = program.deepcopy()
    teacher.set_lm(
        ScriptedLM(
            lambda messages: {"colour": next(c for c in ("red", "green", "blue") if f"n{c}" in messages[-1]["content"])}
        )
    )
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        optimizer = dspy.BetterTogether(
            metric=right, p=dspy.LabeledFewShot(k=2), w=dspy.BootstrapFinetune(metric=right, num_threads=2)
        )
        compiled = optimizer.compile(
            program,
            trainset=examples[:6],
            valset=examples[6:],
            strategy="p -> w",
            num_threads=2,
            optimizer_compile_args={"w": {"teacher": teacher}},
        )
    assert not compiled.flag_compilation_error_occurred
    assert any("@" in model for model in stub.answered)
