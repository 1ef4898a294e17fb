"""What a local model is on disk: model folders, LoRA folders, and the hash of everything that shapes an answer.

Two parts: model folders and their fingerprint (`base_fingerprint`); LoRA folders, which hold
`adapter_model.safetensors`, `adapter_config.json` and `manifest.json`, and the check that all still match
(`read_lora`). What was computed from files is remembered by their paths, modification times and sizes (`remembered`),
since a fingerprint is asked for at every request.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from copa_harness import documents
from copa_harness.atomic_files import write_atomic
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

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
MANIFEST_FILE = "manifest.json"

NAME_DIGITS = 12
"""Hex digits of the fingerprint that go into a fine-tuned model's name."""

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


def hash_file(path: Path) -> str:
    """Sha256 of a file's bytes, in hex; computed once for each (path, mtime, size).

    Raises:
        ArtifactError: the file is not there.
    """
    try:
        return remembered(("file", path), [path], lambda: documents.hash_file(path))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"got no file at {path}; expected a complete model folder; remedy: fetch it again"
        ) from error


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return (-1, -1)
    return (status.st_mtime_ns, status.st_size)


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
        lambda: documents.hash_json(
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
        names = sorted(entry.name for entry in directory.iterdir())
        raise ConfigurationError(
            f"got the folder {directory} with {', '.join(names) or 'nothing'}; expected config.json and *.safetensors"
            f"{_other_weights(directory, names)}"
        )
    files = [*weights, *(directory / name for name in SHAPING_FILES if (directory / name).is_file())]
    files += sorted((directory / "additional_chat_templates").glob("*.jinja"))
    return files


def _other_weights(directory: Path, names: Sequence[str]) -> str:
    """What helps in a folder without safetensors that has weights in another format."""
    if file := next((name for name in names if name.lower().endswith(".gguf")), None):
        return f"; did you mean 'gguf:{directory / file}'?"
    if not any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return ""
    return (
        " (pickled weights such as pytorch_model.bin can run code when they are read, and are refused); remedy: "
        "rewrite them with `model.save_pretrained(folder)`, which writes safetensors, or insist with "
        "--copa-allow-pickled-weights or build_lm(..., allow_pickled_weights=True): they are then read once by "
        "torch's restricted unpickler and kept as safetensors"
    )


@dataclass(frozen=True, slots=True)
class LoraFiles:
    """One trained LoRA adapter on disk.

    `fingerprint` covers the base model and the adapter's weights and configuration; `details` is the whole manifest.
    """

    directory: Path
    fingerprint: str
    base_fingerprint: str
    details: Mapping[str, Any]


def model_name(base: str, fingerprint: str) -> str:
    """The name requests are sent to: `<base>@<first digits of the fingerprint>`."""
    return f"{base}@{fingerprint[:NAME_DIGITS]}"


def split_model_name(model: str) -> tuple[str, str | None]:
    """`embedded@0123456789ab` -> (`embedded`, `0123456789ab`); without a LoRA adapter the second is None."""
    base, separator, digits = model.rpartition("@")
    if separator and len(digits) == NAME_DIGITS and all(digit in "0123456789abcdef" for digit in digits):
        return base, digits
    return model, None


def write_manifest(directory: Path, *, base_fingerprint: str, details: Mapping[str, Any]) -> LoraFiles:
    """Hash the adapter's files and write `manifest.json` beside them; returns what `read_lora` would."""
    files = {name: hash_file(directory / name) for name in (WEIGHTS_FILE, CONFIG_FILE)}
    manifest = {
        "schema": 1,
        "fingerprint": _lora_fingerprint(base_fingerprint, files),
        "base_fingerprint": base_fingerprint,
        "files": files,
        **details,
    }
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomic(directory / MANIFEST_FILE, text)
    return LoraFiles(directory, str(manifest["fingerprint"]), base_fingerprint, manifest)


def read_lora(directory: Path) -> LoraFiles:
    """Read a LoRA directory and check every file against its manifest.

    Raises:
        ArtifactError: something is missing, or a file's hash is not the manifest's.
    """
    paths = [directory / name for name in (MANIFEST_FILE, WEIGHTS_FILE, CONFIG_FILE)]
    return remembered(("lora", directory), paths, lambda: _read_lora(directory))


def _read_lora(directory: Path) -> LoraFiles:
    remedy = f"remedy: delete {directory} and train again (the same training gives the same adapter)"
    path = directory / MANIFEST_FILE
    try:
        manifest = documents.parse_json(path.read_bytes())
        files: dict[str, str] = dict(manifest["files"])
        base, fingerprint = str(manifest["base_fingerprint"]), str(manifest["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"got no usable manifest at {path} ({type(error).__name__}: {error}); expected a LoRA directory with "
            f"{WEIGHTS_FILE}, {CONFIG_FILE} and {MANIFEST_FILE}; {remedy}"
        ) from error
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        got = hash_file(directory / name) if (directory / name).is_file() else "no file"
        if got != files.get(name):
            raise ArtifactError(
                f"the LoRA adapter is damaged: got sha256 {got} for {directory / name}, expected {files.get(name)}; "
                f"{remedy}"
            )
    if fingerprint != _lora_fingerprint(base, files):
        raise ArtifactError(f"the manifest {path} does not match itself (fingerprint {fingerprint}); {remedy}")
    return LoraFiles(directory, fingerprint, base, manifest)


def find_lora(lora_dir: Path, digits: str) -> Path | None:
    """The directory under `lora_dir` whose manifest's fingerprint begins with `digits`, or None."""
    if not lora_dir.is_dir():
        return None
    for path in sorted(lora_dir.glob(f"*/{MANIFEST_FILE}")):
        try:
            fingerprint = str(documents.parse_json(path.read_bytes()).get("fingerprint", ""))
        except (OSError, ValueError, AttributeError):
            continue  # not ours, or damaged: if it was the one asked for, the caller reports it as not found
        if fingerprint.startswith(digits):
            return path.parent
    return None


def _lora_fingerprint(base_fingerprint: str, files: Mapping[str, str]) -> str:
    return documents.hash_json({"base": base_fingerprint, "files": dict(files)})
