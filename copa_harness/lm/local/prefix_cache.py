"""The shared prefix of a batch: its key-value states computed once, kept within a byte limit, spread over rows.

Keys are (LoRA fingerprint, prefix tokens): states of two adapters never mix.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

PrefixKey = tuple[str, tuple[int, ...]]
"""(LoRA fingerprint or "", prefix tokens)"""

DEFAULT_LIMIT_BYTES = 512 << 20
MIN_PREFIX_TOKENS = 8
"""A shorter prefix costs more to keep than to compute again."""


class PrefixCache:
    """Least-recently-used store of prefilled prefixes.

    Args:
        limit_bytes: ceiling on the states kept; one larger than the ceiling is used once and dropped.
    """

    def __init__(self, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.n_prefilled = 0
        self._entries: OrderedDict[PrefixKey, tuple[Any, int]] = OrderedDict()
        self._bytes = 0

    def __contains__(self, key: PrefixKey) -> bool:
        return key in self._entries

    def states(self, key: PrefixKey, read: Callable[[PrefixKey], Any]) -> Any:
        """The states of this prefix (batch of one), computed now if they are not kept.

        Args:
            key: whose `key[1]` are the tokens to prefill.
            read: from a key to its states (with `layers`).
        """
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key][0]
        states = read(key)
        self.n_prefilled += 1
        size = sum(tensor.nbytes for layer in states.layers for tensor in _tensors(layer))
        if size <= self.limit_bytes:
            self._entries[key] = (states, size)
            self._bytes += size
            while self._bytes > self.limit_bytes:
                _, (_, dropped) = self._entries.popitem(last=False)
                self._bytes -= dropped
        return states


def prefill(module: Any, ids: Sequence[int], empty: Any) -> Any:
    """The states of a prefix by a model of transformers.

    `module` has the right adapter active; `empty`, a cache of its kind, is filled and returned.
    """
    import torch

    tokens = torch.tensor([list(ids)], device=module.device)
    module(tokens, attention_mask=torch.ones_like(tokens), past_key_values=empty, use_cache=True, logits_to_keep=1)
    return empty


def spread(states: Any, n_rows: int, n_new: int) -> Any:
    """A cache of `n_rows` rows that starts from `states`, with room for `n_new` further tokens per row to begin with.

    `states` (batch of one, or empty) is left as it is.
    """
    import torch
    from transformers.cache_utils import DynamicLayer

    spread_cache = copy.copy(states)
    spread_cache.layers = []
    for layer in states.layers:
        if type(layer) is DynamicLayer:
            spread_cache.layers.append(roomy_layer(layer, n_rows, n_new))
        else:
            own = copy.deepcopy(layer)
            own.reorder_cache(torch.zeros(n_rows, dtype=torch.long))
            spread_cache.layers.append(own)
    return spread_cache


def roomy_layer(prefix: Any, n_rows: int, n_new: int) -> Any:
    """A `DynamicLayer` in one buffer that grows by half: the library's own copies all states at every token."""
    import torch
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
            self.dtype, self.device = key_states.dtype, key_states.device
            self._length = prefix.get_seq_length()
            olds = (prefix.keys, prefix.values) if self._length else (None, None)
            self._rooms = [
                self._room(old, new, self._length + n_new)
                for old, new in zip(olds, (key_states, value_states), strict=True)
            ]
            self.is_initialized = True

        def get_seq_length(self) -> int:
            return self._length if self.is_initialized else int(prefix.get_seq_length())

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            end = self._length + key_states.shape[-2]
            if end > self._rooms[0].shape[-2]:
                old = self._length
                self._rooms = [self._room(room[:, :, :old], room, end + end // 2) for room in self._rooms]
            for room, new in zip(self._rooms, (key_states, value_states), strict=True):
                room[:, :, self._length : end] = new
            self._length = end
            self.keys, self.values = (room[:, :, :end] for room in self._rooms)
            return self.keys, self.values

        def _room(self, old: Any, like: Any, n_tokens: int) -> Any:
            room = torch.empty((n_rows, like.shape[1], n_tokens, like.shape[-1]), dtype=self.dtype, device=self.device)
            if old is not None:
                room[:, :, : old.shape[-2]] = old
            return room

    return RoomyLayer()


def _tensors(layer: Any) -> list[Any]:
    import torch

    found: list[Any] = []
    for value in vars(layer).values():
        values: Sequence[Any] = (
            list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        )
        found += [item for item in values if isinstance(item, torch.Tensor)]
    return found
