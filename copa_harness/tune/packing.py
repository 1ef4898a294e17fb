"""Rows of a batch as one sequence in which the tokens they all begin with stand once.

DSPy's prompts begin alike (instructions, often demonstrations too), so most of a batch can be the same tokens again and
again. Here the shared prefix is followed by every row's own tokens, without padding:

    [prefix | rest of row 1 | rest of row 2 | ...]      positions: 0..P-1, P.., P.., ...

Everything in a decoder but attention looks at one token at a time, so it runs on that sequence as it is. For attention
queries, keys and values are laid out as rows again, each behind the prefix, and PyTorch's own causal attention does the
rest: loss and gradients are those of the rows one by one, up to rounding. Only for models whose layers all attend to
everything before them; `can_pack` says which, and tries it. Knows nothing of losses or training.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

ATTENTION = "copa_packed_rows"
"""Name of the attention function in transformers' registry."""


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
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if ATTENTION in AttentionInterface._global_mapping:
        return

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        packing = _current.get()
        if packing is None or attention_mask is not None:
            raise RuntimeError("packed attention was called outside packed_logits, or with a mask")
        rows = (_unpacked(each, packing) for each in (query, key, value))
        output, _ = sdpa_attention_forward(module, *rows, None, **options)
        return _packed(output, packing), None

    AttentionInterface.register(ATTENTION, attend)


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
