"""The epochs of a training; what they are charged; what they say without memory.

A training is charged to the budget of a run: all its steps are held before the first one is taken. Steps that were
taken before (by a training that was killed, or one that is finished and only read) count against the scope's ceilings
as they did then, so that a run begun again stops where an uninterrupted one does; the ledger of the whole run counts
only what is paid now. A scope is charged once for a recipe.

A training that memory does not hold is one error that says where, how much at once, and what takes less.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from copa_harness.errors import BudgetExhausted, TrainingMemoryError
from copa_harness.lm.budget.cost import Cost, Reservation
from copa_harness.lm.budget.scope import Scope
from copa_harness.lm.local.memory import is_out_of_memory, oom_message
from copa_harness.tune.options import LoraSettings
from copa_harness.tune.progress import Progress
from copa_harness.tune.rows import EncodedRow

if TYPE_CHECKING:
    from copa_harness.tune.checkpoints import UnfinishedTraining
    from copa_harness.tune.loop import Training


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """What a training has come to.

    Attributes:
        n_steps: optimizer steps taken altogether.
        best_epoch: the epoch to keep, from 1.
        losses: mean training loss by epoch, in nats per answer token.
        held_out_losses: the same on held-out rows; empty without such rows.
        general_losses: the same on general rows, before the training and by epoch; empty without such rows.
        divergences: how far answers to them moved from the base model's, by epoch, in nats per token.
    """

    n_steps: int
    best_epoch: int
    losses: tuple[float, ...]
    held_out_losses: tuple[float, ...]
    general_losses: tuple[float, ...]
    divergences: tuple[float, ...]

    @classmethod
    def of(cls, training: Training) -> TrainingOutcome:
        """Of a training as it stands."""
        losses, held_out = tuple(training.losses), tuple(training.held_out_losses)
        general, divergences = tuple(training.general_losses), tuple(training.divergences)
        return cls(training.n_steps, training.best_epoch, losses, held_out, general, divergences)

    def details(self, epoch: int) -> dict[str, Any]:
        """For the manifest of the weights of `epoch`."""
        return {
            "epoch": epoch,
            "train_steps": self.n_steps,
            "losses": list(self.losses),
            "held_out_losses": list(self.held_out_losses),
            "general_losses": list(self.general_losses),
            "divergences": list(self.divergences),
            "loss": self.losses[epoch - 1],
            "held_out_loss": self.held_out_losses[epoch - 1] if self.held_out_losses else None,
        }


def run_epochs(
    training: Training,
    unfinished: UnfinishedTraining,
    *,
    progress: Progress,
    before_step: Callable[[], None],
) -> TrainingOutcome:
    """Train the epochs that are left and write, after each, its weights if they are the best, and the state.

    Args:
        training: at its beginning, or restored.
        unfinished: where to write.
        progress: hears of every step.
        before_step: called before every optimizer step.

    Raises:
        TrainingError: see `Training.run_epoch`.
    """
    while not training.finished:
        training.run_epoch(progress, before_step=before_step)
        if training.best_epoch == training.n_epochs:
            unfinished.write_best(training.model)
        unfinished.save_state(training.state())
    return TrainingOutcome.of(training)


_charged: weakref.WeakKeyDictionary[Scope, set[str]] = weakref.WeakKeyDictionary()
"""The recipes each scope has been charged for."""

_charged_lock = threading.Lock()


class TrainingCharge:
    """Reserves the steps of one training in a scope, from now until `settle`.

    Args:
        scope: whose budget pays.
        recipe: the training's content address.
        planned: steps of the whole training, if it is not stopped early.
        taken_before: how many of them need not be paid any more.

    Raises:
        BudgetExhausted: they do not fit under a ceiling.
    """

    def __init__(self, scope: Scope, recipe: str, *, planned: int, taken_before: int) -> None:
        self._scope, self._recipe, self._before = scope, recipe, taken_before
        self._replayed: Reservation | None = None
        self._paid: Reservation | None = None
        with _charged_lock:
            free = recipe in _charged.get(scope, ())
        if taken_before and not free:
            self._replayed = scope.reserve(Cost(train_steps=taken_before), replayed=True)
        if planned > taken_before:
            try:
                self._paid = scope.reserve(Cost(train_steps=planned - taken_before))
            except BaseException:
                if self._replayed is not None:
                    self._replayed.release()
                raise

    def check_seconds(self) -> None:
        """To be called between steps.

        Raises:
            BudgetExhausted: the seconds of the scope, of one around it, or of the run are over.
        """
        if self._scope.remaining_s <= 0:
            self._scope.reserve(Cost()).release()  # refuses in the scope's own words
            raise BudgetExhausted(f"the seconds of {self._scope.name!r} are over; raise --copa-budget to go further")

    def settle(self, taken: int) -> None:
        """Replace what is held by the steps the training has taken altogether."""
        if self._replayed is not None:
            self._replayed.settle(Cost(train_steps=min(taken, self._before)))
        if self._paid is not None:
            self._paid.settle(Cost(train_steps=max(0, taken - self._before)))
        with _charged_lock:
            _charged.setdefault(self._scope, set()).add(self._recipe)


@contextmanager
def explain_out_of_memory(
    recipe: str, *, device: Any, rows: Sequence[EncodedRow], settings: LoraSettings, progress: Progress
) -> Iterator[None]:
    """Turns whatever torch, numpy or Python say when memory runs out into one error.

    Args:
        recipe: the training's content address.
        device: it runs on.
        rows: it trains on.
        settings: of it.
        progress: of it.

    Raises:
        TrainingMemoryError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        n_rows = settings.micro_batch_size or settings.batch_size
        raise TrainingMemoryError(
            f"memory on {device} does not suffice for the LoRA training {recipe}: step {progress.n_done + 1}, up to "
            f"{n_rows} rows at once of up to {max(len(row.ids) for row in rows)} tokens ({oom_message(error)}); what "
            "was trained up to the last epoch is kept for these settings; remedy: a smaller micro_batch_size, a "
            "smaller max_length (longer rows are left out), or fewer demonstrations, lora={'precision': 'bfloat16'}, "
            "another --copa-device, or less else in that memory"
        ) from error
