"""Cascade attention: rows of a batch attend to one copy of the prefix they share, and each to its own tokens.

Symbols: B rows, H query heads over K key-value heads (G = H / K), n new tokens per row, P prefix tokens, D head width.
Softmax attention over [prefix | own] splits exactly: with (o1, l1) the output and log-sum-exp over the prefix and (o2,
l2) those over the own tokens, the output is o1 + (o2 - o1) * sigmoid(l2 - l1). The prefix part is one attention of
B*G*n queries against keys that are read once, not B times (Juravsky et al. 2024, arXiv:2402.05099; Ye et al. 2024,
"Cascade inference"). `llama` calls `cascade_attention` itself; any other model gets it as an attention function of
transformers, so that the model's own code runs around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

NAME = "copa_cascade"
"""Name of the attention function in transformers."""

_HARMLESS = frozenset(
    {"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "output_hidden_states"}
)
"""Keyword arguments of attention functions that change nothing here; any other one that is set is refused."""

_in_use: ContextVar[CascadeCache | None] = ContextVar("copa_cascade", default=None)


class UnsupportedModel(Exception):
    """This architecture asks its attention for something that the cascade does not do."""


@dataclass(slots=True)
class RowGroup:
    """Rows `start` to `stop` (exclusive) of a batch and the states of the prefix they share, None for none.

    `states` is a `DynamicCache` of one row.
    """

    start: int
    stop: int
    states: Any


class SharedStates(NamedTuple):
    """Rows `start` to `stop` (exclusive) and their prefix's keys and values in one layer, [1, K, P, D]."""

    start: int
    stop: int
    keys: Any
    values: Any


class CascadeCache:
    """The states of a batch: its prefixes once, and every row's own tokens.

    Args:
        n_layers: layers of the model.
        groups: the rows in order, group by group, without gaps.
        room: own tokens per row to make room for; grows by half when it is not enough.
    """

    def __init__(self, n_layers: int, groups: Sequence[RowGroup], *, room: int) -> None:
        self.groups = [group for group in groups if group.stop > group.start]
        self.layers = [OwnTokens(self, index, room) for index in range(n_layers)]
        self.latest = self.layers[0]

    @cached_property
    def cache(self) -> Any:
        """These states as transformers' own models want them."""
        from transformers.cache_utils import Cache

        return Cache(layers=[_as_layer(layer) for layer in self.layers])

    def prefixes(self, index: int) -> list[SharedStates]:
        """The shared prefixes' states in one layer."""
        shared = [(group, group.states.layers[index]) for group in self.groups if group.states is not None]
        return [SharedStates(group.start, group.stop, layer.keys, layer.values) for group, layer in shared]

    @contextmanager
    def in_use(self, module: Any) -> Iterator[None]:
        """While the block runs, forwards of `module` with `self.cache` go through the cascade."""
        config = module.config
        before = config._attn_implementation
        _register()
        token = _in_use.set(self)
        config._attn_implementation = NAME
        try:
            yield
        finally:
            config._attn_implementation = before
            _in_use.reset(token)

    def select(self, rows: Sequence[int]) -> None:
        """Keep (or repeat) these rows of the batch, in ascending order."""
        import torch

        groups, done = [], 0
        for group in self.groups:
            n = sum(group.start <= row < group.stop for row in rows)
            if n:
                groups.append(RowGroup(done, done + n, group.states))
            done += n
        self.groups = groups
        for layer in self.layers:
            layer.select(torch.as_tensor(rows))


class OwnTokens:
    """Keys and values of the rows' own tokens in one layer, in one buffer that grows."""

    def __init__(self, owner: CascadeCache, index: int, room: int) -> None:
        self.owner, self.index, self.room = owner, index, room
        self.length = 0
        self.buffers: list[Any] = []

    def update(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Append the states of new tokens; returns all of them, [B, K, own tokens, D]."""
        end = self.length + keys.shape[-2]
        if not self.buffers or end > self.buffers[0].shape[-2]:
            room = max(self.room, end if not self.buffers else end + end // 2)
            grown = [new.new_empty(*new.shape[:2], room, new.shape[-1]) for new in (keys, values)]
            for buffer, old in zip(grown, self.buffers, strict=False):
                buffer[:, :, : self.length] = old[:, :, : self.length]
            self.buffers = grown
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        self.owner.latest = self
        return self.buffers[0][:, :, :end], self.buffers[1][:, :, :end]

    def select(self, rows: Any) -> None:
        """Keep (or repeat) these rows."""
        kept = []
        for buffer in self.buffers:
            own = buffer[:, :, : self.length][rows.to(buffer.device)]
            roomy = own.new_empty(*own.shape[:2], buffer.shape[2], own.shape[3])
            roomy[:, :, : self.length] = own
            kept.append(roomy)
        self.buffers = kept


def attend(
    query: Any, keys: Any, values: Any, *, scale: float, bias: Any = None, is_causal: bool = False
) -> tuple[Any, Any]:
    """Attention with its log-sum-exp.

    Args:
        query: [B, H, n, D].
        keys: [B, H, m, D].
        values: [B, H, m, D].
        scale: factor on the scores.
        bias: added to the scores, broadcast to [B, H, n, m]; None for none.
        is_causal: whether each of n = m queries sees the keys up to its own; then without a bias.

    Returns:
        Output [B, H, n, D] in the query's dtype, and log-sum-exp [B, H, n] in float32.
    """
    import torch

    fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if fused is not None and query.device.type == "cpu":
        output, total = fused(query, keys, values, 0.0, is_causal, attn_mask=bias, scale=scale)
        return output, total
    if is_causal:
        bias = _causal_bias(query)
    scores = torch.matmul(query, keys.transpose(-1, -2)).float() * scale
    if bias is not None:
        scores = scores + bias
    total = torch.logsumexp(scores, dim=-1)
    return torch.matmul(torch.exp(scores - total[..., None]).to(values.dtype), values), total


def cascade_attention(
    query: Any, keys: Any, values: Any, *, bias: Any, scale: float, prefixes: Sequence[SharedStates]
) -> Any:
    """Attention over [prefix | own] of every row, each prefix read once.

    Args:
        query: [B, H, n, D].
        keys: own keys, [B, K, own, D].
        values: own values, [B, K, own, D].
        bias: added to the scores over own tokens, broadcast to [B, 1, n, own]; None where every one of n = own tokens
            sees those up to itself.
        scale: factor on the scores.
        prefixes: which rows share which prefix.

    Returns:
        [B, n, H, D], contiguous.
    """
    import torch

    n_rows, n_heads, n_new, width = query.shape
    n_kv = keys.shape[1]
    n_shared = n_heads // n_kv
    is_causal = bias is None and n_new > 1 and n_shared == 1
    if bias is None and n_new > 1 and not is_causal:
        bias = _causal_bias(query)
    # Heads that share keys are further queries of one head: nothing is expanded.
    if bias is not None and n_shared > 1 and n_new > 1:
        bias = bias.repeat(1, 1, n_shared, 1)
    folded = query.reshape(n_rows, n_kv, n_shared * n_new, width)
    output, total = attend(folded, keys, values, scale=scale, bias=bias, is_causal=is_causal)
    merged = output
    if prefixes:
        queries = folded.transpose(0, 1)
        parts = []
        for prefix in prefixes:
            n = prefix.stop - prefix.start
            asked = queries[:, prefix.start : prefix.stop].reshape(1, n_kv, n * n_shared * n_new, width)
            shared, shared_total = attend(asked, prefix.keys, prefix.values, scale=scale)
            parts.append((shared.view(n_kv, n, n_shared * n_new, -1), shared_total.view(n_kv, n, n_shared * n_new)))
        if sum(part.shape[1] for part, _ in parts) == n_rows:
            shared, shared_total = (
                torch.cat(both, 1) if len(both) > 1 else both[0] for both in zip(*parts, strict=True)
            )
        else:  # rows without a prefix: nothing, of no weight
            shared = output.new_zeros(n_kv, n_rows, n_shared * n_new, output.shape[-1])
            shared_total = total.new_full(shared.shape[:3], -torch.inf)
            for prefix, (part, part_total) in zip(prefixes, parts, strict=True):
                shared[:, prefix.start : prefix.stop] = part
                shared_total[:, prefix.start : prefix.stop] = part_total
        weight = torch.sigmoid(total - shared_total.transpose(0, 1))[..., None].to(output.dtype)
        merged = torch.lerp(shared.transpose(0, 1), output, weight)
    return merged.reshape(n_rows, n_heads, n_new, -1).transpose(1, 2).contiguous()


def _attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **kwargs: Any
) -> tuple[Any, None]:
    """The attention function as transformers calls it: own keys and values come in, prefixes from the cache in use."""
    cascade = _in_use.get()
    asked = sorted(name for name, setting in kwargs.items() if name not in _HARMLESS and setting is not None)
    if cascade is None or asked:
        raise UnsupportedModel(f"attention with {', '.join(asked) or 'no cascade in use'}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    prefixes = cascade.prefixes(cascade.latest.index)
    return cascade_attention(query, key, value, bias=attention_mask, scale=scale, prefixes=prefixes), None


def _causal_bias(query: Any) -> Any:
    """Added to the scores of n tokens over themselves, [1, 1, n, n]."""
    import torch

    n = query.shape[-2]
    return torch.full((n, n), -torch.inf, dtype=query.dtype, device=query.device).triu_(1)[None, None]


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


def _as_layer(own: OwnTokens) -> Any:
    """The layer as transformers' `Cache` wants it."""
    from transformers.cache_utils import DynamicLayer

    class OwnLayer(DynamicLayer):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            return own.update(key_states, value_states)

        def get_seq_length(self) -> int:
            return own.length

    return OwnLayer()
