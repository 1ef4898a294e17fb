"""Rows as batches: which rows share one, in which parts it goes through the model, and its loss.

Logits are computed for the positions that predict an answer token only. A batch is packed where the model allows, else
padded on the right, where causal attention never looks.

Packing. DSPy's prompts begin alike (instructions, often demonstrations too), so most of a batch can be the same tokens
again and again. A packed batch is one sequence in which the tokens that all its rows begin with stand once, followed by
every row's own tokens, without padding; P is the length of that prefix:

    [prefix | rest of row 1 | rest of row 2 | ...]      positions: 0..P-1, P.., P.., ...

Everything in a decoder but attention looks at one token at a time, so it runs on that sequence as it is. For attention
queries, keys and values are laid out as rows again, each behind the prefix, and PyTorch's own causal attention does the
rest: loss and gradients are those of the rows one by one, up to rounding. Only for models whose layers all attend to
everything before them; `can_pack` says which, and tries it.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from copa_harness.tune.rows import EncodedRow

logger = logging.getLogger(__name__)

ATTENTION = "copa_packed_rows"
"""Name of the attention function in transformers' registry."""

TOKENS_AT_ONCE = 16_384
"""Most tokens of rows (padding included) that go through the model at once, unless a single row has more."""


def batches_of(rows: Sequence[EncodedRow], batch_size: int, rng: np.random.Generator) -> Iterator[list[EncodedRow]]:
    """Rows of similar length together, in random order.

    Lengths are compared in steps of a quarter only: exact sorting would put rows with the same answer (hence the
    same length) into one batch.
    """
    order = sorted(rng.permutation(len(rows)).tolist(), key=lambda i: int(math.log(len(rows[i].ids)) / math.log(1.25)))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for j in rng.permutation(len(batches)).tolist():
        yield [rows[i] for i in batches[j]]


def parts_of(batch: Sequence[EncodedRow], *, most_rows: int | None = None) -> Iterator[list[EncodedRow]]:
    """The batch in parts that fit in memory, rows of like length together; their losses add up to the batch's."""
    part: list[EncodedRow] = []
    for row in sorted(batch, key=lambda row: len(row.ids)):  # ascending, so the row that comes is the longest
        if part and ((len(part) + 1) * len(row.ids) > TOKENS_AT_ONCE or len(part) == most_rows):
            yield part
            part = []
        part.append(row)
    yield part


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

    def sum(self, rows: Sequence[EncodedRow]) -> Any:
        """Summed cross-entropy of the rows' target tokens (a scalar tensor); all rows go through the model at once."""
        import torch

        device = self._model.device
        ids = [row.ids for row in rows]
        # A token is predicted by the position before it.
        sources = [[position - 1 for position in row.targets] for row in rows]
        wanted = torch.tensor([row.ids[position] for row in rows for position in row.targets], device=device)
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
        return torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")

    def total(self, rows: Sequence[EncodedRow], *, batch_size: int) -> float:
        """Summed loss of the rows' target tokens, in nats, without training."""
        import torch

        self._model.eval()
        in_order = sorted(rows, key=lambda row: len(row.ids))
        with torch.no_grad():
            return sum(
                float(self.sum(part))
                for start in range(0, len(rows), batch_size)
                for part in parts_of(in_order[start : start + batch_size])
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


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the tokens of B rows stand in one sequence.

    Attributes:
        n_prefix: P, tokens all rows begin with; every row has at least one more.
        lengths: tokens of each row after them.
    """

    n_prefix: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[tuple[int, ...]]) -> Packing:
        """For rows of at least one token each."""
        first, last = min(rows), max(rows)  # what the first and the last in order share, all share
        different = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
        n_prefix = min(next(different, len(first)), min(map(len, rows)) - 1)
        return cls(n_prefix, tuple(len(row) - n_prefix for row in rows))

    def ids(self, rows: Sequence[tuple[int, ...]]) -> list[int]:
        """The packed sequence's token ids."""
        return [*rows[0][: self.n_prefix], *itertools.chain.from_iterable(row[self.n_prefix :] for row in rows)]

    def positions(self) -> list[int]:
        """The position of every token of the packed sequence in its row."""
        own = itertools.chain.from_iterable(range(self.n_prefix, self.n_prefix + n) for n in self.lengths)
        return [*range(self.n_prefix), *own]

    def places(self, row: int, positions: Sequence[int]) -> list[int]:
        """Where the tokens at these positions of a row stand in the packed sequence."""
        shift = sum(self.lengths[:row])
        return [position if position < self.n_prefix else position + shift for position in positions]


_current: ContextVar[Packing | None] = ContextVar("copa_packing", default=None)


def packed_logits(model: Any, packing: Packing, rows: Sequence[tuple[int, ...]]) -> Any:
    """The model's output logits for the packed sequence, shape (1, tokens, vocabulary) unless a hook narrows it."""
    import torch

    config = model.get_base_model().config.get_text_config(decoder=True)
    before = config._attn_implementation
    _register()
    token = _current.set(packing)
    config._attn_implementation = ATTENTION
    try:
        return model(
            input_ids=torch.tensor([packing.ids(rows)], device=model.device),
            position_ids=torch.tensor([packing.positions()], device=model.device),
            use_cache=False,
        ).logits
    finally:
        config._attn_implementation = before
        _current.reset(token)


def can_pack(model: Any) -> bool:
    """Whether packed rows give this model the logits that the rows give one by one: known of its kind, and tried."""
    import torch

    config = model.get_base_model().config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None and not getattr(config, "layer_types", None)
    if config._attn_implementation != "sdpa" or kinds != {"full_attention"} or windowed:
        return False
    n_tokens = model.get_input_embeddings().num_embeddings
    draw = torch.Generator().manual_seed(0)
    head, short, long = (torch.randint(n_tokens, (n,), generator=draw).tolist() for n in (5, 3, 6))
    rows = [head + short, head + long]
    packing = Packing(len(head), (len(short), len(long)))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = packed_logits(model, packing, rows)[0].float()
            alone = [model(torch.tensor([row], device=model.device), use_cache=False).logits[0].float() for row in rows]
    except Exception as error:  # noqa: BLE001 - whatever a foreign architecture makes of it: then it is not for it
        logger.info("rows are trained on padded: %s cannot be given packed rows (%s)", type(model).__name__, error)
        return False
    finally:
        model.train(was_training)
    for i, expected in enumerate(alone):
        got = packed[packing.places(i, range(len(rows[i])))]
        if not bool((got - expected).abs().max() <= 1e-3 * expected.abs().max().clamp(min=1e-6)):
            logger.info("rows are trained on padded: packed ones give other logits in this architecture")
            return False
    return True


def _register() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ATTENTION in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        packing = _current.get()
        if packing is None or attention_mask is not None:
            raise RuntimeError("packed attention was called outside packed_logits, or with a mask")
        rows = (_unpacked(each, packing) for each in (query, key, value))
        output, _ = sdpa_attention_forward(module, *rows, None, **options)
        return _packed(output, packing), None

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)


def _unpacked(states: Any, packing: Packing) -> Any:
    """(1, heads, tokens, width) -> (rows, heads, longest row, width), padded at the end, where nothing looks."""
    import torch

    tokens = states[0].transpose(0, 1)
    prefix, own = tokens[: packing.n_prefix], tokens[packing.n_prefix :].split(list(packing.lengths))
    rest = torch.nn.utils.rnn.pad_sequence(own, batch_first=True)
    rows = torch.cat([prefix.expand(len(packing.lengths), *prefix.shape), rest], 1)
    return rows.transpose(1, 2)


def _packed(output: Any, packing: Packing) -> Any:
    """(rows, longest row, heads, width) -> (1, tokens, heads, width)."""
    import torch

    first, n = output[0, : packing.n_prefix], packing.n_prefix
    return torch.cat([first, *(row[n : n + length] for row, length in zip(output, packing.lengths, strict=True))])[None]
