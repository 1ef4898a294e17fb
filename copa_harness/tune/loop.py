"""The training loop, to be read whole: LoRA weights by AdamW on the answers' tokens.

    loss = sum over answer tokens t of -log p(token_t | all tokens before it) / number of answer tokens in the batch

Repeats bit for bit on a CPU with the same number of threads: initial weights, row order and the base model's own
dropout come from generators seeded here. `Training.state()` after any epoch holds all that the epochs after it depend
on, so a training taken up again ends with the very weights of one never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from copa_harness.errors import TrainingDivergedError, TrainingError
from copa_harness.lm.local.model import silence_peft
from copa_harness.tune.batches import BatchLoss, batches_of
from copa_harness.tune.low_rank import speed_up
from copa_harness.tune.options import LoraSettings
from copa_harness.tune.progress import Progress
from copa_harness.tune.rows import EncodedRow


@dataclass(frozen=True, slots=True)
class TrainingState:
    """A training between two epochs.

    Attributes:
        tensors: weights and optimizer moments, by name.
        record: JSON types: steps, losses, the state of the generator of row orders.
    """

    tensors: Mapping[str, Any]
    record: Mapping[str, Any]


def add_lora(model: Any, settings: LoraSettings) -> Any:
    """Wrap `model` (changed in place) with fresh LoRA weights: A uniform as in peft, B zero; returns the peft model."""
    import peft
    import torch
    from transformers.pytorch_utils import Conv1D

    target = settings.target_modules
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=target if isinstance(target, str) else list(target),
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 keeps weights transposed
    )
    with torch.random.fork_rng(), silence_peft():
        try:
            wrapped = peft.get_peft_model(model, config)
        except ValueError as error:
            raise TrainingError(f"target_modules={target!r} do not fit {type(model).__name__}: {error}") from error
    generator = torch.Generator().manual_seed(settings.seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name:
            drawn = torch.empty(parameter.shape)
            torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(drawn)
    return wrapped


def rows_by_epoch(rows: Sequence[EncodedRow], *, n_epochs: int) -> list[list[EncodedRow]]:
    """The rows of every epoch: those of the variant whose turn it is."""
    n_variants = max(row.variant for row in rows) + 1
    return [[row for row in rows if row.variant == epoch % n_variants] for epoch in range(n_epochs)]


def count_steps(rows: Sequence[EncodedRow], settings: LoraSettings) -> int:
    """Optimizer steps of a training that no early stop cuts short."""
    epochs = rows_by_epoch(rows, n_epochs=settings.epochs)
    return sum(math.ceil(len(epoch) / settings.batch_size) for epoch in epochs)


class Training:
    """One training, an epoch at a time.

    Args:
        model: from `add_lora`; trained in place, and always holds the weights of the last epoch.
        rows: at least one.
        held_out: for early stopping, may be empty.
        general: rows that show what is forgotten (see `forgetting`), may be empty.
        settings: rates, sizes, epochs, seed.
        pad_id: token id to pad with.

    Attributes:
        n_steps: optimizer steps so far.
        n_total: optimizer steps if no early stop comes.
        losses: mean training loss of each epoch so far, in nats per answer token.
        held_out_losses: the same on the held-out rows after each epoch; empty without such rows.
        general_losses: the same on the general rows, before the training and after each epoch; empty without such rows.
        divergences: how far the model's answers to the general rows moved from the base model's, in nats per token,
            after each epoch (see `BatchLoss.divergence`).
        steps_by_epoch: `n_steps` after each epoch.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[EncodedRow],
        *,
        held_out: Sequence[EncodedRow],
        settings: LoraSettings,
        pad_id: int,
        general: Sequence[EncodedRow] = (),
    ) -> None:
        import torch

        self.model, self.settings = model, settings
        self.n_steps, self.n_total = 0, count_steps(rows, settings)
        self.losses: list[float] = []
        self.held_out_losses: list[float] = []
        self.general_losses: list[float] = []
        self.divergences: list[float] = []
        self.steps_by_epoch: list[int] = []
        self._first_loss = math.nan
        self._epochs = rows_by_epoch(rows, n_epochs=settings.epochs)
        self._held_out, self._general = held_out, general
        self._loss = BatchLoss(model, pad_id=pad_id, bfloat16=settings.precision == "bfloat16")
        if settings.precision == "float32":
            speed_up(model)
        self._rng = np.random.default_rng(settings.seed)
        self._trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._trainable.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    @property
    def n_epochs(self) -> int:
        """Epochs done."""
        return len(self.losses)

    @property
    def best_epoch(self) -> int:
        """The epoch, from 1, of the lowest held-out loss; the last one without held-out rows."""
        if not self.held_out_losses:
            return self.n_epochs
        return 1 + self.held_out_losses.index(min(self.held_out_losses))

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or held-out loss has not fallen for too long."""
        waited = self.n_epochs - self.best_epoch
        return self.n_epochs >= self.settings.epochs or waited >= self.settings.early_stop_patience

    def run_epoch(self, progress: Progress, *, before_step: Callable[[], None] = lambda: None) -> None:
        """Train one epoch and measure the held-out rows; `before_step` is called before every optimizer step.

        Raises:
            TrainingDivergedError: the loss is not a number any more, or has grown instead of fallen.
        """
        import torch

        epoch = self.n_epochs + 1
        if self._general and epoch == 1:
            self.general_losses.append(self._mean_loss(self._general))
        self.model.train()
        total = n_tokens = 0.0
        with torch.random.fork_rng():
            # A base model may have dropout of its own; an epoch's must not depend on those before it in this process.
            torch.manual_seed(int(np.random.default_rng([self.settings.seed, epoch]).integers(2**62)))
            for batch in batches_of(self._epochs[epoch - 1], self.settings.batch_size, self._rng):
                before_step()
                n_answer = sum(len(row.targets) for row in batch)
                loss = self._step(batch, n_answer)
                total, n_tokens = total + loss * n_answer, n_tokens + n_answer
                progress.step(epoch, loss)
        self.losses.append(total / n_tokens)
        self.steps_by_epoch.append(self.n_steps)
        self._check_divergence()
        for rows, means in ((self._held_out, self.held_out_losses), (self._general, self.general_losses)):
            if rows:
                means.append(self._mean_loss(rows))
        if self._general:
            self.divergences.append(self._loss.divergence(self._general))
        self.model.eval()

    def _mean_loss(self, rows: Sequence[EncodedRow]) -> float:
        total = self._loss.total(rows, batch_size=self.settings.batch_size)
        return total / sum(len(row.targets) for row in rows)

    def _step(self, batch: Sequence[EncodedRow], n_answer: int) -> float:
        """One optimizer step; the batch's loss."""
        import torch

        rate = self.settings.learning_rate * relative_rate(self.n_steps, self.settings.warmup_steps, self.n_total)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        batch_loss = 0.0
        for part in self._loss.parts(batch, most_rows=self.settings.micro_batch_size):
            loss = self._loss.sum(part) / n_answer
            loss.backward()
            batch_loss += loss.item()
        norm = float(torch.nn.utils.clip_grad_norm_(self._trainable.values(), self.settings.max_grad_norm))
        if not math.isfinite(batch_loss) or not math.isfinite(norm):
            raise TrainingDivergedError(
                f"the loss is {batch_loss} (gradient norm {norm}) at step {self.n_steps + 1} of {self.n_total}; "
                f"{self._remedy()}"
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.n_steps += 1
        if math.isnan(self._first_loss):
            self._first_loss = batch_loss
        return batch_loss

    def _check_divergence(self) -> None:
        """The first batch's loss is the untrained model's; the first epoch's mean is held against it."""
        before, limit = (
            (f"{self._first_loss:.3f} in the first batch", 2 * self._first_loss + 1)
            if self.n_epochs == 1
            else (f"{self.losses[0]:.3f} in the first epoch", 2 * self.losses[0] + 0.1)
        )
        if self.losses[-1] > limit:
            raise TrainingDivergedError(
                f"training diverged: mean loss {before}, {self.losses[-1]:.3f} in epoch {self.n_epochs}; "
                f"{self._remedy()}"
            )

    def _remedy(self) -> str:
        rate = self.settings.learning_rate
        return f"remedy: a learning rate below {rate:g}, say learning_rate={rate / 3:.1g}, or more warmup_steps"

    def state(self) -> TrainingState:
        """Everything the epochs to come depend on. The tensors are the live ones: write them before training on."""
        tensors: dict[str, Any] = {}
        for name, parameter in self._trainable.items():
            tensors[f"weights/{name}"] = parameter.detach()
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        record = {
            "n_steps": self.n_steps,
            "first_loss": self._first_loss,
            "losses": list(self.losses),
            "held_out_losses": list(self.held_out_losses),
            "general_losses": list(self.general_losses),
            "divergences": list(self.divergences),
            "steps_by_epoch": list(self.steps_by_epoch),
            "rng": self._rng.bit_generator.state,
        }
        return TrainingState(tensors, record)

    def restore(self, state: TrainingState) -> None:
        """Go on where `state` was taken; model, rows and settings must be those it was taken with.

        Raises:
            KeyError, ValueError, RuntimeError: it was taken with others; nothing can be said of the model then.
        """
        import torch

        moments = {key.split("/", 1)[0] for key in state.tensors} - {"weights"}
        with torch.no_grad():
            for name, parameter in self._trainable.items():
                parameter.copy_(state.tensors[f"weights/{name}"])
                own = {key: state.tensors[f"{key}/{name}"] for key in moments}
                # AdamW counts its steps in a CPU scalar, whatever device the weights are on.
                self._optimizer.state[parameter] = {
                    key: value.clone() if value.dim() == 0 else value.to(parameter.device, copy=True)
                    for key, value in own.items()
                }
        self._rng.bit_generator.state = state.record["rng"]
        self.n_steps = int(state.record["n_steps"])
        self._first_loss = float(state.record["first_loss"])
        self.losses = [float(loss) for loss in state.record["losses"]]
        self.held_out_losses = [float(loss) for loss in state.record["held_out_losses"]]
        self.general_losses = [float(loss) for loss in state.record.get("general_losses", ())]
        self.divergences = [float(one) for one in state.record.get("divergences", ())]
        self.steps_by_epoch = [int(n) for n in state.record["steps_by_epoch"]]


def relative_rate(step: int, n_warmup: int, n_total: int) -> float:
    """Learning rate of step `step` (from 0) relative to the peak: linear up, then linear down to zero."""
    n_warmup = min(n_warmup, n_total // 2)
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    return max(0.0, (n_total - step) / max(1, n_total - n_warmup))
