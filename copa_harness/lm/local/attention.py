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


class SharedStates(NamedTuple):
    """Keys and values of a layer, [1, K, P, D], and the places (a slice or a tensor) of the rows that read them."""

    rows: Any
    n_rows: int
    keys: Any
    values: Any


class CascadeCache:
    """The states of a batch: what its rows share once, and every row's own tokens from the beginning of its line.

    What lies in a line behind the row's own tokens is masked, and written over by the tokens that come.

    Args:
        n_layers: layers of the model.
        shared: for each row the states before its own tokens, none or several in order; each has `layers` with `keys`
            and `values` of one row. Rows that share states hold the same object.
        room: own tokens per row to make room for; grows by half when it is not enough.
        device: where states are kept.

    Attributes:
        lengths: own tokens of each row, [B].
        longest: most own tokens of any row.
    """

    def __init__(self, n_layers: int, shared: Sequence[Sequence[Any]], *, room: int, device: Any = "cpu") -> None:
        import torch

        self.shared = [tuple(states) for states in shared]
        self.layers = [OwnTokens(self, index, room) for index in range(n_layers)]
        self.latest = self.layers[0]
        self.lengths = torch.zeros(len(shared), dtype=torch.long, device=device)
        self.longest = 0
        self.is_even = True
        self._groups: list[tuple[Any, int, Any]] | None = None
        self._places: dict[int, tuple[Any, Any]] = {}

    @cached_property
    def cache(self) -> Any:
        """These states as transformers' own models want them."""
        from transformers.cache_utils import Cache

        return Cache(layers=[_as_layer(layer) for layer in self.layers])

    def prefixes(self, index: int) -> list[SharedStates]:
        """The shared states in one layer."""
        if self._groups is None:
            self._groups = [
                (_as_slice(rows, self.lengths.device), len(rows), states) for rows, states in self._rows_by_states()
            ]
        layers = ((rows, n, states.layers[index]) for rows, n, states in self._groups)
        return [SharedStates(rows, n, layer.keys, layer.values) for rows, n, layer in layers]

    def places(self, n_new: int) -> tuple[Any, Any]:
        """Row and line index of `n_new` tokens to come in every row, broadcast to [B, n_new]."""
        import torch

        if n_new not in self._places:
            steps = torch.arange(n_new, device=self.lengths.device)
            rows = torch.arange(len(self.lengths), device=self.lengths.device)
            self._places[n_new] = (rows[:, None], self.lengths[:, None] + steps)
        return self._places[n_new]

    def advance(self, n_read: Sequence[int]) -> None:
        """So many of the tokens appended last are each row's own; the others are forgotten."""
        self._set_lengths(self.lengths + self.lengths.new_tensor(n_read))

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
        """Keep these rows, in this order."""
        import torch

        places = torch.as_tensor(list(rows), device=self.lengths.device)
        for layer in self.layers:
            layer.select(places)
        self.shared = [self.shared[row] for row in rows]
        self._set_lengths(self.lengths[places])

    def put(self, other: CascadeCache, rows: Sequence[int]) -> None:
        """The rows of another batch take these places, of rows that are no longer wanted or behind the last one."""
        import torch

        n_rows = max(len(self.shared), max(rows) + 1)
        places = torch.as_tensor(list(rows), device=self.lengths.device)
        for layer, others in zip(self.layers, other.layers, strict=True):
            layer.put(others, places, n_rows)
        self.shared += [()] * (n_rows - len(self.shared))
        for row, states in zip(rows, other.shared, strict=True):
            self.shared[row] = states
        lengths = self.lengths.new_zeros(n_rows)
        lengths[: len(self.lengths)] = self.lengths
        lengths[places] = other.lengths
        self._set_lengths(lengths)

    def _set_lengths(self, lengths: Any) -> None:
        self.lengths = lengths
        own = lengths.tolist()
        self.longest, self.is_even = max(own, default=0), len(set(own)) <= 1
        self._places, self._groups = {}, None

    def _rows_by_states(self) -> list[tuple[list[int], Any]]:
        found: dict[int, tuple[list[int], Any]] = {}
        for row, several in enumerate(self.shared):
            for states in several:
                found.setdefault(id(states), ([], states))[0].append(row)
        return list(found.values())


class OwnTokens:
    """Keys and values of the rows' own tokens in one layer, [B, K, room, D], in buffers that grow."""

    def __init__(self, owner: CascadeCache, index: int, room: int) -> None:
        self.owner, self.index, self.room = owner, index, room
        self.buffers: list[Any] = []

    def update(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Write the states of new tokens behind each row's own; returns all lines up to the longest's end."""
        owner, n_new = self.owner, keys.shape[-2]
        end = owner.longest + n_new
        if not self.buffers or end > self.buffers[0].shape[-2]:
            self._grow((keys, values), len(keys), end + end // 2 if self.buffers else end)
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            if owner.is_even:
                buffer[:, :, owner.longest : end] = new
            else:
                rows, places = owner.places(n_new)
                buffer[rows, :, places] = new.transpose(1, 2)
        owner.latest = self
        return self.buffers[0][:, :, :end], self.buffers[1][:, :, :end]

    def states(self, row: int, length: int) -> tuple[Any, Any]:
        """Keys and values of one row's first tokens, [1, K, length, D]; not copied."""
        keys, values = self.buffers
        return keys[row : row + 1, :, :length], values[row : row + 1, :, :length]

    def select(self, rows: Any) -> None:
        """Keep these rows, in this order."""
        kept = []
        for buffer in self.buffers:
            own = buffer[:, :, : self.owner.longest][rows]
            roomy = own.new_zeros(*own.shape[:2], buffer.shape[2], own.shape[3])
            roomy[:, :, : self.owner.longest] = own
            kept.append(roomy)
        self.buffers = kept

    def put(self, other: OwnTokens, rows: Any, n_rows: int) -> None:
        """Another batch's rows take these places; `n_rows` is how many there are afterwards."""
        if not other.buffers and not self.buffers:
            return
        longest = max(self.owner.longest, other.owner.longest)
        if not self.buffers or n_rows > len(self.buffers[0]) or longest > self.buffers[0].shape[2]:
            self._grow(self.buffers or other.buffers, n_rows, longest + 1)
        if other.buffers:
            for buffer, new in zip(self.buffers, other.buffers, strict=True):
                buffer[rows, :, : other.owner.longest] = new[:, :, : other.owner.longest]

    def _grow(self, like: Sequence[Any], n_rows: int, n_tokens: int) -> None:
        # Zeros: a masked place must hold a number, since nothing times "not a number" is not nothing.
        room = max(self.room, n_tokens, self.buffers[0].shape[2] if self.buffers else 0)
        grown = [one.new_zeros(n_rows, one.shape[1], room, one.shape[3]) for one in like]
        for buffer, old in zip(grown, self.buffers, strict=False):
            buffer[: len(old), :, : self.owner.longest] = old[:, :, : self.owner.longest]
        self.buffers = grown


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
        bias = causal_bias(query.shape[-2], 0, dtype=query.dtype, device=query.device)
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
        prefixes: which rows share which states; a row may have several.

    Returns:
        [B, n, H, D], contiguous.
    """
    n_rows, n_heads, n_new, width = query.shape
    n_kv = keys.shape[1]
    n_shared = n_heads // n_kv
    is_causal = bias is None and n_new > 1 and n_shared == 1
    if bias is None and n_new > 1 and not is_causal:
        bias = causal_bias(query.shape[-2], 0, dtype=query.dtype, device=query.device)
    # Heads that share keys are further queries of one head: nothing is expanded.
    if bias is not None and n_shared > 1 and n_new > 1:
        bias = bias.repeat(1, 1, n_shared, 1)
    folded = query.reshape(n_rows, n_kv, n_shared * n_new, width)
    output, total = attend(folded, keys, values, scale=scale, bias=bias, is_causal=is_causal)
    queries = folded.transpose(0, 1)
    for prefix in prefixes:
        n, everywhere = prefix.n_rows, prefix.n_rows == n_rows
        asked = (queries if everywhere else queries[:, prefix.rows]).reshape(1, n_kv, n * n_shared * n_new, width)
        shared, shared_total = attend(asked, prefix.keys, prefix.values, scale=scale)
        shared = shared.view(n_kv, n, n_shared * n_new, -1).transpose(0, 1)
        shared_total = shared_total.view(n_kv, n, n_shared * n_new).transpose(0, 1)
        if everywhere:
            output, total = merged(output, total, shared, shared_total)
        else:
            output[prefix.rows], total[prefix.rows] = merged(
                output[prefix.rows], total[prefix.rows], shared, shared_total
            )
    return output.reshape(n_rows, n_heads, n_new, -1).transpose(1, 2).contiguous()


def merged(output: Any, total: Any, other: Any, other_total: Any) -> tuple[Any, Any]:
    """Attention over two sets of keys from that over each, with its log-sum-exp."""
    import torch

    weight = torch.sigmoid(total - other_total)[..., None].to(output.dtype)
    return torch.lerp(other, output, weight), torch.logaddexp(total, other_total)


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


def causal_bias(n_new: int, n_before: int, *, dtype: Any, device: Any) -> Any:
    """Added to the scores of new tokens over those before them and themselves, [1, 1, new, before + new]."""
    import torch

    empty = torch.full((n_new, n_before + n_new), -torch.inf, dtype=dtype, device=device)
    return empty.triu_(n_before + 1)[None, None]


def _as_slice(rows: Sequence[int], device: Any) -> Any:
    """Ascending places of rows as a slice where there is no gap, else as a tensor."""
    import torch

    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.as_tensor(list(rows), device=device)


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
            return own.owner.longest

    return OwnLayer()
