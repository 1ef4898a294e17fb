"""`LoraTrainer`: from rows to a LoRA adapter on disk, never the same training twice.

An adapter's directory is named by its recipe, the hash of base fingerprint, rows and settings; it is written under
another name and renamed, so one that exists is finished, and a finished one is only read (without importing torch).
Knows nothing of DSPy programs, metrics or how rows came about.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copa_harness.errors import TrainingError
from copa_harness.lm.local_files import hash_mapping
from copa_harness.lm.local_lora import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, model_name, read_lora, write_manifest
from copa_harness.lm.scope import current_scope
from copa_harness.tune.encoding import EncodedRow, encode_row
from copa_harness.tune.rows import TrainingRow
from copa_harness.tune.settings import LoraSettings

if TYPE_CHECKING:
    from copa_harness.lm.local import TransformersEngine

logger = logging.getLogger(__name__)

RECIPE_SCHEMA = 1
"""Raise when equal rows and settings come to give other weights."""

_one_at_a_time = threading.Lock()
"""Two trainings at once on one machine take longer than one after the other."""


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A trained LoRA adapter.

    Attributes:
        model: the name requests are sent to, `<base>@<fingerprint>`.
        directory: weights, configuration and manifest.
        fingerprint: of base, weights and configuration.
        recipe: hash of what it was made of; the directory's name.
        train_steps: optimizer steps it took, whenever that was.
        trained_now: False when it was there already.
        final_loss: held-out loss of the kept epoch, or the last training loss without held-out rows.
        n_over_long: rows left out because they were too long.
    """

    model: str
    directory: Path
    fingerprint: str
    recipe: str
    train_steps: int
    trained_now: bool
    final_loss: float
    n_over_long: int = 0


class LoraTrainer:
    """Trains LoRA adapters for an engine's base model.

    Args:
        engine: whose base model is trained; serves the adapter afterwards.
        directory: where adapters are kept, one folder each. Give the engine's `lora_dir` so that later processes
            find them by name.
    """

    def __init__(self, engine: TransformersEngine, *, directory: Path) -> None:
        self.engine = engine
        self.directory = Path(directory)

    def train(
        self,
        rows: Sequence[TrainingRow],
        *,
        settings: LoraSettings | None = None,
        held_out: Sequence[TrainingRow] = (),
        served_with: str,
    ) -> LoraAdapter:
        """Train an adapter, or read the one this recipe gave before.

        Optimizer steps taken now are added to the current scope.

        Args:
            rows: at least one.
            settings: by default `LoraSettings()`.
            held_out: rows for early stopping.
            served_with: which prompts the adapter is for, e.g. `none` or `resample:9` (see `describe_demos`);
                kept in the manifest.

        Raises:
            TrainingError: no rows, only over-long rows, a chat template that cannot be trained on, diverging loss.
            ArtifactError: the finished adapter is damaged.
        """
        from filelock import FileLock

        settings = settings or LoraSettings()
        if not rows:
            raise TrainingError(
                "got 0 rows to train on; expected at least one. If they come from traces, no example passed the "
                "metric; remedy: gold rows, finetune_data=, or a better starting program"
            )
        recipe = self.recipe(rows, settings=settings, held_out=held_out, served_with=served_with)
        target = self.directory / recipe
        if not (target / MANIFEST_FILE).exists():
            (self.directory / ".locks").mkdir(parents=True, exist_ok=True)
            with FileLock(self.directory / ".locks" / f"{recipe}.lock"):
                if not (target / MANIFEST_FILE).exists():
                    self._train_into(target, rows, settings=settings, held_out=held_out, served_with=served_with)
                    return self._adapter(target, trained_now=True)
        return self._adapter(target, trained_now=False)

    def recipe(
        self, rows: Sequence[TrainingRow], *, settings: LoraSettings, held_out: Sequence[TrainingRow], served_with: str
    ) -> str:
        """The content address of a training: 32 hex digits."""
        return hash_mapping(
            {
                "schema": RECIPE_SCHEMA,
                "base": self.engine.fingerprint(self.engine.name),
                "rows": [_plain(row) for row in rows],
                "held_out": [_plain(row) for row in held_out],
                "settings": dataclasses.asdict(settings),
                "served_with": served_with,
            }
        )[:32]

    def _adapter(self, directory: Path, *, trained_now: bool) -> LoraAdapter:
        files = read_lora(directory)
        self.engine.add_lora(directory)
        return LoraAdapter(
            model=model_name(self.engine.name, files.fingerprint),
            directory=directory,
            fingerprint=files.fingerprint,
            recipe=directory.name,
            train_steps=int(files.details["train_steps"]),
            trained_now=trained_now,
            final_loss=float(files.details["final_loss"]),
            n_over_long=int(files.details["n_over_long"]),
        )

    def _train_into(
        self,
        target: Path,
        rows: Sequence[TrainingRow],
        *,
        settings: LoraSettings,
        held_out: Sequence[TrainingRow],
        served_with: str,
    ) -> None:
        from copa_harness.lm.local_model import share_weights
        from copa_harness.tune import loop

        base = self.engine.generator.model
        longest = min(settings.max_length or base.context_length, base.context_length)
        encoded, n_over_long = self._encode(rows, longest=longest, learn_from_demos=settings.learn_from_demos)
        encoded_held_out, n_held_out_over_long = self._encode(held_out, longest=longest)
        if not encoded:
            raise TrainingError(
                f"all {len(rows)} rows are longer than {longest} tokens; remedy: fewer demonstrations in the rows, "
                f"or a larger max_length (the context of {self.engine.name} is {base.context_length})"
            )
        if n_over_long or n_held_out_over_long:
            logger.warning(
                "%d of %d training rows and %d of %d held-out rows are longer than %d tokens and are left out",
                n_over_long, len(rows), n_held_out_over_long, len(held_out), longest,
            )  # fmt: skip
        scope, n_steps, began_s = current_scope(), 0, time.monotonic()

        def count() -> None:
            nonlocal n_steps
            n_steps += 1

        with _one_at_a_time:
            try:
                model = loop.add_lora(share_weights(base.model), settings)
                outcome = loop.train(
                    model, encoded, held_out=encoded_held_out, settings=settings, pad_id=base.pad_id, on_step=count
                )
            finally:
                scope.add_train_steps(n_steps, time.monotonic() - began_s)
        details = {
            "kind": "lora",
            "base": self.engine.name,
            "recipe": target.name,
            "settings": dataclasses.asdict(settings),
            "served_with": served_with,
            "n_rows": len(encoded),
            "n_held_out": len(encoded_held_out),
            "n_over_long": n_over_long + n_held_out_over_long,
            "train_steps": outcome.n_steps,
            "losses": list(outcome.losses),
            "held_out_losses": list(outcome.held_out_losses),
            "best_epoch": outcome.best_epoch,
            "final_loss": outcome.held_out_losses[outcome.best_epoch - 1]
            if outcome.held_out_losses
            else outcome.losses[-1],
            "wall_s": round(time.monotonic() - began_s, 3),
        }
        self._write(target, model, details)

    def _encode(
        self, rows: Sequence[TrainingRow], *, longest: int, learn_from_demos: bool = False
    ) -> tuple[list[EncodedRow], int]:
        """Rows as tokens, and how many were left out for being longer than `longest`."""
        eos_ids = self.engine.eos_ids
        encoded = [
            encode_row(self.engine.chat, row, eos_ids=eos_ids, learn_from_demos=learn_from_demos) for row in rows
        ]
        kept = [row for row in encoded if len(row.ids) <= longest]
        return kept, len(encoded) - len(kept)

    def _write(self, target: Path, model: Any, details: Mapping[str, Any]) -> None:
        """Weights, configuration and manifest under a temporary name, then renamed. The recipe's lock is held."""
        import peft
        from safetensors.torch import save_file

        for left_over in self.directory.glob(f".{target.name}.*"):  # of a killed training
            shutil.rmtree(left_over)
        temporary = self.directory / f".{target.name}.{os.getpid()}"
        temporary.mkdir(parents=True)
        try:
            weights = {
                name: tensor.contiguous().cpu() for name, tensor in peft.get_peft_model_state_dict(model).items()
            }
            save_file(weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
            config = model.peft_config["default"].to_dict()
            config.update(base_model_name_or_path=None, inference_mode=True)
            # peft keeps module names in a set; their order must not change the adapter's fingerprint.
            config["target_modules"] = sorted(config["target_modules"])
            text = json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n"
            (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
            write_manifest(temporary, base_fingerprint=self.engine.fingerprint(self.engine.name), details=details)
            if target.exists():  # without a manifest: not ours to keep, and in the way of the rename
                shutil.rmtree(target)
            temporary.replace(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _plain(row: TrainingRow) -> list[Any]:
    return [row.variant, *([message["role"], message["content"]] for message in row.messages)]
