"""A training's files: the best epoch so far, the state to go on from, and the way to where the adapter is served.

While it lasts everything lies in `<directory>/.unfinished/<recipe>/`: `best/` (a complete LoRA folder) and
`state.safetensors` (weights, optimizer moments, a JSON record in the header; no pickle), which each epoch replaces. At
the end the folder moves to `<directory>/<recipe>/`. Everything is written under another name and renamed. Whoever
writes holds the recipe's lock, so what lies half-written under a free lock belongs to nobody.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from copa_harness.atomic_files import write_atomic
from copa_harness.documents import canonical_json
from copa_harness.errors import ArtifactError
from copa_harness.lm.local.files import (
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    find_lora,
    read_lora,
    write_manifest,
)
from copa_harness.shared_files import current_files
from copa_harness.tune.loop import TrainingState

logger = logging.getLogger(__name__)

STATE_SCHEMA = 2
STATE_FILE = "state.safetensors"
BEST = "best"
UNFINISHED = ".unfinished"
LOCKS = ".locks"
PARTIAL = ".partial"
ABANDONED_AFTER_S = 14 * 24 * 3600.0
"""An interrupted training nobody took up for so long is thrown away."""


def recipe_lock(directory: Path, recipe: str, *, timeout: float = -1) -> FileLock:
    """The lock that whoever trains a recipe holds, in any process."""
    (directory / LOCKS).mkdir(parents=True, exist_ok=True)
    return FileLock(directory / LOCKS / f"{recipe}.lock", timeout=timeout)


def remove_leftovers(directory: Path, *, own: str) -> None:
    """Delete what killed trainings left half-written, and interrupted ones nobody took up for two weeks.

    Args:
        directory: of the LoRA adapters.
        own: the recipe whose lock the caller holds.
    """
    for folder in (directory / UNFINISHED).glob("*"):
        if folder.name == own:
            _remove_partial(folder)
            continue
        try:
            with recipe_lock(directory, folder.name, timeout=0):
                _remove_partial(folder)
                state = folder / STATE_FILE
                if not state.exists() or time.time() - state.stat().st_mtime > ABANDONED_AFTER_S:
                    shutil.rmtree(folder, ignore_errors=True)
        except (Timeout, OSError):
            continue  # being trained at this moment, or cleaned by somebody else


def _remove_partial(folder: Path) -> None:
    for leftover in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)


class UnfinishedTraining:
    """The folder of one training in progress. Whoever makes one holds the recipe's lock.

    Args:
        directory: of the LoRA adapters.
        recipe: the training's content address.
        base_fingerprint: of the model the adapters are for.
    """

    def __init__(self, directory: Path, recipe: str, *, base_fingerprint: str) -> None:
        self._directory, self._recipe, self._base = directory, recipe, base_fingerprint
        self._folder = directory / UNFINISHED / recipe

    def save_state(self, state: TrainingState) -> None:
        """Replace the state to go on from."""
        import torch
        from safetensors.torch import save

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        record = {
            "schema": STATE_SCHEMA,
            "recipe": self._recipe,
            "torch": torch.__version__,
            "sha256": _hash_tensors(tensors),
            "training": state.record,
        }
        write_atomic(self._folder / STATE_FILE, save(tensors, metadata={"record": canonical_json(record)}))

    def load_state(self) -> TrainingState | None:
        """What `save_state` wrote last; None when there is nothing, or nothing that can be used (with a warning)."""
        import torch
        from safetensors import SafetensorError, safe_open

        path = self._folder / STATE_FILE
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads((file.metadata() or {})["record"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            if record["sha256"] != _hash_tensors(tensors):
                raise ValueError("its checksum does not match")
            if (record["schema"], record["recipe"], record["torch"]) != (STATE_SCHEMA, self._recipe, torch.__version__):
                raise ValueError("it was written by another version of this package or of torch")
            return TrainingState(tensors, record["training"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("the interrupted training at %s cannot be taken up (%s); it begins anew", path, error)
            self.discard()
            return None

    def write_best(self, model: Any) -> None:
        """Write the LoRA weights `model` holds now, in place of those of an earlier epoch."""
        import peft
        from safetensors.torch import save

        partial = self._folder / f"{BEST}{PARTIAL}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights = {name: tensor.contiguous().cpu() for name, tensor in peft.get_peft_model_state_dict(model).items()}
        write_atomic(partial / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))
        config = model.peft_config["default"].to_dict()
        config.update(base_model_name_or_path=None, inference_mode=True)
        # peft keeps module names in a set; their order must not change the adapter's fingerprint.
        config["target_modules"] = sorted(config["target_modules"])
        write_atomic(partial / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n")
        _replace_folder(partial, self._folder / BEST)

    def publish(self, *, details: Mapping[str, Any]) -> None:
        """Move the best epoch to where it is served, with `details` in its manifest."""
        write_manifest(self._folder / BEST, base_fingerprint=self._base, details=details)
        _replace_folder(self._folder / BEST, self._directory / self._recipe)
        self.discard()

    def discard(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)


def is_finished(directory: Path, recipe: str) -> bool:
    """Whether a recipe's adapter is there and whole; a damaged one is told of."""
    if not (directory / recipe / MANIFEST_FILE).exists():
        return False
    try:
        read_lora(directory / recipe)
    except ArtifactError as error:
        logger.warning("LoRA training %s is done again, in place of a damaged one (%s)", recipe, error)
        return False
    return True


@contextmanager
def only_one(directory: Path, recipe: str) -> Iterator[None]:
    """While the block runs, nobody else trains the recipe, in any process of any machine that shares trainings.

    What another machine had finished by then is taken from it; a killed one's claim lapses.
    """
    with recipe_lock(directory, recipe), nullcontext() if (files := current_files()) is None else files.alone(recipe):
        if files is not None:
            files.get(f"lora/{recipe}", directory / recipe)
        yield


def share(directory: Path, recipe: str) -> None:
    """Keep a finished training where machines share theirs, if they do."""
    if (files := current_files()) is not None:
        files.put(f"lora/{recipe}", directory / recipe, anew=True)  # another that is there is damaged


def is_whole(directory: Path, digits: str) -> bool:
    """Whether the adapter whose fingerprint begins with `digits` lies under `directory`, undamaged."""
    try:
        folder = find_lora(directory, digits)
        return folder is not None and bool(read_lora(folder))
    except ArtifactError:
        return False


def restore(directory: Path, digits: str, *, copy: Path) -> None:
    """Put an adapter back where `find_lora` finds it, in place of a damaged one.

    Args:
        directory: of the LoRA adapters.
        digits: the first ones of its fingerprint.
        copy: a folder that holds it too.

    Raises:
        ArtifactError: The copy is damaged, or of another adapter.
    """
    files = read_lora(copy)
    if not files.fingerprint.startswith(digits):
        raise ArtifactError(f"got the LoRA adapter {files.fingerprint[:12]} in {copy}; expected {digits}")
    recipe = str(files.details.get("recipe", digits))
    with recipe_lock(directory, recipe):
        if is_whole(directory, digits):  # another process was faster
            return
        target = find_lora(directory, digits) or directory / (recipe if files.details.get("kind") == "lora" else digits)
        partial = directory / UNFINISHED / recipe / f"{target.name}{PARTIAL}"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(copy, partial)
        _replace_folder(partial, target)


def _replace_folder(source: Path, target: Path) -> None:
    if target.exists():  # of an earlier training of the same recipe, or without a manifest: in the way
        shutil.rmtree(target)
    source.rename(target)


def _hash_tensors(tensors: Mapping[str, Any]) -> str:
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
