"""Rows as batches: which rows share one, in which parts it goes through the model, and its loss.

Logits are computed for the positions that predict an answer token only. A batch is packed where the model allows
(`packing`), else padded on the right, where causal attention never looks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from copa_harness.lm.local.memory import free_bytes
from copa_harness.tune.packing import Packing, can_pack, packed_logits
from copa_harness.tune.rows import EncodedRow

PART_LIMIT_BYTES = 2 << 30
"""What goes through the model at once keeps no more than this for its backward pass, unless a single row does: larger
parts are no faster on a CPU. On a GPU it is half of what is free, if that is more."""

TOKENS_AT_ONCE = 16_384
"""Nor has it more tokens, however small the model."""


def batches_of(rows: Sequence[EncodedRow], batch_size: int, rng: np.random.Generator) -> Iterator[list[EncodedRow]]:
    """Rows of similar length together, in random order.

    Lengths are compared in steps of a quarter only: exact sorting would put rows with the same answer (hence the
    same length) into one batch.
    """
    order = sorted(rng.permutation(len(rows)).tolist(), key=lambda i: int(math.log(len(rows[i].ids)) / math.log(1.25)))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for j in rng.permutation(len(batches)).tolist():
        yield [rows[i] for i in batches[j]]


class BatchLoss:
    """The loss of a model on rows.

    Args:
        model: a peft model.
        pad_id: token id to pad with.
        bfloat16: compute products in bfloat16 (autocast); weights, sums and the loss stay as they are.
    """

    def __init__(self, model: Any, *, pad_id: int, bfloat16: bool = False) -> None:
        self._model, self._pad_id, self._bfloat16 = model, pad_id, bfloat16
        self.packs = can_pack(model)
        self._token_bytes, self._target_bytes = training_bytes(model.get_base_model().config)
        free = free_bytes(model.device) if model.device.type == "cuda" else None
        self.limit_bytes = max(PART_LIMIT_BYTES, (free or 0) // 2)

    def parts(self, batch: Sequence[EncodedRow], *, most_rows: int | None = None) -> Iterator[list[EncodedRow]]:
        """The batch in parts that fit in memory, rows of like length together; their losses add up to the batch's."""
        part: list[EncodedRow] = []
        for row in sorted(batch, key=lambda row: len(row.ids)):
            if part and (len(part) == most_rows or not self._fits([*part, row])):
                yield part
                part = []
            part.append(row)
        yield part

    def _fits(self, rows: Sequence[EncodedRow]) -> bool:
        ids = [row.ids for row in rows]
        n_tokens = Packing.of(ids).n_tokens if self.packs else len(ids) * max(map(len, ids))
        needed = n_tokens * self._token_bytes + sum(len(row.targets) for row in rows) * self._target_bytes
        return n_tokens <= TOKENS_AT_ONCE and needed <= self.limit_bytes

    def sum(self, rows: Sequence[EncodedRow]) -> Any:
        """Summed cross-entropy of the rows' target tokens (a scalar tensor); all rows go through the model at once."""
        import torch

        wanted = torch.tensor(
            [row.ids[position] for row in rows for position in row.targets], device=self._model.device
        )
        return torch.nn.functional.cross_entropy(self._at_targets(rows), wanted, reduction="sum")

    def _at_targets(self, rows: Sequence[EncodedRow]) -> Any:
        """Logits that predict the rows' target tokens, float32, shape (targets of all rows, vocabulary)."""
        import torch

        device = self._model.device
        ids = [row.ids for row in rows]
        # A token is predicted by the position before it.
        sources = [[position - 1 for position in row.targets] for row in rows]
        context: Any = torch.autocast(device.type, torch.bfloat16) if self._bfloat16 else nullcontext()
        with context:
            if self.packs and len(rows) > 1:
                packing = Packing.of(ids)
                places = [place for i, own in enumerate(sources) for place in packing.places(i, own)]
                logits = self._logits(places, lambda: packed_logits(self._model, packing, ids))
            else:
                width = max(map(len, ids))
                padded = torch.tensor([[*row, *[self._pad_id] * (width - len(row))] for row in ids], device=device)
                places = [i * width + place for i, own in enumerate(sources) for place in own]
                logits = self._logits(places, lambda: self._model(input_ids=padded, use_cache=False).logits)
        return logits.float()

    def divergence(self, rows: Sequence[EncodedRow]) -> float:
        """Mean Kullback-Leibler divergence of the base model from the tuned one, in nats per target token.

        KL(tuned || base) = sum over tokens v of p_tuned(v) (log p_tuned(v) - log p_base(v)).
        """
        import torch

        self._model.eval()
        total, layers = 0.0, [one for one in self._model.modules() if hasattr(one, "lora_A")]
        scales = [dict(layer.scaling) for layer in layers]
        with torch.no_grad():
            for part in self.parts(rows):
                tuned = torch.log_softmax(self._at_targets(part), dim=-1)
                try:
                    for layer in layers:  # not by peft's own switch, which a layer of `low_rank` does not ask
                        layer.scaling.update(dict.fromkeys(layer.scaling, 0.0))
                    base = torch.log_softmax(self._at_targets(part), dim=-1)
                finally:
                    for layer, own in zip(layers, scales, strict=True):
                        layer.scaling.update(own)
                total += float((tuned.exp() * (tuned - base)).sum())
        return total / sum(len(row.targets) for row in rows)

    def total(self, rows: Sequence[EncodedRow], *, batch_size: int) -> float:
        """Summed loss of the rows' target tokens, in nats, without training."""
        import torch

        self._model.eval()
        in_order = sorted(rows, key=lambda row: len(row.ids))
        with torch.no_grad():
            return sum(
                float(self.sum(part))
                for start in range(0, len(rows), batch_size)
                for part in self.parts(in_order[start : start + batch_size])
            )

    def _logits(self, places: Sequence[int], run: Any) -> Any:
        """Logits, shape (places, vocabulary), at these places of the flattened batch; `run` runs the model.

        The output layer is handed the hidden states of these places alone: it is the largest layer of a small model.
        """
        import torch

        at = torch.tensor(places, device=self._model.device)
        head = self._model.get_output_embeddings()
        if head is None:
            logits = run()
            return logits.reshape(-1, logits.shape[-1])[at]
        handle = head.register_forward_pre_hook(
            lambda _, given: (given[0].reshape(-1, given[0].shape[-1])[at], *given[1:])
        )
        try:
            return run()
        finally:
            handle.remove()


def training_bytes(config: Any) -> tuple[int, int]:
    """Bytes kept for the backward pass, estimated from the configuration: for a token, and for a target besides."""
    text = config.get_text_config(decoder=True)
    hidden = int(text.hidden_size)
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    return 4 * int(text.num_hidden_layers) * (10 * hidden + 4 * int(inner)), 3 * 4 * int(text.vocab_size)
