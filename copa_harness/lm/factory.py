"""From a name to a language model: one that runs here (`lm.local.sources.names`), or anything DSPy can name.

Nothing heavy is loaded here: weights on the first answer that is not cached, LiteLLM when a call needs it. A name that
means nothing is refused with what may have been meant.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import dspy
from dspy.clients.provider import Provider
from dspy.lm15 import LM15Error
from dspy.utils.exceptions import LMConfigurationError

from copa_harness.errors import ConfigurationError
from copa_harness.lm.answer_ceiling import DERIVED
from copa_harness.lm.constrained import checked_constrain
from copa_harness.lm.dspy_internals import CLIENT_KEYS, LITELLM_PROVIDER_PREFIXES, prompt_adapter, resolve
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local.sources.gguf import is_gguf
from copa_harness.lm.local.sources.names import EMBEDDED, SHORT_NAMES, is_local_name, named_place
from copa_harness.lm.local.sources.source import ModelSource
from copa_harness.lm.metered import MeteredLM

_CHOICES = (
    "'embedded', 'hf:<path or id>' (a transformers model), 'gguf:<path>', a short name "
    f"({', '.join(SHORT_NAMES)}), or '<provider>/<model>' as DSPy names it, such as 'openai/gpt-4o-mini', "
    "'ollama_chat/llama3.2' or 'hosted_vllm/<model>' with --copa-api-base"
)


def check_endpoint_name(spec: str) -> None:
    """Refuse a name that DSPy and LiteLLM do not know.

    Args:
        spec: As the user wrote it; not the name of a model that runs here.

    Raises:
        ConfigurationError: It means nothing; the message names the choices and what may have been meant.
    """
    provider, separator, model = spec.partition("/")
    if not (separator and provider and model) or any(character.isspace() for character in spec):
        if close := difflib.get_close_matches(spec.lower(), [EMBEDDED, *SHORT_NAMES], n=1, cutoff=0.7):
            hint = f"; did you mean '{close[0]}'?"
        elif not separator and re.match(r"(gpt|o\d|chatgpt|ft:)", spec):
            hint = f"; did you mean 'openai/{spec}'?"
        elif spec and Path(spec).is_dir():
            hint = f"; did you mean 'hf:{spec}'?"
        elif is_gguf(spec):
            hint = f"; did you mean 'gguf:{spec}'?"
        else:
            hint = ""
        raise ConfigurationError(f"got the language model {spec!r}, expected {_CHOICES}{hint}")
    if Path(spec).expanduser().is_dir():
        raise ConfigurationError(f"got the language model {spec!r}, which is a folder; did you mean 'hf:{spec}'?")
    if is_gguf(spec):
        raise ConfigurationError(f"got the language model {spec!r}, which is a GGUF file; did you mean 'gguf:{spec}'?")
    if not _is_known_provider(provider, spec):
        raise ConfigurationError(
            f"got the language model {spec!r}: neither DSPy nor LiteLLM knows a provider {provider!r}; expected "
            f"{_CHOICES}{_did_you_mean(provider, model)}"
        )


def _is_known_provider(provider: str, spec: str) -> bool:
    try:
        resolve(dspy.LM(spec, cache=False))
        return True
    except LM15Error:
        return provider in _litellm_providers(default=provider)


def _litellm_providers(*, default: str | None = None) -> list[str]:
    """Providers LiteLLM serves, read from its own data: importing it takes seconds and asks the network for prices.

    With an installed LiteLLM that does not ship the list, only `default`: the first call then says whether it is known.
    """
    found = importlib.util.find_spec("litellm")
    if found is None or found.origin is None:
        return []
    try:
        text = (Path(found.origin).parent / "provider_endpoints_support_backup.json").read_text("utf-8")
        return list(json.loads(text)["providers"])
    except (OSError, ValueError, KeyError, TypeError):
        return [] if default is None else [default]


def _did_you_mean(provider: str, model: str) -> str:
    close = difflib.get_close_matches(provider.lower(), [*LITELLM_PROVIDER_PREFIXES, *_litellm_providers()], cutoff=0.8)
    if close:
        return f"; did you mean '{close[0]}/{model}'?"
    return f"; for a model of the Hugging Face hub write 'hf:{provider}/{model}'" if "/" not in model else ""


EMBEDDED_MAX_TOKENS = 64
"""Default ceiling of output tokens of the embedded model: a label and its field markers, each a token of it."""

LORA_FOLDER = "lora"
"""Folder of the LoRA adapters inside the cache directory."""

REWRITTEN_FOLDER = "safetensors"
"""Folder, inside the cache directory, of models whose weights came in GGUF or as a pickle."""

_KEYS = {
    "hosted_vllm": "HOSTED_VLLM_API_KEY",
    "ollama": "OLLAMA_API_KEY",
    "ollama_chat": "OLLAMA_API_KEY",
}
"""Where LiteLLM finds the keys of servers that DSPy's native client takes for open."""

NO_KEY = "no-key-needed"
"""Sent to a server of the own network that speaks OpenAI's protocol, where nobody has set a key: clients want one."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What can be said of a model beside its name.

    Attributes:
        device: `cpu`, `cuda`, `cuda:1`, ...; chosen by the engine by default. Local models only.
        worker: This process's number among several that share the machine's GPUs, from 0: where the device is left
            open, each gets one of its own. None if this process may use them all.
        dtype: `float32` (the default: exact), `bfloat16` or `float16`. Local models only.
        chat_template: File with a Jinja template that replaces the model's own. Local models only.
        allow_pickled_weights: Weights that come as a pickle only (`pytorch_model.bin`) are read once, by torch's
            restricted unpickler, and kept as safetensors in the folder `safetensors` of the cache directory; otherwise
            they are refused. Models with weights here only.
        constrain: Output fields typed `Literal`, enum or bool get the likeliest allowed value; see `constrained`. Local
            models only.
        answer_tokens: Ceiling of output tokens of calls without `max_tokens`; None derives it from the output fields of
            the predictor that calls (see `lm.answer_ceiling`), 0 sets none.
        api_base: URL of the endpoint, or several of one model, separated by commas: requests are spread over them (see
            `lm.endpoint.replicas`). Endpoint models only.
        base_weights: `hf:<path or id>`, a copy of the weights that a vLLM server runs as this model: the model can then
            be fine-tuned, here, and the server is made to serve the LoRA adapters (see `lm.endpoint.vllm`).
        served_lora_path: Where that server sees the folder `lora` of the cache directory; None if it sees it there too.
        ray: Address of the Ray cluster whose devices answer, or `auto`; None for this process. Local models only.
    """

    device: str | None = None
    worker: int | None = None
    dtype: str | None = None
    chat_template: Path | None = None
    allow_pickled_weights: bool = False
    constrain: bool = False
    answer_tokens: int | None = None
    api_base: str | None = None
    base_weights: str | None = None
    served_lora_path: str | None = None
    ray: str | None = None


_MODEL_SETTINGS = frozenset(field.name for field in fields(ModelSettings))


def build_lm(spec: str, *, gateway: Gateway, cache_dir: Path, **settings: Any) -> MeteredLM:
    """The language model a name stands for.

    Args:
        spec: `embedded`, `hf:<path or id>`, `gguf:<path>`, a short name, or a name DSPy knows (`openai/...`).
        gateway: Cache and meter of its calls.
        cache_dir: LoRA adapters of local models are kept and found in its folder `lora`, weights that came in another
            format in `safetensors`.
        **settings: The fields of `ModelSettings`; the rest are call defaults (`temperature`, `max_tokens`, ...) and,
            for endpoints, client settings (`api_key`, `timeout`, ...), as in `dspy.LM`.

    Raises:
        ConfigurationError: The name means nothing, or a setting does not fit the kind of model.
    """
    model = ModelSettings(**{name: value for name, value in settings.items() if name in _MODEL_SETTINGS})
    lm_kwargs = {name: value for name, value in settings.items() if name not in _MODEL_SETTINGS}
    build = _local_lm if is_local_name(spec) else _endpoint_lm
    return build(spec, model, gateway=gateway, cache_dir=Path(cache_dir), lm_kwargs=lm_kwargs)


def _endpoint_lm(
    spec: str, settings: ModelSettings, *, gateway: Gateway, cache_dir: Path, lm_kwargs: dict[str, Any]
) -> MeteredLM:
    local_only: dict[str, Any] = {name: getattr(settings, name) for name in ("device", "dtype", "chat_template")}
    if settings.allow_pickled_weights and settings.base_weights is None:
        local_only["allow_pickled_weights"] = True
    given = [f"{name}={value!r}" for name, value in local_only.items() if value is not None]
    if given:
        raise ConfigurationError(
            f"got {', '.join(given)} for {spec!r}, expected it only with a model that runs here, such as 'embedded' "
            "or 'hf:...': an endpoint decides that itself"
        )
    checked_constrain(settings.constrain, None, model=spec)
    check_endpoint_name(spec)
    from copa_harness.lm.endpoint.engine import HttpEngine, is_own_network

    addresses = addresses_of(settings.api_base)
    for address in addresses:
        if not re.match(r"https?://[^/\s]+", address):
            raise ConfigurationError(f"got the API base {address!r}, expected a URL such as http://localhost:8000/v1")
    if addresses:
        lm_kwargs["api_base"] = addresses[0]
        if not all(re.match(r"https://api\.openai\.com(/|$)", address) for address in addresses):
            # DSPy's fine-tuning knows no URL: it would send training rows to the host that the name stands for.
            lm_kwargs.setdefault("provider", Provider())
        if all(map(is_own_network, addresses)):
            # llama.cpp, vLLM and Ollama sample when nothing is said, and all of them take 0; models elsewhere may not.
            lm_kwargs.setdefault("temperature", 0.0)
            if spec.startswith("openai/") and not os.environ.get("OPENAI_API_KEY"):
                lm_kwargs.setdefault("api_key", NO_KEY)
    if key := os.environ.get(_KEYS.get(spec.partition("/")[0], "")):
        lm_kwargs.setdefault("api_key", key)
    try:
        plain = dspy.LM(spec, cache=False, **lm_kwargs)
        lm = meter_lm(plain, gateway=gateway, answer_tokens=settings.answer_tokens)
        engines: list[Any] = [lm.engine, *(HttpEngine(plain.copy(api_base=address)) for address in addresses[1:])]
    except (LMConfigurationError, TypeError, ValueError) as error:
        raise ConfigurationError(f"cannot use the language model {spec!r}: {error}") from error
    if settings.base_weights is not None:
        from copa_harness.lm.endpoint.vllm import vllm_engine
        from copa_harness.lm.local.engine import TransformersEngine

        source = _source(settings.base_weights, settings, cache_dir=cache_dir, option="base weights")
        weights = TransformersEngine(source, name=spec, lora_dir=cache_dir / LORA_FOLDER, worker=settings.worker)
        engines = [
            vllm_engine(
                engine,
                weights=weights,
                source=str(source.place),
                clients={**lm_kwargs, **({"api_base": address} if address else {})},
                served_lora_path=settings.served_lora_path,
            )
            for engine, address in zip(engines, addresses or [""], strict=True)
        ]
    if len(engines) == 1:
        return lm if settings.base_weights is None else lm.copy(engine=engines[0])
    from copa_harness.lm.endpoint.replicas import ReplicaEngine

    return lm.copy(engine=ReplicaEngine(engines, urls=addresses))


def addresses_of(api_base: str | None) -> list[str]:
    """The addresses in `ModelSettings.api_base`, each once."""
    return list(dict.fromkeys(re.split(r"[,\s]+", api_base.strip()))) if api_base else []


def answer_ceiling_of(answer_tokens: int | None) -> int | str | None:
    """`ModelSettings.answer_tokens` as `MeteredLM` wants it."""
    return DERIVED if answer_tokens is None else answer_tokens or None


def meter_lm(lm: dspy.LM, *, gateway: Gateway, answer_tokens: int | None = None) -> MeteredLM:
    """A plain `dspy.LM` with its calls led through the gateway; its provider (fine-tuning) and defaults are kept.

    A `MeteredLM` comes back as it is.

    Raises:
        ConfigurationError: The LM is a text-completion model or has a custom engine.
    """
    if isinstance(lm, MeteredLM):
        return lm
    defaults = {key: value for key, value in lm.kwargs.items() if key not in CLIENT_KEYS}
    if "max_completion_tokens" in defaults:  # DSPy's spelling for reasoning models; its constructor takes the other
        defaults["max_tokens"] = defaults.pop("max_completion_tokens")
    from copa_harness.lm.endpoint.engine import HttpEngine

    return MeteredLM(
        lm.model,
        engine=HttpEngine(lm),
        gateway=gateway,
        provider=lm.provider,
        model_type=lm.model_type,
        callbacks=lm.callbacks,
        finetuning_model=lm.finetuning_model,
        launch_kwargs=lm.launch_kwargs,
        train_kwargs=lm.train_kwargs,
        use_developer_role=lm.use_developer_role,
        answer_tokens=answer_ceiling_of(answer_tokens),
        **{"temperature": None, "max_tokens": None, **defaults},
    )


def adapter_for(lm: dspy.BaseLM) -> dspy.Adapter:
    """The prompt adapter to use with a model.

    For local and scripted models a ChatAdapter that does not ask a second time in JSON when an answer does not parse:
    they have no JSON mode, and the second call would be paid for nothing. DSPy's default for the rest.
    """
    has_json_mode = not isinstance(lm, MeteredLM) or lm.engine.is_endpoint
    return prompt_adapter(use_json_adapter_fallback=has_json_mode)


def _template_text(chat_template: Path | None) -> str | None:
    if chat_template is None:
        return None
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"got the chat template {str(chat_template)!r}, which cannot be read ({error}); expected a file with a "
            "Jinja template, such as the chat_template.jinja of a model folder"
        ) from error


def _local_lm(
    spec: str, settings: ModelSettings, *, gateway: Gateway, cache_dir: Path, lm_kwargs: dict[str, Any]
) -> MeteredLM:
    if settings.api_base is not None:
        raise ConfigurationError(
            f"got an API base {settings.api_base!r} for {spec!r}, which runs in this process; "
            "drop it, or name an endpoint model such as 'hosted_vllm/<model>'"
        )
    if settings.base_weights is not None or settings.served_lora_path is not None:
        raise ConfigurationError(
            f"got base weights or a served LoRA path for {spec!r}, whose weights are its own; expected them with a "
            "model that a vLLM server runs, such as 'hosted_vllm/<model>'"
        )
    refused = sorted(CLIENT_KEYS.intersection(lm_kwargs))
    if refused:
        raise ConfigurationError(f"got {refused} for {spec!r}, which runs in this process and has no connection")
    chat_template = _template_text(settings.chat_template)
    name = spec.rstrip("/")
    source = _source(name, settings, cache_dir=cache_dir, option="language model")
    engine_settings: dict[str, Any] = {
        "name": name,
        "lora_dir": cache_dir / LORA_FOLDER,
        "device": settings.device,
        "worker": settings.worker,
        "dtype": settings.dtype,
        "chat_template": chat_template,
    }
    if settings.ray is None:
        from copa_harness.lm.local.engine import TransformersEngine

        engine = TransformersEngine(source, **engine_settings)
    elif importlib.util.find_spec("ray") is None:
        raise ConfigurationError("--copa-ray needs ray, which is not installed; pip install 'copa-harness[ray]'")
    else:
        from copa_harness.lm.local.ray_workers import RayEngine

        engine = RayEngine(source, address=settings.ray, **engine_settings)
    max_tokens = (settings.answer_tokens or EMBEDDED_MAX_TOKENS) if spec == EMBEDDED else None
    defaults = {
        "temperature": 0.0,
        "max_tokens": max_tokens,
        "constrain": settings.constrain,
        "answer_tokens": answer_ceiling_of(settings.answer_tokens),
        **lm_kwargs,
    }
    return MeteredLM(name, engine=engine, gateway=gateway, **defaults)


_LOCAL = ("torch", "transformers", "peft", "safetensors")
"""Packages of the extra `local`."""


def _source(name: str, settings: ModelSettings, *, cache_dir: Path, option: str) -> ModelSource:
    """Where the weights of a name are, checked as far as the files at hand tell."""
    if missing := [package for package in _LOCAL if importlib.util.find_spec(package) is None]:
        raise ConfigurationError(
            f"got the {option} {name!r}, which runs in this process, and lacks the packages {', '.join(missing)}; "
            "remedy: pip install 'copa-harness[local]', or name an endpoint, such as --copa-lm=openai/gpt-4o-mini"
        )
    if option == "base weights" and (not name.startswith("hf:") or is_gguf(name)):
        raise ConfigurationError(f"got the {option} {name!r}, expected 'hf:' and the folder or id that the server runs")
    place, remedy = named_place(name, option=option)
    source = ModelSource(
        place,
        name=name,
        keep_in=cache_dir / REWRITTEN_FOLDER,
        allows_pickled=settings.allow_pickled_weights,
        brings_template=settings.chat_template is not None,
        remedy=remedy,
    )
    if name != EMBEDDED:
        source.check()
    return source
