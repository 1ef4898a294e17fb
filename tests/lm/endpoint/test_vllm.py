"""LoRA adapters on a running vLLM server: loaded when needed, named by their weights; refusals say what to do."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from copa_harness.errors import (
    ArtifactError,
    AuthenticationError,
    ConfigurationError,
    ConnectionFailedError,
    ProviderError,
    ProviderTimeoutError,
    ServerFailureError,
)
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.endpoint.vllm_server import VllmServer
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local.files import CONFIG_FILE, WEIGHTS_FILE, write_manifest

NAME = "hosted_vllm/org/toy"
API_KEY = "sk-vllm-0123456789abcdef"

pytestmark = pytest.mark.usefixtures("no_gateways")


def says_who(model, path, messages):
    return f"{model} says {messages[-1]['content']}"


@pytest.fixture
def stub(stubs):
    with stubs.VllmStub(says_who) as running:
        yield running


@pytest.fixture
def weights(tmp_path):
    """A folder that has the looks of a model: nobody opens it here."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"base")
    return folder


@pytest.fixture
def make(stub, weights, tmp_path):
    def make_(**kwargs):
        gateway = Gateway(cache=ResponseCache(tmp_path / "responses"))
        given = {"api_base": stub.url, "base_weights": f"hf:{weights}", "num_retries": 0, "max_tokens": 20, **kwargs}
        return build_lm(NAME, gateway=gateway, cache_dir=tmp_path, **given)

    return make_


def write_adapter(engine, folder="mine", *, weights=b"one", rank=8):
    """An adapter as training leaves it, weights aside."""
    directory = engine.lora_dir / folder
    directory.mkdir(parents=True, exist_ok=True)
    (directory / WEIGHTS_FILE).write_bytes(weights)
    (directory / CONFIG_FILE).write_text(json.dumps({"r": rank}))
    write_manifest(directory, base_fingerprint=engine.weights_fingerprint, details={})
    return directory


def routes(stub):
    return [route for route, _ in stub.shelf_requests]


def test_an_adapter_is_served_under_its_fingerprint_and_loaded_once(make, stub):
    lm = make()
    assert lm("hi")[0] == "org/toy says hi"
    assert routes(stub) == []
    directory = write_adapter(lm.engine)
    tuned = lm.copy(model=lm.engine.add_lora(directory))
    digits = lm.engine.weights.fingerprint(tuned.model)[:12]
    assert tuned.model == f"{NAME}@{digits}"
    assert tuned("hi")[0] == f"org/toy@{digits} says hi"
    assert lm.engine.add_lora(directory) == tuned.model
    assert routes(stub) == ["models", "load_lora_adapter", "models"]
    assert stub.shelf_requests[1][1] == {"lora_name": f"org/toy@{digits}", "lora_path": str(directory)}


def test_nothing_is_asked_of_the_server_when_every_answer_is_known(make, stub):
    lm = make()
    name = lm.engine.add_lora(write_adapter(lm.engine))
    answer = lm.copy(model=name)("hi")
    n_before = stub.n_requests
    stub.restart()
    again = make().copy(model=name)
    assert again("hi") == answer
    assert stub.n_requests == n_before
    assert again("more")[0].endswith("says more")
    assert routes(stub)[3:] == ["models", "load_lora_adapter", "models"]


def test_an_adapter_loaded_by_an_earlier_run_is_left_alone(make, stub):
    directory = write_adapter(make().engine)
    make().engine.add_lora(directory)
    make().engine.add_lora(directory)
    assert routes(stub).count("load_lora_adapter") == 1


def test_another_process_that_loads_at_the_same_moment_is_no_error(make, stub, stubs):
    lm = make()
    directory = write_adapter(lm.engine)
    name = f"org/toy@{lm.engine.weights.fingerprint(lm.engine.weights.add_lora(directory))[:12]}"
    usual = stub._shelf

    def overtaken(route, given):
        if route == "load_lora_adapter":
            stub.loaded[name] = str(directory)
        return usual(route, given)

    stub._shelf = overtaken
    assert lm.engine.add_lora(directory) == f"hosted_vllm/{name}"


def test_a_server_that_was_restarted_under_way_gets_the_adapter_again(make, stub):
    lm = make()
    tuned = lm.copy(model=lm.engine.add_lora(write_adapter(lm.engine)))
    tuned("one")
    stub.restart()
    assert tuned("two")[0].endswith("says two")
    assert routes(stub).count("load_lora_adapter") == 2


def test_many_threads_load_an_adapter_once(make, stub):
    lm = make()
    directory = write_adapter(lm.engine)
    tuned = lm.copy(model=lm.engine.weights.add_lora(directory))
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: tuned(f"question {i}")[0], range(16)))
    assert [text.rpartition(" says ")[2] for text in texts] == [f"question {i}" for i in range(16)]
    assert routes(stub).count("load_lora_adapter") == 1


def test_an_adapter_trained_again_at_the_same_path_is_another_model_and_the_old_one_leaves_the_server(make, stub):
    lm = make()
    directory = write_adapter(lm.engine)
    old = lm.copy(model=lm.engine.add_lora(directory))
    before = old("hi")[0]
    write_adapter(lm.engine, weights=b"two")
    new = lm.copy(model=lm.engine.add_lora(directory))
    assert new.model != old.model
    assert new.fingerprint not in (old.model, lm.fingerprint)
    assert new("hi")[0] != before
    assert list(stub.loaded) == [new.model.removeprefix("hosted_vllm/")]
    with pytest.raises((ArtifactError, ConfigurationError)):  # its weights are gone: nothing answers in its name
        old("hi")


def test_the_same_adapter_behind_another_url_is_another_key(make, stubs, stub):
    name = make().engine.add_lora(write_adapter(make().engine))
    with stubs.VllmStub(lambda model, path, messages: "the other") as other:
        there, here = make(api_base=other.url).copy(model=name), make().copy(model=name)
        assert here("hi") != there("hi") == ["the other"]


def test_the_server_may_see_the_folder_elsewhere(make, stub, tmp_path):
    stub.sees = lambda path: path.replace("/mnt/shared", str(tmp_path / "lora"))
    lm = make(served_lora_path="/mnt/shared/")
    lm.engine.add_lora(write_adapter(lm.engine))
    assert stub.shelf_requests[1][1]["lora_path"] == "/mnt/shared/mine"


def test_unloading_is_forgotten_by_nobody(make, stub):
    lm = make()
    tuned = lm.copy(model=lm.engine.add_lora(write_adapter(lm.engine)))
    lm.engine.unload(tuned.model)
    lm.engine.unload(NAME)
    assert stub.loaded == {}
    assert tuned("hi")[0].endswith("says hi")


def set_attribute(name, value):
    return lambda stub: setattr(stub, name, value)


def scripted(route, status, body):
    return lambda stub: stub.scripted.update({route: (status, body)})


@pytest.mark.parametrize(
    ("misfortune", "error", "said"),
    [
        (set_attribute("updating", False), ConfigurationError, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve"),
        (set_attribute("enable_lora", False), ConfigurationError, "--enable-lora"),
        (scripted("load_lora_adapter", 403, {"error": "Forbidden"}), ConfigurationError, "UPDATING=True vllm serve"),
        (set_attribute("max_lora_rank", 4), ConfigurationError, "LoRA rank 8 is greater .* --max-lora-rank.*is kept"),
        (set_attribute("sees", lambda path: None), ConfigurationError, "--copa-served-lora-path"),
        (set_attribute("base", "org/other"), ConfigurationError, "serves org/other; expected one of these"),
        (set_attribute("root", "org/quantized"), None, ""),  # an id there, a folder here: nobody can compare
        (set_attribute("parent", "org/real"), ConfigurationError, "a LoRA adapter of 'org/real'"),
        (set_attribute("api_key", "other"), AuthenticationError, "set HOSTED_VLLM_API_KEY"),
        (scripted("models", 200, b"<html>hello"), ConfigurationError, "got no list of models .*api.base|API base"),
        (scripted("models", 200, {"data": "x"}), ConfigurationError, "got no list of models"),
        (scripted("models", 404, {"detail": "Not Found"}), ConfigurationError, "HTTP 404"),
        (scripted("load_lora_adapter", 500, {"error": "CUDA"}), ServerFailureError, "server's log"),
        (
            scripted("load_lora_adapter", 400, {"message": "size mismatch for q_proj"}),
            ConfigurationError,
            "--copa-base-weights name the very weights",
        ),
        (scripted("load_lora_adapter", 200, b"Success"), ConfigurationError, "does not list it; .*api-server-count"),
    ],
)
def test_every_refusal_of_the_server_says_what_to_do(misfortune, error, said, make, stub):
    lm = make(api_key=API_KEY)
    directory = write_adapter(lm.engine)
    misfortune(stub)
    if error is None:
        lm.engine.add_lora(directory)
        return
    with pytest.raises(error, match=said) as caught:
        lm.engine.add_lora(directory)
    assert API_KEY not in str(caught.value)


def test_weights_that_differ_from_the_served_ones_are_refused(make, stub, tmp_path, weights):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "model.safetensors").write_bytes(b"other")
    stub.root = str(other)
    with pytest.raises(ConfigurationError, match=f"runs from {other}; expected the very weights"):
        make().engine.check_training()
    (other / "model.safetensors").write_bytes(b"base")
    make().engine.check_training()


def test_ids_of_different_models_are_refused(make, stub):
    stub.root = "org/Toy-7B"
    with pytest.raises(ConfigurationError, match="--copa-base-weights=hf:org/Toy-7B"):
        make(base_weights="hf:org/toy-3b").engine.check_training()
    make(base_weights="hf:org/toy-7b").engine.check_training()


def test_an_unreachable_server_is_a_failure_of_the_provider_that_says_how_to_start_one(make, stub):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://user:sesame@127.0.0.1:{free.getsockname()[1]}/v1"
    lm = make(api_base=url)
    directory = write_adapter(lm.engine)
    with pytest.raises(ConnectionFailedError, match=r"vllm serve <model> --enable-lora.*--copa-api-base") as caught:
        lm.engine.add_lora(directory)
    assert "sesame" not in str(caught.value)
    with pytest.raises(ProviderError) as caught:
        lm.copy(model=lm.engine.weights.add_lora(directory))("hi")
    assert caught.value.kind == "connection"


def test_a_user_in_the_url_asks_for_answers_and_loads_adapters_in_place_of_the_key(make, stub, monkeypatch):
    seen, takes_over = set(), stub.takes_over

    def watch(connection, path, headers, body):
        seen.add((path.rpartition("/")[2], headers.get("authorization")))
        return takes_over(connection, path, headers, body)

    monkeypatch.setattr(stub, "takes_over", watch)
    lm = make(api_base=stub.url.replace("://", "://user:sesame@"), api_key="k" * 20)
    assert lm("hi")
    lm.engine.add_lora(write_adapter(lm.engine))
    assert {route for route, _ in seen} >= {"completions", "load_lora_adapter"}
    assert {authorization for _, authorization in seen} == {"Basic dXNlcjpzZXNhbWU="}


def test_a_server_that_hangs_is_given_up(stubs, monkeypatch):
    monkeypatch.setattr("copa_harness.lm.endpoint.vllm_server.LIST_TIMEOUT_S", 0.1)
    hanging = stubs.StubServer(default=stubs.Reply(hang=True))
    with hanging as stub, pytest.raises(ProviderTimeoutError, match=r"within 0\.1 s"):
        VllmServer(stub.url).models()


def test_the_key_goes_to_the_server_and_into_no_message(make, stub):
    stub.api_key = API_KEY
    lm = make(api_key=API_KEY)
    assert lm.copy(model=lm.engine.add_lora(write_adapter(lm.engine)))("hi")[0].endswith("says hi")
    stub.scripted["load_lora_adapter"] = (400, {"message": f"bad {API_KEY}"})
    stub.restart()
    with pytest.raises(ConfigurationError) as caught:
        make(api_key=API_KEY).engine.add_lora(lm.engine.lora_dir / "mine")
    assert API_KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "given", "said"),
    [
        ("embedded", {"base_weights": "hf:org/toy"}, "whose weights are its own"),
        (NAME, {"base_weights": "org/toy"}, "expected 'hf:'"),
        (NAME, {"base_weights": "hf:org/toy", "api_base": None}, "no URL; .*HOSTED_VLLM_API_BASE"),
    ],
)
def test_base_weights_that_cannot_be_meant_are_refused(spec, given, said, tmp_path):
    with pytest.raises(ConfigurationError, match=said):
        build_lm(spec, gateway=Gateway(cache=None), cache_dir=tmp_path, **given)
