"""LoRA adapters as files: the manifest beside the weights, the fingerprint, and the check that both still match.

A LoRA directory holds `adapter_model.safetensors`, `adapter_config.json` and `manifest.json`. Knows nothing of
torch or of how the weights came about; a manifest may carry any further fields its trainer wants to keep.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copa_harness.errors import ArtifactError
from copa_harness.lm.local_files import hash_file, hash_mapping, remembered

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
MANIFEST_FILE = "manifest.json"
NAME_DIGITS = 12
"""Hex digits of the fingerprint that go into a fine-tuned model's name."""


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
    temporary = directory / f".{MANIFEST_FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(directory / MANIFEST_FILE)
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
        manifest = json.loads(path.read_text(encoding="utf-8"))
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
            fingerprint = str(json.loads(path.read_text(encoding="utf-8")).get("fingerprint", ""))
        except (OSError, ValueError, AttributeError):
            continue  # not ours, or damaged: if it was the one asked for, the caller reports it as not found
        if fingerprint.startswith(digits):
            return path.parent
    return None


def _lora_fingerprint(base_fingerprint: str, files: Mapping[str, str]) -> str:
    return hash_mapping({"base": base_fingerprint, "files": dict(files)})
