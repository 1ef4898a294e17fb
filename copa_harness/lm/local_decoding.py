"""How each row of a batch picks its tokens and when it stops: two hooks for the library's `generate`.

Every row has rules and random numbers of its own, so requests with different temperatures, limits and stop
strings share a batch and none can tell who else was in it. A step whose choice hangs on less than rounding
(a near-tie) is flagged, since there the batch could decide; the engine then answers that row alone.

Sampling is by inversion: one uniform number per token against the cumulative probabilities in token order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

NEAR_TIE = {"float32": 3e-5}
"""Largest gap between the two best logits, relative to the largest logit, that the rounding of a batch may turn."""
NEAR_EDGE = 2e-5
"""The same for a sampled token: distance in probability to a neighbour's edge, or to the top_p cut."""


@dataclass(frozen=True, slots=True)
class DecodingRules:
    """One request's rules.

    Attributes:
        max_tokens: most tokens to generate, >= 1.
        temperature: 0 is greedy.
        top_p, top_k: sampling limits, 1.0 and 0 for none.
        stop: strings that end the answer and are cut from it.
        seed: of this request's random numbers.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0


class RowState:
    """What one row has generated so far."""

    __slots__ = ("ids", "reason", "rules", "text")

    def __init__(self, rules: DecodingRules) -> None:
        self.rules = rules
        self.ids: list[int] = []
        self.reason: Literal["stop", "length", "cancelled"] | None = None
        self.text: str | None = None


class RowChooser:
    """A logits processor that leaves greedy rows as they are and puts a sampled row's choice on top.

    Args:
        rows: the batch's rows in order.
        dtype: of the model's arithmetic; near-ties are looked for where batching is exact but for rounding.
    """

    def __init__(self, rows: Sequence[RowState], *, dtype: str) -> None:
        self._tolerance = NEAR_TIE.get(dtype, 0.0)
        self._step = 0
        self._near_steps: list[Any] = []
        self._greedy_rows = [i for i, row in enumerate(rows) if row.rules.temperature <= 0]
        self._sampled_rows = [i for i, row in enumerate(rows) if row.rules.temperature > 0]
        sampled = [rows[i].rules for i in self._sampled_rows]
        self._n_rows = len(rows)
        if sampled:
            longest = max(rules.max_tokens for rules in sampled) + 2
            self._uniforms = np.stack([np.random.default_rng(rules.seed).random(longest) for rules in sampled])
            self._temperatures = np.array([[rules.temperature] for rules in sampled])
            self._top_ps = np.array([[rules.top_p] for rules in sampled])
            self._top_ks = [rules.top_k for rules in sampled]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The scores (shape [rows, vocabulary], changed in place) with every row's choice on top."""
        import torch

        near = torch.zeros(self._n_rows, dtype=torch.bool, device=scores.device)
        if self._greedy_rows and self._tolerance:
            greedy = scores if not self._sampled_rows else scores[self._greedy_rows]
            best = greedy.topk(2, dim=-1).values
            near[self._greedy_rows] = (best[:, 0] - best[:, 1]) < self._tolerance * greedy.abs().amax(-1)
        if self._sampled_rows:
            chosen, edge = self._sample(scores[self._sampled_rows])
            scores[self._sampled_rows] = -torch.inf
            scores[self._sampled_rows, chosen] = 0.0
            if self._tolerance:
                near[self._sampled_rows] = edge < NEAR_EDGE
        self._near_steps.append(near)
        self._step += 1
        return scores

    def near_ties(self, rows: Sequence[RowState]) -> list[bool]:
        """For every row, whether one of the tokens it kept was a near-tie."""
        import torch

        steps = torch.stack(self._near_steps).tolist()
        return [any(steps[step][i] for step in range(min(len(row.ids), len(steps)))) for i, row in enumerate(rows)]

    def _sample(self, scores: Any) -> tuple[Any, Any]:
        """Chosen token ids and each row's distance to the nearest edge; shapes [rows]."""
        import torch

        def column(values: Any) -> Any:
            return torch.as_tensor(values, dtype=torch.float64, device=scores.device)

        probabilities = torch.softmax(scores.double() / column(self._temperatures), dim=-1)
        for i, top_k in enumerate(self._top_ks):
            if top_k:
                kept = probabilities[i].topk(min(top_k, probabilities.shape[-1])).indices
                mask = torch.zeros_like(probabilities[i]).scatter_(0, kept, 1.0)
                probabilities[i] = probabilities[i] * mask / (probabilities[i] * mask).sum()
        edge = torch.ones(len(scores), dtype=torch.float64, device=scores.device)
        top_ps = column(self._top_ps)
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
        step = min(self._step, self._uniforms.shape[1] - 1)
        target = column(self._uniforms[:, step : step + 1]) * total
        chosen = torch.searchsorted(cumulative, target, right=True).clamp(max=scores.shape[-1] - 1)
        edge = torch.minimum(edge, ((cumulative - target).abs() / total).amin(-1))
        return chosen[:, 0], edge


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
            row = self._rows[i]
            if row.reason is None:
                row.ids.append(token)
                self._judge(i, row, token)
        return torch.tensor([row.reason is not None for row in self._rows], device=input_ids.device)

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
