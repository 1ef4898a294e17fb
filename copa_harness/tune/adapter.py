"""`LoraAdapter`: what a training leaves behind, read from its manifest.

Knows nothing of how training works; imports neither torch nor DSPy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copa_harness.lm.local_lora import LoraFiles, model_name
from copa_harness.tune.checkpoints import checkpoint_folders


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A trained LoRA adapter, or one of its checkpoints.

    Attributes:
        model: the name requests are sent to, `<base>@<fingerprint>`.
        directory: weights, configuration and manifest.
        fingerprint: of base, weights and configuration.
        recipe: hash of what the training was made of; the name of its directory.
        train_steps: optimizer steps up to these weights or, of the training as a whole, up to its end; whenever that
            was.
        trained_now: False when it was there already.
        final_loss: held-out loss of this epoch, or its training loss without held-out rows.
        n_over_long: rows left out because they were too long, held-out ones too.
        max_tokens: most tokens a row could have; 0 when the manifest does not say.
        epoch: whose weights these are, from 1.
        steps_now: optimizer steps taken by this call: 0 for what was there, fewer than `train_steps` for a training
            taken up again.
        checkpoints: one adapter per epoch, in order; the kept epoch's has this adapter's model, directory and
            fingerprint. Empty on a checkpoint itself.
    """

    model: str
    directory: Path
    fingerprint: str
    recipe: str
    train_steps: int
    trained_now: bool
    final_loss: float
    n_over_long: int = 0
    max_tokens: int = 0
    epoch: int = 0
    steps_now: int = 0
    checkpoints: tuple[LoraAdapter, ...] = ()


def adapter_of(files: LoraFiles, *, base: str, trained_now: bool, steps_now: int) -> LoraAdapter:
    """The adapter in a finished training's folder, with its checkpoints (read when they are first served).

    Args:
        files: as `read_lora` gives them.
        base: the base model's name in requests.
        trained_now: see `LoraAdapter`.
        steps_now: see `LoraAdapter`.
    """
    details, recipe = files.details, files.directory.name
    folders = checkpoint_folders(details, files.directory.parent)
    checkpoints = tuple(
        LoraAdapter(
            model=model_name(base, str(each["fingerprint"])),
            directory=folder,
            fingerprint=str(each["fingerprint"]),
            recipe=recipe,
            train_steps=int(each["train_steps"]),
            trained_now=trained_now,
            final_loss=_loss(each),
            epoch=int(each["epoch"]),
        )
        for each, folder in zip(details["checkpoints"], folders, strict=True)
    )
    return LoraAdapter(
        model=model_name(base, files.fingerprint),
        directory=files.directory,
        fingerprint=files.fingerprint,
        recipe=recipe,
        train_steps=int(details["train_steps"]),
        trained_now=trained_now,
        final_loss=_loss(details["checkpoints"][int(details["epoch"]) - 1]),
        n_over_long=int(details["n_over_long"]),
        max_tokens=int(details.get("max_tokens", 0)),
        epoch=int(details["epoch"]),
        steps_now=steps_now,
        checkpoints=checkpoints,
    )


def _loss(checkpoint: Mapping[str, Any]) -> float:
    held_out = checkpoint["held_out_loss"]
    return float(checkpoint["loss"] if held_out is None else held_out)
