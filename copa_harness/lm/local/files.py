"""What a local model is on disk: model folders, LoRA folders, and the hash of everything that shapes an answer.

Three parts: model folders and their fingerprint (`base_fingerprint`); LoRA folders, which hold
`adapter_model.safetensors`, `adapter_config.json` and `manifest.json`, and the check that all still match
(`read_lora`); weights somebody only has as a pickle (`convert_pickled`). What was computed from files is remembered by
their paths, modification times and sizes (`remembered`), since a fingerprint is asked for at every request.

Reading a pickle can run whatever its author wrote into it. So nothing here or elsewhere does, but for one case: a user
said `allow_pickled_weights`, and the folder holds no safetensors. Then torch's restricted unpickler
(`torch.load(weights_only=True)`, tensors and plain containers only) reads `pytorch_model*.bin` through transformers,
once, and a copy of the model in safetensors is kept. That copy is what is hashed, mapped into memory, served and
trained; the pickle is not opened again.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from copa_harness import documents
from copa_harness.atomic_files import write_atomic
from copa_harness.errors import ArtifactError, ConfigurationError, OutOfMemoryError
from copa_harness.lm.local.memory import is_out_of_memory, oom_message

logger = logging.getLogger(__name__)

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

PICKLED = "pytorch_model*.bin"
"""Names under which transformers looks for pickled weights."""

CONVERSION_SCHEMA = 1
"""Raise when the same pickle comes to be rewritten differently."""

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


def resolve_model_directory(path: Path | str, *, rewrite_pickled_in: Path | None = None) -> Path:
    """The folder that holds a model: `path` itself, or the local snapshot of a Hugging Face id.

    An id that is not in the Hugging Face cache yet is fetched (safetensors, tokenizer and configuration
    only), unless `HF_HUB_OFFLINE=1`; that is the one place where this package may use the network.

    Args:
        path: a folder or an id.
        rewrite_pickled_in: where weights that come as a pickle only are kept as safetensors (see `convert_pickled`);
            None leaves them alone, and they are refused when they are to be read.

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
    return convert_pickled(directory, keep_in=rewrite_pickled_in)


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
    return documents.hash_json({"base": base_fingerprint, "files": dict(files)})


def convert_pickled(directory: Path, *, keep_in: Path) -> Path:
    """A model folder with safetensors: `directory` itself if it holds some, else its rewritten copy.

    Args:
        directory: the model folder.
        keep_in: where copies are kept, one folder per content of the originals.

    Raises:
        ConfigurationError: the pickle holds more than tensors, or transformers cannot load it.
        OutOfMemoryError: it does not fit in memory.
    """
    pickles = sorted(directory.glob(PICKLED))
    if any(directory.glob("*.safetensors")) or not pickles:
        return directory
    kept = [directory / name for name in SHAPING_FILES if (directory / name).is_file()]
    files = {file.name: hash_file(file) for file in [*pickles, *kept]}
    digest = documents.hash_json({"schema": CONVERSION_SCHEMA, "files": files})
    target = keep_in / f"{directory.name}-{digest[:16]}"
    if target.is_dir():
        return target
    keep_in.mkdir(parents=True, exist_ok=True)
    with FileLock(keep_in / f".{target.name}.lock"):
        if not target.is_dir():
            partial = keep_in / f".{target.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            try:
                _rewrite(directory, kept, partial)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            logger.warning(
                "read the pickled weights of %s with torch's restricted unpickler; kept as safetensors in %s",
                directory,
                target,
            )
    return target


def _rewrite(directory: Path, kept: list[Path], target: Path) -> None:
    import transformers

    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype="auto",
            use_safetensors=False,
            weights_only=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except pickle.UnpicklingError as error:
        raise ConfigurationError(
            f"the pickled weights of {directory} hold more than tensors ({_what_is_refused(error)}) and are refused; "
            "remedy: get them as safetensors from whoever made them"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, MemoryError) as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"memory does not suffice to rewrite the pickled weights of {directory} ({oom_message(error)}); "
                "remedy: rewrite them as safetensors on a larger machine"
            ) from error
        raise ConfigurationError(
            f"could not load the pickled weights of {directory} as a causal language model: {error}"
        ) from error
    model.generation_config = transformers.GenerationConfig()  # the folder's own comes with the files below
    model.save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)
    for file in kept:
        shutil.copyfile(file, target / file.name)
    if (directory / "additional_chat_templates").is_dir():
        shutil.copytree(directory / "additional_chat_templates", target / "additional_chat_templates")


def _what_is_refused(error: pickle.UnpicklingError) -> str:
    """What the unpickler would not take, without torch's advice to take it all the same."""
    text = str(error)
    if match := re.search(r"GLOBAL (\S+)", text):
        return f"it names {match[1]}"
    match = re.search(r"WeightsUnpickler error: (.{1,300})", text)
    return match[1].strip() if match else "the restricted unpickler refuses it"
