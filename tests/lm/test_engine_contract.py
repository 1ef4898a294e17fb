"""The scripted, the local, the endpoint and the vLLM engine keep what `Engine` promises."""

import json

import dspy
import pytest

from copa_harness.errors import ConfigurationError, ProviderError
from copa_harness.lm.endpoint.engine import EndpointEngine, HttpEngine
from copa_harness.lm.endpoint.replicas import ReplicaEngine
from copa_harness.lm.endpoint.vllm import VllmEngine, vllm_engine
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.local.files import CONFIG_FILE, WEIGHTS_FILE, write_manifest
from copa_harness.lm.local.sources.source import ModelSource
from copa_harness.lm.metered import MeteredLM
from copa_harness.lm.scripted import ScriptedEngine
from copa_harness.testing.engine_contract import EngineContract
from copa_harness.testing.tiny_models import write_tiny_model

API_KEY = "sk-test-0123456789abcdef"


class TestScriptedEngine(EngineContract):
    @pytest.fixture
    def engine(self):
        return ScriptedEngine(lambda messages: f"you said: {messages[-1]['content']}")

    @pytest.fixture
    def broken_engine(self):
        return ScriptedEngine([ProviderError("down")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("contract") / "tiny", seed=7)


class TestTransformersEngine(EngineContract):
    @pytest.fixture
    def engine(self, folder, tmp_path):
        return TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path)

    @pytest.fixture
    def broken_engine(self, tmp_path):
        folder = write_tiny_model(tmp_path / "short", context_length=16)
        return TransformersEngine(folder, name="hf:tiny", lora_dir=tmp_path)


@pytest.mark.usefixtures("no_gateways")
class TestEndpointEngine(EngineContract):
    """DSPy's own client."""

    kind = EndpointEngine
    secrets = (API_KEY,)
    max_tokens = 50

    @pytest.fixture
    def model(self):
        return "openai/gpt-4o-mini"

    def made(self, url, model="openai/gpt-4o-mini"):
        return self.kind(dspy.LM(model, api_base=url, api_key=API_KEY, cache=False, num_retries=0))

    @pytest.fixture
    def engine(self, stub):
        return self.made(stub.url)

    @pytest.fixture
    def broken_engine(self, stub, stubs):
        stub.default = stubs.Reply(500, body={"error": {"message": "down"}})
        return self.made(stub.url)


class TestHttpEngine(TestEndpointEngine):
    """The pool of connections."""

    kind = HttpEngine


NAME = "hosted_vllm/org/toy"


@pytest.mark.usefixtures("no_gateways")
class TestVllmEngine(EngineContract):
    """The base model, as the endpoint has it."""

    secrets = (API_KEY,)
    max_tokens = 50

    @pytest.fixture
    def model(self, engine):
        return NAME

    @pytest.fixture
    def server(self, stubs):
        with stubs.VllmStub(lambda model, path, messages: f"{model} says {messages[-1]['content']}") as running:
            yield running

    @pytest.fixture
    def engine(self, server, tmp_path):
        folder = tmp_path / "weights"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"base")
        clients = {"api_base": server.url, "api_key": API_KEY}
        return vllm_engine(
            HttpEngine(dspy.LM(NAME, cache=False, num_retries=0, **clients)),
            weights=TransformersEngine(ModelSource(folder), name=NAME, lora_dir=tmp_path / "lora"),
            source=str(folder),
            clients=clients,
        )

    @pytest.fixture
    def broken_engine(self, engine, server, stubs):
        server.replies = [stubs.Reply(500, body={"error": {"message": "down"}})] * 4
        return engine

    def test_it_is_the_vllm_engine(self, engine):
        assert isinstance(engine, VllmEngine)


class TestTunedVllmEngine(TestVllmEngine):
    """A LoRA adapter on the server."""

    @pytest.fixture
    def model(self, engine):
        directory = engine.lora_dir / "mine"
        directory.mkdir(parents=True)
        (directory / WEIGHTS_FILE).write_bytes(b"one")
        (directory / CONFIG_FILE).write_text(json.dumps({"r": 8}))
        write_manifest(directory, base_fingerprint=engine.weights_fingerprint, details={})
        return engine.add_lora(directory)


class TestReplicaEngine(TestTunedVllmEngine):
    """The same behind two addresses."""

    @pytest.fixture
    def engine(self, server, stubs, tmp_path):
        folder = tmp_path / "weights"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"base")
        with stubs.VllmStub(server.answer) as other:
            lm = build_lm(
                NAME,
                gateway=Gateway(cache=None),
                cache_dir=tmp_path,
                api_base=f"{server.url},{other.url}",
                api_key=API_KEY,
                base_weights=f"hf:{folder}",
                num_retries=0,
            )
            yield lm.engine

    @pytest.fixture
    def broken_engine(self, engine, server, stubs):
        server.replies = [stubs.Reply(500, body={"error": {"message": "down"}})] * 4
        return engine

    def test_it_is_the_vllm_engine(self, engine):
        assert isinstance(engine, ReplicaEngine)


def test_what_is_no_engine_is_refused_in_words():
    class Duck:
        name = "duck"

        def fingerprint(self, model):
            return "duck"

        def complete(self, request, *, seed):
            raise AssertionError

    with pytest.raises(ConfigurationError, match=r"expected a copa_harness\.lm\.Engine"):
        MeteredLM("duck", engine=Duck(), gateway=Gateway(cache=None))
