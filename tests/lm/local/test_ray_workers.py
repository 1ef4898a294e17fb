"""A local model on Ray workers: the answers of one process, bit for bit, also when a worker dies meanwhile."""

import os
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from dspy.lm15 import Config, Message, Request

from copa_harness.errors import ConfigurationError, ContextOverflowError
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.testing.tiny_models import write_tiny_model
from copa_harness.tune import LoraSettings, LoraTrainer, TrainingRow

ray = pytest.importorskip("ray", reason="pip install 'copa-harness[ray]'")

from copa_harness.lm.local.ray_workers import RayEngine  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes on this machine, so two workers."""
    from ray.cluster_utils import Cluster

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as environment:
        warnings.simplefilter("ignore")
        environment.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        environment.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.add_node(num_cpus=1)
        ray.init(address=made.address, log_to_driver=False)
        yield made.address
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def engines(cluster, tiny, tmp_path_factory):
    lora_dir = tmp_path_factory.mktemp("lora")
    here = TransformersEngine(tiny, name="hf:tiny", lora_dir=lora_dir)
    return here, RayEngine(tiny, address=cluster, name="hf:tiny", lora_dir=lora_dir)


def request(number, *, model="hf:tiny", temperature=0.7, max_tokens=12):
    message = Message.user(f"question {number} " * (1 + number % 4))
    return Request(model=model, messages=(message,), config=Config(max_tokens=max_tokens, temperature=temperature))


def asked(engine, requests):
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda numbered: engine.complete(numbered[1], seed=numbered[0]).text, enumerate(requests)))


def test_workers_give_the_answers_of_one_process(engines):
    here, there = engines
    requests = [request(number) for number in range(24)]
    assert asked(there, requests) == asked(here, requests)
    assert len(there._workers) == 2
    assert there.fingerprint("hf:tiny") == here.fingerprint("hf:tiny")


def test_an_adapter_that_was_trained_here_answers_there(engines):
    here, there = engines
    rows = [
        TrainingRow(({"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "red"})) for i in range(8)
    ]
    settings = LoraSettings(rank=4, alpha=8, epochs=2, batch_size=4, warmup_steps=1)
    model = LoraTrainer(there, directory=there.lora_dir).train(rows, settings=settings, served_with="none").model
    requests = [request(number, model=model, temperature=0.0) for number in range(6)]
    assert asked(there, requests) == asked(here, requests)


def test_a_worker_that_dies_is_replaced_and_each_request_is_paid_once(engines):
    here, there = engines
    requests = [request(number, max_tokens=60) for number in range(30)]
    asked(there, requests[:2])
    pid = ray.get(there._workers[0].__ray_call__.remote(lambda worker: os.getpid()))
    gateway = Gateway(cache=None)
    with open_scope("t") as scope, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(gateway.call, there, one) for one in requests]
        answers[4].result()
        os.kill(pid, signal.SIGKILL)
        answers = [one.result().text for one in answers]
    assert answers == [Gateway(cache=None).call(here, one).text for one in requests]
    assert scope.usage().paid_calls == len(requests)


def test_an_error_is_told_as_by_one_process(engines):
    with pytest.raises(ContextOverflowError):
        engines[1].complete(request(0, max_tokens=10**6), seed=0)


def test_a_worker_with_other_weights_is_refused(engines, tiny, monkeypatch):
    there = engines[1]
    monkeypatch.setattr(there, "fingerprint", lambda model: "0" * 64)
    with pytest.raises(ConfigurationError, match="a Ray worker has hf:tiny as"):
        there.complete(request(0), seed=0)
