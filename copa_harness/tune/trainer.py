"""`LoraTrainer`: from rows to a LoRA adapter on disk, never the same training twice. `LoraAdapter`: what it leaves.

An adapter's directory is named by its recipe, the hash of base fingerprint, rows and settings; it appears when the
training is finished, and a finished one is only read (without importing torch). Whoever needs the same recipe in
another process, or on another machine that shares trainings, waits for the one that trains it. A training that was
killed goes on at its last epoch. Optimizer steps are held in the budget of the current scope before the first is taken.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copa_harness.documents import hash_json
from copa_harness.errors import NoTrainingRowsError, TrainingError, TrainingMemoryError
from copa_harness.formatting import duration
from copa_harness.lm.call_context import current_scope
from copa_harness.lm.local.files import LoraFiles, model_name, read_lora
from copa_harness.tune.checkpoints import (
    UnfinishedTraining,
    is_finished,
    only_one,
    remove_leftovers,
    share,
)
from copa_harness.tune.epochs import TrainingCharge, TrainingOutcome, explain_out_of_memory, run_epochs
from copa_harness.tune.forgetting import general_rows
from copa_harness.tune.options import LoraSettings
from copa_harness.tune.progress import Progress
from copa_harness.tune.rows import EncodedRow, TrainingRow, encode_row

if TYPE_CHECKING:
    from copa_harness.lm.local.engine import TransformersEngine
    from copa_harness.tune.loop import TrainingState

logger = logging.getLogger(__name__)

RECIPE_SCHEMA = 2
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
        recipe: hash of what the training was made of; the name of its directory.
        train_steps: optimizer steps up to these weights or, of the training as a whole, up to its end; whenever that
            was.
        trained_now: False when it was there already.
        final_loss: held-out loss of this epoch, or its training loss without held-out rows.
        general_losses: mean loss on general answers before the training and with these weights (see `forgetting`);
            empty where it was not measured.
        divergence: how far these weights' answers to them moved from the base model's, in nats per token; None where it
            was not measured.
        n_over_long: rows left out because they were too long, held-out ones too.
        max_tokens: most tokens a row could have; 0 when the manifest does not say.
        epoch: whose weights these are, from 1.
        steps_now: optimizer steps taken by this call: 0 for what was there, fewer than `train_steps` for a training
            taken up again.
    """

    model: str
    directory: Path
    fingerprint: str
    recipe: str
    train_steps: int
    trained_now: bool
    final_loss: float
    general_losses: tuple[float, ...] = ()
    divergence: float | None = None
    n_over_long: int = 0
    max_tokens: int = 0
    epoch: int = 0
    steps_now: int = 0

    @classmethod
    def from_files(cls, files: LoraFiles, *, base: str, trained_now: bool = False, steps_now: int = 0) -> LoraAdapter:
        """The adapter in a finished training's folder.

        Args:
            files: as `read_lora` gives them.
            base: the base model's name in requests.
            trained_now: see `LoraAdapter`.
            steps_now: see `LoraAdapter`.
        """
        details, epoch = files.details, int(files.details["epoch"])
        general, divergences = details.get("general_losses") or (), details.get("divergences") or ()
        held_out = details["held_out_loss"]
        return cls(
            model=model_name(base, files.fingerprint),
            directory=files.directory,
            fingerprint=files.fingerprint,
            recipe=files.directory.name,
            train_steps=int(details["train_steps"]),
            trained_now=trained_now,
            final_loss=float(details["loss"] if held_out is None else held_out),
            general_losses=(float(general[0]), float(general[epoch])) if general else (),
            divergence=float(divergences[epoch - 1]) if len(divergences) >= epoch else None,
            n_over_long=int(details["n_over_long"]),
            max_tokens=int(details.get("max_tokens", 0)),
            epoch=epoch,
            steps_now=steps_now,
        )


@dataclass(frozen=True, slots=True)
class _Job:
    """One training to be done."""

    recipe: str
    rows: Sequence[TrainingRow]
    held_out: Sequence[TrainingRow]
    settings: LoraSettings
    served_with: str


@dataclass(frozen=True, slots=True)
class _EncodedRows:
    """Its rows as tokens, how many were too long, and what a row may have."""

    rows: Sequence[EncodedRow]
    held_out: Sequence[EncodedRow]
    n_over_long: int
    max_tokens: int


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
        """Train an adapter, or read the one this recipe gave before; a damaged one is trained again.

        The steps of the whole training are charged to the current scope's ceilings, once per scope, also when some or
        all of them were taken earlier; those taken now are what its usage shows.

        Args:
            rows: at least one.
            settings: by default `LoraSettings()`.
            held_out: rows for early stopping.
            served_with: which prompts the adapter is for, e.g. `none` or `resample:9` (see `RowDemos`);
                kept in the manifest.

        Raises:
            BudgetExhausted: the steps do not fit under a ceiling (nothing was trained), or the seconds are over (what
                was trained up to the last epoch is kept, to go on from).
            TrainingError: no rows, only over-long rows, a chat template that cannot be trained on, diverging loss.
            TrainingMemoryError: a step needs more memory than there is (what was trained up to the last epoch is kept,
                to go on from).
        """
        settings = settings or LoraSettings()
        if not rows:
            raise TrainingError(
                "got 0 rows to train on; expected at least one. If they come from traces, no example passed the "
                "metric; remedy: gold rows, finetune_data=, or a better starting program"
            )
        recipe = self.recipe(rows, settings=settings, held_out=held_out, served_with=served_with)
        if not is_finished(self.directory, recipe):
            with only_one(self.directory, recipe):
                if not is_finished(self.directory, recipe):
                    steps_now = self._train(_Job(recipe, rows, held_out, settings, served_with))
                    share(self.directory, recipe)
                    return self._adapter(recipe, steps_now=steps_now)
        return self._adapter(recipe)

    def recipe(
        self, rows: Sequence[TrainingRow], *, settings: LoraSettings, held_out: Sequence[TrainingRow], served_with: str
    ) -> str:
        """The content address of a training: 32 hex digits."""
        return hash_json(
            {
                "schema": RECIPE_SCHEMA,
                "base": self.engine.fingerprint(self.engine.name),
                "rows": [_plain(row) for row in rows],
                "held_out": [_plain(row) for row in held_out],
                "settings": dataclasses.asdict(settings),
                "served_with": served_with,
            }
        )[:32]

    def _adapter(self, recipe: str, *, steps_now: int | None = None) -> LoraAdapter:
        """The finished adapter, known to the engine; `steps_now` is None when it was there already."""
        files = read_lora(self.directory / recipe)
        if steps_now is None:
            planned, taken = int(files.details["planned_steps"]), int(files.details["train_steps"])
            TrainingCharge(current_scope(), recipe, planned=planned, taken_before=planned).settle(taken)
        adapter = LoraAdapter.from_files(
            files, base=self.engine.name, trained_now=steps_now is not None, steps_now=steps_now or 0
        )
        self.engine.add_lora(adapter.directory)
        return adapter

    def _train(self, job: _Job) -> int:
        """Train and publish; the optimizer steps taken now. The recipe's lock is held."""
        from copa_harness.tune import loop

        encoded = self._encoded(job, context_length=self.engine.generator.model.context_length)
        remove_leftovers(self.directory, own=job.recipe)
        base_fingerprint = self.engine.fingerprint(self.engine.name)
        unfinished = UnfinishedTraining(self.directory, job.recipe, base_fingerprint=base_fingerprint)
        state = unfinished.load_state()
        before = 0 if state is None else int(state.record["n_steps"])
        planned = loop.count_steps(encoded.rows, job.settings)
        charge = TrainingCharge(current_scope(), job.recipe, planned=planned, taken_before=before)
        progress, began_s = Progress(planned, n_done=before), time.monotonic()
        try:
            with _one_at_a_time:
                if state is not None:
                    logger.info("LoRA training %s goes on after step %d", job.recipe, before)
                outcome = self._run(job, encoded, unfinished, state=state, progress=progress, charge=charge)
            wall_s = time.monotonic() - began_s
            logger.info(
                "LoRA training: %d steps in %s, %d epochs, epoch %d kept",
                outcome.n_steps - before,
                duration(wall_s),
                len(outcome.losses),
                outcome.best_epoch,
            )
            own = {"kind": "lora", "planned_steps": planned, "best_epoch": outcome.best_epoch}
            of_epoch = outcome.details(outcome.best_epoch)
            unfinished.publish(details={**self._details(job, encoded), **of_epoch, **own, "wall_s": round(wall_s, 3)})
        except TrainingMemoryError:
            raise
        except TrainingError:
            unfinished.discard()  # it would fail again in the same way
            raise
        finally:
            charge.settle(progress.n_done)
            current_scope().add_train_steps(progress.n_done - before, time.monotonic() - began_s)
        return outcome.n_steps - before

    def _run(
        self,
        job: _Job,
        encoded: _EncodedRows,
        unfinished: UnfinishedTraining,
        *,
        state: TrainingState | None,
        progress: Progress,
        charge: TrainingCharge,
    ) -> TrainingOutcome:
        """All epochs that are left."""
        from copa_harness.lm.local.model import share_weights
        from copa_harness.tune import loop

        base = self.engine.generator.model
        with explain_out_of_memory(
            job.recipe, device=base.device, rows=encoded.rows, settings=job.settings, progress=progress
        ):
            training = loop.Training(
                loop.add_lora(share_weights(base.model), job.settings),
                encoded.rows,
                held_out=encoded.held_out,
                general=general_rows(base.directory, chat=self.engine.chat, eos_ids=self.engine.eos_ids),
                settings=job.settings,
                pad_id=base.pad_id,
            )
            if state is not None:
                training.restore(state)
            with progress:  # not before: loading the library's model is no part of a step's time
                return run_epochs(training, unfinished, progress=progress, before_step=charge.check_seconds)

    def _details(self, job: _Job, encoded: _EncodedRows) -> Mapping[str, Any]:
        """What the manifest says of the training."""
        return {
            "base": self.engine.name,
            "recipe": job.recipe,
            "settings": dataclasses.asdict(job.settings),
            "served_with": job.served_with,
            "n_rows": len(encoded.rows),
            "n_held_out": len(encoded.held_out),
            "n_over_long": encoded.n_over_long,
            "max_tokens": encoded.max_tokens,
        }

    def _encoded(self, job: _Job, *, context_length: int) -> _EncodedRows:
        longest = min(job.settings.max_length or context_length, context_length)
        rows, n_long = self._encode(job.rows, longest=longest, learn_from_demos=job.settings.learn_from_demos)
        held_out, n_long_held_out = self._encode(job.held_out, longest=longest)
        if not rows:
            raise NoTrainingRowsError(
                f"all {len(job.rows)} rows are longer than {longest} tokens; remedy: fewer demonstrations in the rows, "
                f"or a larger max_length (the context of {self.engine.name} is {context_length})"
            )
        if n_long or n_long_held_out:
            logger.warning(
                "%d of %d training rows and %d of %d held-out rows are longer than %d tokens and are left out",
                n_long,
                len(job.rows),
                n_long_held_out,
                len(job.held_out),
                longest,
            )
        return _EncodedRows(rows, held_out, n_long + n_long_held_out, longest)

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


def _plain(row: TrainingRow) -> list[Any]:
    return [row.variant, *([message["role"], message["content"]] for message in row.messages)]
