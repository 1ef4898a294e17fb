"""The training loop, to be read whole: LoRA weights by AdamW on the answers' tokens.

    loss = sum over answer tokens t of -log p(token_t | all tokens before it) / number of answer tokens in the batch

Rows are padded on the left, so that all answers end at the same column, and only columns that predict an answer token
get logits.
Repeats bit for bit on a CPU with the same number of threads: initial weights and row order come from generators of
their own. Knows nothing of files, recipes, DSPy or budgets.
"""

from __future__ import annotations

import inspect
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from copa_harness.errors import TrainingError
from copa_harness.lm.local_model import quiet_peft
from copa_harness.tune.encoding import EncodedRow
from copa_harness.tune.settings import LoraSettings

logger = logging.getLogger(__name__)

LOG_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """What a training did.

    Attributes:
        n_steps: optimizer steps taken.
        losses: mean training loss of each epoch, in nats per answer token.
        held_out_losses: the same on the held-out rows after each epoch; empty without such rows.
        best_epoch: the epoch whose weights were kept, counted from 1.
    """

    n_steps: int
    losses: tuple[float, ...]
    held_out_losses: tuple[float, ...]
    best_epoch: int


def add_lora(model: Any, settings: LoraSettings) -> Any:
    """Wrap `model` (changed in place) with fresh LoRA weights: A uniform as in peft, B zero; returns the peft model."""
    import peft
    import torch

    target = settings.target_modules
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=target if isinstance(target, str) else list(target),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), quiet_peft():
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


def train(
    model: Any,
    rows: Sequence[EncodedRow],
    *,
    held_out: Sequence[EncodedRow],
    settings: LoraSettings,
    pad_id: int,
    on_step: Callable[[], None] = lambda: None,
) -> TrainingOutcome:
    """Train a peft model in place; at the end it holds the weights of the best epoch (the last without `held_out`).

    Args:
        model: from `add_lora`.
        rows: at least one.
        held_out: for early stopping, may be empty.
        settings: rates, sizes, epochs, seed.
        pad_id: token id to pad with.
        on_step: called after every optimizer step.

    Raises:
        TrainingError: the loss is not a number any more, or has grown instead of fallen.
    """
    import torch

    rng = np.random.default_rng(settings.seed)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    n_variants = max(row.variant for row in rows) + 1
    epochs = [[row for row in rows if row.variant == e % n_variants] for e in range(settings.epochs)]
    n_total = sum(math.ceil(len(epoch) / settings.batch_size) for epoch in epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings.warmup_steps, n_total))
    n_steps, losses, held_out_losses = 0, [], []
    best: tuple[float, int, list[Any]] | None = None
    with _Progress(n_total) as progress:
        for epoch, epoch_rows in enumerate(epochs, start=1):
            model.train()
            loss_sum = n_tokens = 0.0
            for batch in _batches(epoch_rows, settings.batch_size, rng):
                n_answer = sum(len(row.targets) for row in batch)
                size = settings.micro_batch_size or len(batch)
                batch_loss = 0.0
                for start in range(0, len(batch), size):
                    loss = _loss_sum(model, batch[start : start + size], pad_id=pad_id) / n_answer
                    loss.backward()
                    batch_loss += loss.item()
                norm = torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
                if not math.isfinite(batch_loss) or not math.isfinite(float(norm)):
                    raise TrainingError(
                        f"the loss is {batch_loss} (gradient norm {float(norm)}) at step {n_steps + 1} of {n_total}; "
                        f"remedy: a learning rate below {settings.learning_rate:g}"
                    )
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                n_steps += 1
                loss_sum, n_tokens = loss_sum + batch_loss * n_answer, n_tokens + n_answer
                on_step()
                progress.step(epoch, batch_loss)
            losses.append(loss_sum / n_tokens)
            if held_out:
                held_out_losses.append(mean_loss(model, held_out, batch_size=settings.batch_size, pad_id=pad_id))
                if best is None or held_out_losses[-1] < best[0]:
                    best = held_out_losses[-1], epoch, [parameter.detach().clone() for parameter in trainable]
                elif epoch - best[1] >= settings.early_stop_patience:
                    break
    if losses[-1] > 2 * losses[0] + 0.1:
        raise TrainingError(
            f"training diverged: mean loss {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last; "
            f"remedy: a learning rate below {settings.learning_rate:g}, or more warmup_steps"
        )
    if best is not None:
        with torch.no_grad():
            for parameter, kept in zip(trainable, best[2], strict=True):
                parameter.copy_(kept)
    model.eval()
    return TrainingOutcome(n_steps, tuple(losses), tuple(held_out_losses), best[1] if best else len(losses))


def mean_loss(model: Any, rows: Sequence[EncodedRow], *, batch_size: int, pad_id: int) -> float:
    """Mean loss per answer token, in nats, without training."""
    import torch

    model.eval()
    with torch.no_grad():
        total = sum(
            float(_loss_sum(model, rows[start : start + batch_size], pad_id=pad_id))
            for start in range(0, len(rows), batch_size)
        )
    return total / sum(len(row.targets) for row in rows)


def _loss_sum(model: Any, batch: Sequence[EncodedRow], *, pad_id: int) -> Any:
    """Summed cross-entropy of the batch's target tokens (a scalar tensor)."""
    import torch

    width = max(len(row.ids) for row in batch)
    ids = torch.full((len(batch), width), pad_id)
    mask = torch.zeros_like(ids)
    wanted = torch.full_like(ids, -100)
    for i, row in enumerate(batch):
        start = width - len(row.ids)
        ids[i, start:] = torch.tensor(row.ids)
        mask[i, start:] = 1
        at = torch.tensor(row.targets) + start
        wanted[i, at - 1] = ids[i, at]  # a token is predicted by the column before it
    columns = (wanted != -100).any(0).nonzero()[:, 0].to(model.device)
    wanted = wanted.to(model.device)[:, columns]
    only = {"logits_to_keep": columns} if _takes_logits_to_keep(model) else {}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=positions.to(model.device),
        use_cache=False,
        **only,
    ).logits.float()
    if not only:
        logits = logits[:, columns]
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1), ignore_index=-100, reduction="sum"
    )


def _takes_logits_to_keep(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters


def _batches(rows: Sequence[EncodedRow], batch_size: int, rng: np.random.Generator) -> Iterator[list[EncodedRow]]:
    """Rows of similar length together, in random order.

    Lengths are compared in steps of a quarter only: exact sorting would put rows with the same answer (hence the
    same length) into one batch.
    """
    order = sorted(rng.permutation(len(rows)).tolist(), key=lambda i: int(math.log(len(rows[i].ids)) / math.log(1.25)))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for j in rng.permutation(len(batches)).tolist():
        yield [rows[i] for i in batches[j]]


def _rate(step: int, n_warmup: int, n_total: int) -> float:
    """Learning rate of step `step` (from 0) relative to the peak: linear up, then linear down to zero."""
    n_warmup = min(n_warmup, n_total // 2)
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    return max(0.0, (n_total - step) / max(1, n_total - n_warmup))


class _Progress:
    """A bar on a terminal; elsewhere a logging line now and then."""

    def __init__(self, n_total: int) -> None:
        self._n_total, self._n = n_total, 0
        self._bar: Any = None
        self._logged_s = time.monotonic()

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._n_total, desc="LoRA", unit="step", leave=False)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, epoch: int, loss: float) -> None:
        self._n += 1
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix_str(f"epoch {epoch}, loss {loss:.3f}")
        elif time.monotonic() - self._logged_s > LOG_EVERY_S:
            self._logged_s = time.monotonic()
            logger.info("LoRA step %d of %d, epoch %d, loss %.3f", self._n, self._n_total, epoch, loss)
