"""What a local model is made of, on disk: where its files lie and the hash of everything that shapes an answer.

Knows nothing of torch: a run answered wholly from the cache fingerprints its models here and never imports
torch or transformers. What was computed from files is
remembered by their paths, modification times and sizes, since a fingerprint is asked for at every request.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from copa_harness.errors import ArtifactError, ConfigurationError

FINGERPRINT_SCHEMA = 1
"""Raise when the engine itself starts to answer differently from equal files."""

SHAPING_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files beside the weights that shape a model's answers, where a folder has them."""

Stamp = tuple[tuple[int, int], ...]
"""(mtime in ns, size in bytes) of several paths."""

Value = TypeVar("Value")

_remembered: dict[Hashable, tuple[Stamp, Any]] = {}
_remembered_lock = threading.Lock()


def remembered(key: Hashable, paths: Sequence[Path], compute: Callable[[], Value]) -> Value:
    """`compute()`, or its last result if modification time and size of all `paths` are as they were then.

    A path that does not exist counts as a state of its own.
    """
    stamp = tuple(map(_stamp, paths))
    with _remembered_lock:
        known = _remembered.get(key)
    if known is not None and known[0] == stamp:
        value: Value = known[1]
        return value
    value = compute()
    with _remembered_lock:
        _remembered[key] = (stamp, value)
    return value


def hash_mapping(value: Mapping[str, Any]) -> str:
    """Sha256, in hex, of a JSON mapping in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Sha256 of a file's bytes, in hex; computed once for each (path, mtime, size).

    Raises:
        ArtifactError: the file is not there.
    """
    return remembered(("file", path), [path], lambda: _hash_file(path))


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"got no file at {path}; expected a complete model folder; remedy: fetch it again"
        ) from error
    return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return (-1, -1)
    return (status.st_mtime_ns, status.st_size)


def resolve_model_directory(path: Path | str, *, rewrite_pickled_in: Path | None = None) -> Path:
    """The folder that holds a model: `path` itself, or the local snapshot of a Hugging Face id.

    An id that is not in the Hugging Face cache yet is fetched (safetensors, tokenizer and configuration
    only), unless `HF_HUB_OFFLINE=1`; that is the one place where this package may use the network.

    Args:
        path: a folder or an id.
        rewrite_pickled_in: where weights that come as a pickle only are kept as safetensors (see `local_pickled`); None
            leaves them alone, and they are refused when they are to be read.

    Raises:
        ConfigurationError: neither a model folder nor an id that can be had, or a pickle that holds more than tensors.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        directory = directory.resolve()
    else:
        directory = _snapshot(path, ())
        if rewrite_pickled_in is not None and not any(directory.glob("*.safetensors")):
            directory = _snapshot(path, ("pytorch_model*.bin",))
    if rewrite_pickled_in is None:
        return directory
    from copa_harness.lm.local_pickled import rewritten

    return rewritten(directory, keep_in=rewrite_pickled_in)


def _snapshot(path: Path | str, more_patterns: Sequence[str]) -> Path:
    directory = Path(path).expanduser()
    spec = os.fspath(path)
    if directory.is_absolute() or spec.count("/") != 1 or spec.startswith("."):
        raise ConfigurationError(
            f"got hf:{spec}, which is not a folder; expected a folder with config.json and *.safetensors, "
            "or a Hugging Face id such as hf:HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", *more_patterns]
    try:
        found = Path(snapshot_download(spec, allow_patterns=patterns, local_files_only=True))
        if has_all_weights(found, more_patterns or ("*.safetensors",)):
            return found
    except LocalEntryNotFoundError:
        pass  # not fetched yet, or not to the end: the next call does
    try:
        return Path(snapshot_download(spec, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigurationError(
            f"got hf:{spec}, which is not, or not completely, in the Hugging Face cache and could not be fetched "
            f"({error}); remedy: check the id and the connection, or download it and give the folder"
        ) from error


def has_all_weights(directory: Path, patterns: Sequence[str]) -> bool:
    """Whether a folder has weights of such names and every file that an index of theirs lists."""
    if not any(any(directory.glob(pattern)) for pattern in patterns):
        return False
    for pattern in patterns:
        for index in directory.glob(f"{pattern}.index.json"):
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            if not all((directory / name).exists() for name in set(listed)):
                return False
    return True


def base_fingerprint(directory: Path, *, dtype: str, chat_template: str | None = None) -> str:
    """Hash of everything that shapes a base model's answers: weights, tokenizer, chat template, configuration, dtype.

    Args:
        directory: the model folder.
        dtype: the arithmetic's type, e.g. `float32`.
        chat_template: a template that replaces the folder's own, if the caller gave one.

    Raises:
        ConfigurationError: the folder holds no safetensors weights or no config.json.
    """
    files = shaping_files(directory)
    return remembered(
        ("base", directory, dtype, chat_template),
        files,
        lambda: hash_mapping(
            {
                "schema": FINGERPRINT_SCHEMA,
                "files": {file.relative_to(directory).as_posix(): hash_file(file) for file in files},
                "dtype": dtype,
                "chat_template": chat_template,
            }
        ),
    )


def shaping_files(directory: Path) -> list[Path]:
    """The files of a model folder that shape its answers.

    Raises:
        ConfigurationError: the folder holds no safetensors weights or no config.json.
    """
    return remembered(("listing", directory), [directory], lambda: _shaping_files(directory))


def _shaping_files(directory: Path) -> list[Path]:
    weights = sorted(directory.glob("*.safetensors"))
    if not weights or not (directory / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in directory.iterdir())) or "nothing"
        raise ConfigurationError(
            f"got the folder {directory} with {found}; expected config.json and *.safetensors "
            "(pickled weights such as pytorch_model.bin can run code when they are read, and are refused); remedy: "
            "rewrite them with `model.save_pretrained(folder)`, which writes safetensors, or insist with "
            "--copa-allow-pickled-weights or build_lm(..., allow_pickled_weights=True): they are then read once by "
            "torch's restricted unpickler and kept as safetensors"
        )
    files = [*weights, *(directory / name for name in SHAPING_FILES if (directory / name).is_file())]
    files += sorted((directory / "additional_chat_templates").glob("*.jinja"))
    return files
