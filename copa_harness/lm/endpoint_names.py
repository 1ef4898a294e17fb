"""Names of endpoint models: which provider they name, and what somebody may have meant who names none.

Knows nothing of engines, and asks no network.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from pathlib import Path

import dspy
from dspy._vendor.lm15.router import LITELLM_PROVIDER_PREFIXES
from dspy.clients.capabilities import resolve
from dspy.lm15 import LM15Error

from copa_harness.errors import ConfigurationError

_CHOICES = (
    "'embedded', 'hf:<path or id>' (a transformers model), or '<provider>/<model>' as DSPy names it, "
    "such as 'openai/gpt-4o-mini', 'ollama_chat/llama3.2' or 'hosted_vllm/<model>' with --copa-api-base"
)


def check_endpoint_name(spec: str) -> None:
    """Refuse a name that DSPy and LiteLLM do not know.

    Args:
        spec: As the user wrote it; not `embedded`, nor beginning with `hf:`.

    Raises:
        ConfigurationError: It means nothing; the message names the choices and what may have been meant.
    """
    provider, separator, model = spec.partition("/")
    if not (separator and provider and model) or any(character.isspace() for character in spec):
        if difflib.get_close_matches(spec.lower(), ["embedded"], cutoff=0.7):
            hint = "; did you mean 'embedded'?"
        elif not separator and re.match(r"(gpt|o\d|chatgpt|ft:)", spec):
            hint = f"; did you mean 'openai/{spec}'?"
        elif spec and Path(spec).is_dir():
            hint = f"; did you mean 'hf:{spec}'?"
        else:
            hint = ""
        raise ConfigurationError(f"got the language model {spec!r}, expected {_CHOICES}{hint}")
    if Path(spec).expanduser().is_dir():
        raise ConfigurationError(f"got the language model {spec!r}, which is a folder; did you mean 'hf:{spec}'?")
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
