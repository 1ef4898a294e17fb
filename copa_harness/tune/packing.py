"""Packed batches: the tokens that all rows of a batch begin with go through the model once.

DSPy's prompts begin alike (instructions, often demonstrations too), so most of a batch can be the same tokens again and
again. A packed batch is one sequence in which the tokens that all its rows begin with stand once, followed by every
row's own tokens, without padding; P is the length of that prefix:

    [prefix | rest of row 1 | rest of row 2 | ...]      positions: 0..P-1, P.., P.., ...

Everything in a decoder but attention looks at one token at a time, so it runs on that sequence as it is. Attention goes
in three pieces: the prefix to itself, each row's own tokens to themselves, all own tokens to the one prefix; the last
two are merged by their log-sum-exp (see `lm/local/attention`). Backward, the kernel of either piece is given the merged
output and log-sum-exp, from which it recomputes its share of the weights, so that gradients add up to those of the
whole (as in ring attention; Liu et al. 2023, arXiv:2310.01889). Loss and gradients are those of the rows one by one, up
to rounding. Only for models whose layers all attend to everything before them; `can_pack` says which, and tries it.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from copa_harness.lm.local.attention import attend, merged

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

    @property
    def n_tokens(self) -> int:
        """Of the packed sequence."""
        return self.n_prefix + sum(self.lengths)

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
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ATTENTION not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


def _attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **options: Any
) -> tuple[Any, None]:
    """As transformers calls it: (1, heads, tokens, width) queries, keys and values -> (1, tokens, heads, width)."""
    import torch

    packing = _current.get()
    if packing is None or attention_mask is not None:
        raise RuntimeError("packed attention was called outside packed_logits, or with a mask")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves behind rotary positions what they make
    n_shared = query.shape[1] // key.shape[1]
    own_query, own_key, own_value = (_own_tokens(each, packing) for each in (query, key, value))
    if n_shared > 1:
        own_key, own_value = (each.repeat_interleave(n_shared, 1) for each in (own_key, own_value))
    dropout = float(options.get("dropout") or 0.0)
    attention = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=scale, dropout_p=dropout)
    if not packing.n_prefix:
        output = attention(own_query, own_key, own_value, is_causal=True)
        return _one_sequence(output, packing), None
    prefix = [each[:, :, : packing.n_prefix] for each in (query, key, value)]
    first = attention(*prefix, is_causal=True, enable_gqa=n_shared > 1)
    if hasattr(torch.ops.aten, KERNEL) and query.device.type == "cpu" and not dropout:
        output = _function().apply(own_query, own_key, own_value, *prefix[1:], scale)
    else:
        before = (each.repeat_interleave(n_shared, 1).expand(len(own_key), -1, -1, -1) for each in prefix[1:])
        keys, values = (torch.cat(each, 2) for each in zip(before, (own_key, own_value), strict=True))
        n = own_query.shape[2]
        seen = torch.ones(n, keys.shape[2], dtype=torch.bool, device=query.device).tril(packing.n_prefix)
        output = attention(own_query, keys, values, attn_mask=seen)
    return torch.cat([first.transpose(1, 2), _one_sequence(output, packing)], 1), None


def _own_tokens(states: Any, packing: Packing) -> Any:
    """(1, heads, tokens, width) -> (rows, heads, longest, width), padded at the end, where nothing looks."""
    import torch

    own = states[0].transpose(0, 1)[packing.n_prefix :].split(list(packing.lengths))
    return torch.nn.utils.rnn.pad_sequence(own, batch_first=True).transpose(1, 2)


def _one_sequence(output: Any, packing: Packing) -> Any:
    """(rows, heads, longest, width) -> (1, own tokens, heads, width)."""
    import torch

    rows = zip(output.transpose(1, 2), packing.lengths, strict=True)
    return torch.cat([row[:length] for row, length in rows])[None]


KERNEL = "_scaled_dot_product_flash_attention_for_cpu_backward"
"""PyTorch's kernel behind its attention on CPUs, which alone takes a log-sum-exp."""


@functools.cache
def _function() -> Any:
    """Attention behind a prefix as an autograd function; made at the first use, since torch is not imported before.

    Queries, own keys and values: (rows, heads, longest, width); the prefix's: (1, key-value heads, P, width).
    """
    import torch

    backward_of = getattr(torch.ops.aten, KERNEL)

    class BehindPrefix(torch.autograd.Function):
        @staticmethod
        def forward(
            context: Any, query: Any, key: Any, value: Any, prefix_key: Any, prefix_value: Any, scale: float
        ) -> Any:
            output, total = attend(query, key, value, scale=scale, is_causal=True)
            folded = _folded(query, prefix_key)
            other, other_total = attend(folded, prefix_key, prefix_value, scale=scale)
            output, total = merged(output, total, _unfolded(other, query), _unfolded(other_total, query))
            context.save_for_backward(query, key, value, prefix_key, prefix_value, output, total)
            context.scale = scale
            return output

        @staticmethod
        def backward(context: Any, gradient: Any) -> Any:
            query, key, value, prefix_key, prefix_value, output, total = context.saved_tensors
            own = backward_of(gradient, query, key, value, output, total, 0.0, True, scale=context.scale)
            gradient, folded, output, total = (_folded(each, prefix_key) for each in (gradient, query, output, total))
            more, *prefix = backward_of(
                gradient, folded, prefix_key, prefix_value, output, total, 0.0, False, scale=context.scale
            )
            return own[0] + _unfolded(more, query), *own[1:], *prefix, None

    return BehindPrefix


def _folded(states: Any, keys: Any) -> Any:
    """(rows, heads, n, ...) -> (1, key-value heads, the rest, ...): one row of all that asks a key-value head."""
    by_head = states.unflatten(1, (keys.shape[1], -1)).transpose(0, 1)
    return by_head.flatten(1, 3)[None]


def _unfolded(states: Any, like: Any) -> Any:
    """The way back, to the rows, heads and tokens of `like`."""
    n_rows, n_heads, n = like.shape[:3]
    n_kv = states.shape[1]
    return states[0].unflatten(1, (n_rows, n_heads // n_kv, n)).transpose(0, 1).flatten(1, 2)
