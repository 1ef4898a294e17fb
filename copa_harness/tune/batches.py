"""Rows as batches: which rows share one, and the loss of a batch.

Rows are padded on the left, so that all answers end at the same column, and only columns that predict an answer token
get logits. Knows nothing of optimizers, epochs or files.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from copa_harness.tune.encoding import EncodedRow


def batches_of(rows: Sequence[EncodedRow], batch_size: int, rng: np.random.Generator) -> Iterator[list[EncodedRow]]:
    """Rows of similar length together, in random order.

    Lengths are compared in steps of a quarter only: exact sorting would put rows with the same answer (hence the
    same length) into one batch.
    """
    order = sorted(rng.permutation(len(rows)).tolist(), key=lambda i: int(math.log(len(rows[i].ids)) / math.log(1.25)))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for j in rng.permutation(len(batches)).tolist():
        yield [rows[i] for i in batches[j]]


def mean_loss(model: Any, rows: Sequence[EncodedRow], *, batch_size: int, pad_id: int) -> float:
    """Mean loss per answer token, in nats, without training."""
    import torch

    model.eval()
    with torch.no_grad():
        total = sum(
            float(loss_sum(model, rows[start : start + batch_size], pad_id=pad_id))
            for start in range(0, len(rows), batch_size)
        )
    return total / sum(len(row.targets) for row in rows)


def loss_sum(model: Any, batch: Sequence[EncodedRow], *, pad_id: int) -> Any:
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
