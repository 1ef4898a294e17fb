"""From logits to answers: how each row of a batch picks its tokens, when it stops, and the engine's own decoding loop.

Every row has rules and random numbers of its own (`DecodingRules`, `RowState`), so requests with different
temperatures, limits and stop strings share a batch and none can tell who else was in it. Sampling is by inversion: one
uniform number per token against the cumulative probabilities in token order. A step whose choice hangs on less than
rounding (a near-tie) is flagged, since there the batch could decide; the engine then answers that row alone.

`RowChooser` and `RowStopper` serve both loops, the library's `generate` and `CascadeRun`. That one works on a cascade
cache, [shared prefix, kept once | padding | own suffix | new tokens]; rows that are done leave the batch at once, where
`generate` would carry them to the end and prepare its settings anew at each call. It also scores given continuations,
by which a constrained answer is chosen.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from copa_harness.lm.local.attention import CascadeCache, RowGroup
from copa_harness.lm.local.llama import LoraRows

NEAR_TIE = {"float32": 3e-5}
"""Largest gap between the two best logits, relative to the largest logit, that the rounding of a batch may turn."""

NEAR_EDGE = 2e-5
"""The same for a sampled token: distance in probability to a neighbour's edge, or to the top_p cut."""

SHRINK_SHARE = 0.125
"""Share of done rows from which they are dropped from the batch; copying the others' states costs about one step."""

FIRST_ROOM_TOKENS = 64
"""Room for new tokens a batch starts with; grows when answers are longer."""


@dataclass(frozen=True, slots=True)
class DecodingRules:
    """One request's rules.

    Attributes:
        max_tokens: most tokens to generate, >= 1.
        temperature: 0 is greedy.
        top_p, top_k: sampling limits, 1.0 and 0 for none.
        stop: strings that end the answer and are cut from it.
        seed: of this request's random numbers.
        n_logprobs: alternatives to report beside every token's log-probability; None reports none at all.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0
    n_logprobs: int | None = None


TokenScores = tuple[float, tuple[tuple[int, float], ...]]
"""A token's log-probability before temperature and limits, and the best (token, log-probability) at that step."""


class RowState:
    """What one row has generated so far; `near_tie` once one of its tokens hung on rounding."""

    __slots__ = ("ids", "logprobs", "near_tie", "reason", "rules", "text")

    def __init__(self, rules: DecodingRules) -> None:
        self.rules = rules
        self.ids: list[int] = []
        self.logprobs: list[TokenScores] = []
        self.near_tie = False
        self.reason: Literal["stop", "length", "cancelled"] | None = None
        self.text: str | None = None


class RowChooser:
    """Chooses every row's next token. Also a logits processor that puts the choice on top for the library's `generate`.

    Args:
        rows: the batch's rows in order.
        dtype: of the model's arithmetic; near-ties are looked for where batching is exact but for rounding.
    """

    def __init__(self, rows: Sequence[RowState], *, dtype: str) -> None:
        self._rows = rows
        self._tolerance = NEAR_TIE.get(dtype, 0.0)
        self._near_steps: list[Any] = []
        self._uniforms = {
            i: np.random.default_rng(row.rules.seed).random(row.rules.max_tokens + 2)
            for i, row in enumerate(rows)
            if row.rules.temperature > 0
        }

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The scores (shape [rows, vocabulary], changed in place) with every sampled row's choice on top."""
        import torch

        live = range(len(self._rows))
        tokens, near = self.choose(scores, live)
        self._near_steps.append(near)
        for i in live:
            if i in self._uniforms:
                scores[i] = -torch.inf
                scores[i, tokens[i]] = 0.0
        return scores

    def choose(self, scores: Any, live: Sequence[int]) -> tuple[Any, Any]:
        """The next token of some rows, and whether it hangs on a near-tie.

        Args:
            scores: logits, shape [len(live), vocabulary].
            live: which rows they belong to.

        Returns:
            Token ids and flags, both of shape [len(live)].
        """
        import torch

        tokens = scores.argmax(dim=-1)
        near = torch.zeros(len(live), dtype=torch.bool, device=scores.device)
        if self._tolerance:
            low, high = scores.aminmax(dim=-1)
            second = scores.scatter(1, tokens[:, None], -torch.inf).amax(dim=-1)
            near = (high - second) < self._tolerance * torch.maximum(high.abs(), low.abs())
        sampled = [place for place, i in enumerate(live) if i in self._uniforms]
        if sampled:
            chosen, edge = self._sample(scores[sampled], [live[place] for place in sampled])
            tokens[sampled] = chosen
            near[sampled] = edge < NEAR_EDGE if self._tolerance else torch.zeros_like(edge, dtype=torch.bool)
        for place, i in enumerate(live):
            if self._rows[i].rules.n_logprobs is not None and self._rows[i].reason is None:
                self._rows[i].logprobs.append(_token_scores(scores[place], tokens[place], self._rows[i].rules))
        return tokens, near

    def note_near_ties(self) -> None:
        """After the library's `generate`: mark the rows that kept a token chosen on a near-tie."""
        import torch

        steps = torch.stack(self._near_steps).tolist()
        for i, row in enumerate(self._rows):
            row.near_tie = any(steps[step][i] for step in range(min(len(row.ids), len(steps))))

    def _sample(self, scores: Any, rows: Sequence[int]) -> tuple[Any, Any]:
        """Chosen token ids and each row's distance to the nearest edge; shapes [rows]."""
        import torch

        def column(values: Any) -> Any:
            return torch.as_tensor(values, dtype=torch.float64, device=scores.device)[:, None]

        rules = [self._rows[i].rules for i in rows]
        temperatures, top_ps = (column([getattr(one, name) for one in rules]) for name in ("temperature", "top_p"))
        probabilities = torch.softmax(scores.double() / temperatures, dim=-1)
        for place, one in enumerate(rules):
            if one.top_k:
                kept = probabilities[place].topk(min(one.top_k, probabilities.shape[-1])).indices
                mask = torch.zeros_like(probabilities[place]).scatter_(0, kept, 1.0)
                probabilities[place] = probabilities[place] * mask / (probabilities[place] * mask).sum()
        edge = torch.ones(len(scores), dtype=torch.float64, device=scores.device)
        if bool((top_ps < 1).any()):
            ordered, order = probabilities.sort(dim=-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            outside = (before >= top_ps) & (top_ps < 1)
            outside[:, 0] = False
            distance = (before - top_ps).abs().amin(-1)
            edge = torch.where(top_ps[:, 0] < 1, distance, edge)
            probabilities = probabilities.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), 0.0)
        cumulative = probabilities.cumsum(-1)
        total = cumulative[:, -1:]
        draws = [self._uniforms[i][min(len(self._rows[i].ids), len(self._uniforms[i]) - 1)] for i in rows]
        target = column(draws) * total
        chosen = torch.searchsorted(cumulative, target, right=True).clamp(max=scores.shape[-1] - 1)
        edge = torch.minimum(edge, ((cumulative - target).abs() / total).amin(-1))
        return chosen[:, 0], edge


def _token_scores(scores: Any, token: Any, rules: DecodingRules) -> TokenScores:
    import torch

    logprobs = torch.log_softmax(scores.double(), dim=-1)
    best = logprobs.topk(min(rules.n_logprobs or 1, len(logprobs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if rules.n_logprobs else ()
    return float(logprobs[token]), top


class RowStopper:
    """A stopping criterion that ends each row by its own rules and keeps what it generated.

    Args:
        rows: the batch's rows in order; filled here.
        eos_ids: for each row, the token ids that end its answer.
        decoders: for each row, tokens to text.
        is_cancelled: whether nobody waits for row i any more.
    """

    def __init__(
        self,
        rows: Sequence[RowState],
        *,
        eos_ids: Sequence[frozenset[int]],
        decoders: Sequence[Callable[[Sequence[int]], str]],
        is_cancelled: Callable[[int], bool],
    ) -> None:
        self._rows = rows
        self._eos_ids = eos_ids
        self._decoders = decoders
        self._is_cancelled = is_cancelled

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Take every row's newest token; returns which rows are done (bool, shape [rows])."""
        import torch

        for i, token in enumerate(input_ids[:, -1].tolist()):
            self.take(i, token)
        return torch.tensor([row.reason is not None for row in self._rows], device=input_ids.device)

    def take(self, i: int, token: int, *, near_tie: bool = False) -> None:
        """Row i has got this token, unless it is done already."""
        row = self._rows[i]
        if row.reason is None:
            row.ids.append(token)
            row.near_tie |= near_tie
            self._judge(i, row, token)

    def _judge(self, i: int, row: RowState, token: int) -> None:
        if token in self._eos_ids[i]:
            row.reason = "stop"
            return
        if row.rules.stop:
            # A stop string lies in the last tokens: one per character at most, and a few for broken characters.
            decode = self._decoders[i]
            tail = decode(row.ids[-(max(map(len, row.rules.stop)) + 8) :])
            if any(stop in tail for stop in row.rules.stop):
                text = decode(row.ids)
                found = [text.find(stop) for stop in row.rules.stop if stop in text]
                if found:
                    row.reason, row.text = "stop", text[: min(found)]
                    return
        if len(row.ids) >= row.rules.max_tokens:
            row.reason = "length"
        elif self._is_cancelled(i):
            row.reason = "cancelled"


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
