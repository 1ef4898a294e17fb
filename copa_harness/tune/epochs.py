"""The epochs of a training, each with its checkpoint on disk, and what is told of them in manifests.

The same in the process that asked for the training and in those it may start for it. Knows nothing of rows, budgets or
processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from copa_harness.tune.progress import StepListener

if TYPE_CHECKING:
    from copa_harness.tune.checkpoints import Unfinished
    from copa_harness.tune.loop import Training


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training has come to.

    Attributes:
        n_steps: optimizer steps taken altogether.
        best_epoch: the epoch to keep, from 1.
        losses: mean training loss by epoch, in nats per answer token.
        held_out_losses: the same on held-out rows; empty without such rows.
    """

    n_steps: int
    best_epoch: int
    losses: tuple[float, ...]
    held_out_losses: tuple[float, ...]

    @classmethod
    def of(cls, training: Training) -> Outcome:
        """Of a training as it stands."""
        losses, held_out = tuple(training.losses), tuple(training.held_out_losses)
        return cls(training.n_steps, training.best_epoch, losses, held_out)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Outcome:
        """Inverse of `dataclasses.asdict`, also after a way through JSON."""
        losses, held_out = (tuple(map(float, given[name])) for name in ("losses", "held_out_losses"))
        return cls(int(given["n_steps"]), int(given["best_epoch"]), losses, held_out)

    def details(self, epoch: int) -> dict[str, Any]:
        """For the manifest of the weights of `epoch`."""
        return {
            "epoch": epoch,
            "train_steps": self.n_steps,
            "losses": list(self.losses),
            "held_out_losses": list(self.held_out_losses),
            "loss": self.losses[epoch - 1],
            "held_out_loss": self.held_out_losses[epoch - 1] if self.held_out_losses else None,
        }


def run_epochs(
    training: Training,
    unfinished: Unfinished | None,
    *,
    details: Mapping[str, Any],
    progress: StepListener,
    before_step: Callable[[], None],
) -> Outcome:
    """Train the epochs that are left and write, after each, its checkpoint and then the state to go on from.

    Args:
        training: at its beginning, or restored.
        unfinished: where to write; None in a process that leaves it to another.
        details: of the training as a whole, for the manifests; `recipe` among them.
        progress: hears of every step.
        before_step: called before every optimizer step.

    Raises:
        TrainingError: see `Training.run_epoch`.
    """
    while not training.finished:
        training.run_epoch(progress, before_step=before_step)
        if unfinished is None:
            continue
        own = {"kind": "lora checkpoint", "parent": details["recipe"]}
        epoch = training.n_epochs
        told = {**details, **Outcome.of(training).details(epoch), **own}
        unfinished.write_epoch(epoch, training.model, details=told)
        unfinished.save_state(training.state())
    return Outcome.of(training)
