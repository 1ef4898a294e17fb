"""The engine's own decoding loop, over a cascade cache: rows that are done leave the batch at once.

A batch is [shared prefix, kept once | padding | own suffix | new tokens]. The library's `generate` would carry done
rows to the end and prepare its settings anew at each call. Also scores given continuations, which a constrained answer
is chosen by. Knows nothing of requests, adapters or where prefixes come from.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from copa_harness.lm.local_cascade import CascadeCache, RowGroup
from copa_harness.lm.local_decoding import RowChooser, RowState, RowStopper
from copa_harness.lm.local_llama import LoraRows

SHRINK_SHARE = 0.125
"""Share of done rows from which they are dropped from the batch; copying the others' states costs about one step."""
FIRST_ROOM_TOKENS = 64
"""Room for new tokens a batch starts with; grows when answers are longer."""


@dataclass(frozen=True, slots=True)
class Suffixes:
    """The rows of a batch behind their prefixes.

    Attributes:
        ids: own prompt tokens of each row, at least one.
        prefix_lengths: tokens of each row's shared prefix.
        groups: which rows share which prefix, in order.
        loras: which rows are answered by which adapter, in order, where the reader mixes them.
    """

    ids: Sequence[Sequence[int]]
    prefix_lengths: Sequence[int]
    groups: Sequence[RowGroup]
    loras: Sequence[LoraRows] = ()


class Reader(Protocol):
    """What reads new tokens into a batch's states; see `LlamaDecoder.read`."""

    n_layers: int

    def read(
        self, ids: Any, *, positions: Any, bias: Any, cascade: CascadeCache, n_kept: int, loras: Sequence[LoraRows] = ()
    ) -> Any:
        """Logits of the last `n_kept` of the new tokens `ids` [rows, new]."""


class LibraryReader:
    """Any fitting model of transformers, with one adapter, or none, active for all rows."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.n_layers = int(module.config.get_text_config(decoder=True).num_hidden_layers)

    def read(
        self, ids: Any, *, positions: Any, bias: Any, cascade: CascadeCache, n_kept: int, loras: Sequence[LoraRows] = ()
    ) -> Any:
        """Logits of the last `n_kept` of the new tokens `ids` [rows, new]."""
        if loras:
            raise ValueError("got rows of several adapters; expected the one that is active in the module")
        with cascade.in_use(self._module):
            output = self._module(
                input_ids=ids,
                attention_mask=bias.to(self._module.dtype),
                position_ids=positions,
                past_key_values=cascade.cache,
                use_cache=True,
                logits_to_keep=n_kept,
            )
        return output.logits


class CascadeRun:
    """One batch on its way: the suffixes are read at construction, then rows decode or continuations are scored.

    Args:
        reader: the model.
        suffixes: the rows.
        device: where it computes.
        pad_id: any token id.
        room: new tokens per row to make room for.
    """

    def __init__(self, reader: Reader, suffixes: Suffixes, *, device: Any, pad_id: int, room: int) -> None:
        import torch

        self._reader, self._pad_id, self._loras = reader, pad_id, list(suffixes.loras)
        width = max(map(len, suffixes.ids))
        pads = [width - len(ids) for ids in suffixes.ids]
        self._cascade = CascadeCache(reader.n_layers, suffixes.groups, room=width + room)
        self._first = torch.tensor([n - pad for n, pad in zip(suffixes.prefix_lengths, pads, strict=True)]).to(device)
        self._pads = torch.tensor(pads).to(device)
        self._is_padded = any(pads)
        self._length = 0
        rows = [[pad_id] * pad + list(ids) for pad, ids in zip(pads, suffixes.ids, strict=True)]
        self.logits = self._forward(torch.tensor(rows).to(device), n_kept=1)[:, -1]

    def decode(self, rows: Sequence[RowState], chooser: RowChooser, stopper: RowStopper) -> None:
        """Generate until every row is done."""
        live, logits = list(range(len(rows))), self.logits
        while True:
            tokens, near = chooser.choose(logits, live)
            for i, token, near_tie in zip(live, tokens.tolist(), near.tolist(), strict=True):
                stopper.take(i, token, near_tie=near_tie)
            kept = [place for place, i in enumerate(live) if rows[i].reason is None]
            if not kept:
                return
            if len(live) - len(kept) >= max(1, SHRINK_SHARE * len(live)):
                self._select(kept)
                tokens, live = tokens[kept], [live[place] for place in kept]
            logits = self._forward(tokens[:, None], n_kept=1)[:, -1]

    def score(self, choices: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Log-probability of each row's continuations, summed over their tokens; the batch is used up.

        Args:
            choices: for each row its continuations, each at least one token.
        """
        import torch

        first = torch.log_softmax(self.logits.double(), dim=-1)
        parents = [i for i, row in enumerate(choices) for _ in row]
        flat = [list(ids) for row in choices for ids in row]
        sums = first[parents, [ids[0] for ids in flat]]
        width = max(map(len, flat)) - 1
        if width:
            self._select(parents)
            inputs = [ids[:-1] + [self._pad_id] * (width - len(ids) + 1) for ids in flat]
            logits = self._forward(torch.tensor(inputs).to(self._pads.device), n_kept=width)
            following = torch.log_softmax(logits.double(), dim=-1)
            for place, ids in enumerate(flat):
                if len(ids) > 1:
                    steps = list(range(len(ids) - 1))
                    sums[place] += following[place, steps, ids[1:]].sum()
        values = iter(sums.tolist())
        return [[next(values) for _ in row] for row in choices]

    def _forward(self, ids: Any, *, n_kept: int) -> Any:
        """Logits of the last `n_kept` of the new tokens `ids` [rows, new]."""
        import torch

        n_rows, n_new = ids.shape
        end = self._length + n_new
        new = torch.arange(self._length, end, device=ids.device)
        if self._is_padded or n_new > 1:
            keys = torch.arange(end, device=ids.device)
            # A padding token sees itself, so that no row of the softmax is empty.
            seen = ((keys >= self._pads[:, None])[:, None, :] & (keys <= new[:, None])) | (keys == new[:, None])
            bias = torch.zeros(seen.shape, device=ids.device).masked_fill_(~seen, -torch.inf)[:, None]
        else:
            # transformers takes a mask of four dimensions as it is; without one it would make its own
            bias = torch.zeros(n_rows, 1, 1, end, device=ids.device)
        positions = (self._first[:, None] + new).clamp(min=0)
        logits = self._reader.read(
            ids, positions=positions, bias=bias, cascade=self._cascade, n_kept=n_kept, loras=self._loras
        )
        self._length = end
        return logits

    def _select(self, rows: Sequence[int]) -> None:
        self._cascade.select(rows)
        self._first, self._pads = self._first[list(rows)], self._pads[list(rows)]
        spans = [(span.lora, bisect_left(rows, span.start), bisect_left(rows, span.stop)) for span in self._loras]
        self._loras = [LoraRows(start, stop, lora) for lora, start, stop in spans if stop > start]
