"""The losses of pretraining: the next token, and supervision of what the layers in between should know and look at.

Small decoders stay for millions of tokens at "copies one of the labels seen". What ends that is telling the middle
layers what to do, during training only: probes regress an example's own feature values where the answer is decided, and
attention heads are pulled (cross-entropy over positions) to a Gaussian kernel over earlier examples (Nadaraya-Watson
regression), and, when the instruction states a rule, to the thresholds of the value's field and to the label of the
clause that fires. Symbols as in ``episodes``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copa_harness.lm.embedded.pretrain.batches import Batch
from copa_harness.lm.embedded.pretrain.episodes import KINDS, N_CLAUSES, N_SLOTS
from copa_harness.lm.embedded.pretrain.recipe import Stage

# layer 1 or 0: numbers look at the field name before them (heads 0, 1)
# layer 2: a stated label looks at its clause's threshold (heads 2, 3), an answer at its own sentence (heads 0, 1)
# layer 3: an answer looks at like examples (heads 0, 1), a value at its field's thresholds (heads 2, 3)
# layer 4: an answer looks at the value that makes a clause fire (heads 0, 1)
# layer 5: an answer looks at the stated label of the clause that fires (heads 0, 1)
_FIRST_HEADS, _LAST_HEADS = slice(0, 2), slice(2, 4)
_WAVES = (1.0, 2.0, 4.0)
_TARGETS_PER_SLOT = 1 + 2 * len(_WAVES)

Taps = Sequence[tuple[Tensor, ...]]
"""Input, queries and keys of every layer."""


class Supervision(nn.Module):
    """Linear probes and attention targets on the layers; thrown away after training."""

    def __init__(self, width: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self._width = width

        def probe(n: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(width, n, generator=generator) * 0.05)

        self.share_probe = probe(N_SLOTS * _TARGETS_PER_SLOT)
        self.slot_probe = probe(N_SLOTS)
        self.clause_probe = probe(N_CLAUSES + 1)
        self.fired_probe = probe(N_CLAUSES + 1)
        self.word_probe = nn.Parameter(torch.zeros(width, width))

    def forward(self, taps: Taps, batch: Batch, *, stage: Stage, table: Tensor) -> tuple[Tensor, Tensor]:
        """Probe loss and pull loss.

        Args:
            taps: Every layer's input, queries and keys.
            batch: The rows, as tensors.
            stage: What is told.
            table: Embeddings.
        """
        inputs, queries, keys = zip(*taps, strict=True)
        rows = torch.arange(len(batch.ids))[:, None]
        probe = pull = torch.zeros(())

        place = torch.cat([batch.header, batch.header + 1], 1)
        place_ok = torch.cat([batch.header_ok, batch.header_ok], 1)
        shares = torch.cat([batch.shares, batch.shares], 1)
        waves = [f(2 * math.pi * w * shares) for w in _WAVES for f in (torch.cos, torch.sin)]
        targets = torch.stack([2 * shares - 1, *waves], -1)
        predicted = (self._normal(inputs[3][rows, place]) @ self.share_probe).view(targets.shape)
        mask = (place_ok[:, :, None] & batch.slot_ok[:, None]).float()
        probe = probe + 3.0 * (((predicted - targets) ** 2).mean(-1) * mask).sum() / mask.sum().clamp(min=1)

        value_ok = batch.header_ok[:, :, None] & batch.slot_ok[:, None]
        if value_ok.any():
            slots = torch.arange(N_SLOTS).expand(value_ok.shape)
            at_values = inputs[2][rows[:, :, None], batch.value_at]
            probe = probe + 0.3 * F.cross_entropy(self._normal(at_values[value_ok]) @ self.slot_probe, slots[value_ok])

        said = place_ok & (batch.words[:, :, 0] > 0).repeat(1, 2)
        if stage.words and said.any():
            words = batch.words.repeat(1, 2, 1)[said]
            logits = (self._normal(inputs[3][rows, place][said]) @ self.word_probe) @ table.detach().float().T
            looked = logits.log_softmax(-1).gather(1, words)
            probe = probe - 0.4 * ((looked * (words > 0)).sum(1) / (words > 0).sum(1)).mean()
            if stage.gather:
                span = batch.sentence_at.repeat(1, 2, 1)
                pull = pull + _span_pull(queries[2][:, _FIRST_HEADS], keys[2][:, _FIRST_HEADS], place, span, said)

        log_attention = _log_attention(queries[3][:, _FIRST_HEADS], keys[3][:, _FIRST_HEADS], batch.header)
        labels = (batch.header + 1)[:, None, None].expand(-1, *log_attention.shape[1:3], -1)
        loss = -(log_attention.gather(3, labels) * batch.kernel[:, None]).sum(-1).mean(1)
        has_target = (batch.kernel.sum(-1) > 0).float()
        pull = pull + (loss * has_target).sum() / has_target.sum().clamp(min=1)

        named = value_ok & (batch.name_at[..., 1] > batch.name_at[..., 0])
        if named[:, :4].any():
            n = named.shape[1] if stage.name_layer else 4
            at = queries[stage.name_layer][:, _FIRST_HEADS], keys[stage.name_layer][:, _FIRST_HEADS]
            pull = pull + _span_pull(*at, batch.value_at[:, :n], batch.name_at[:, :n], named[:, :n])

        ruled = (batch.kind == KINDS.index("rule")) & batch.header_ok.any(1)
        if ruled.any():
            chosen = ruled.nonzero()[:, 0]
            of_rules = [tuple(one[chosen] for one in layer) for layer in taps]
            rule_probe, rule_pull = self._rules(of_rules, batch.each(lambda field: field[chosen]), stage)
            probe, pull = probe + rule_probe, pull + rule_pull
        return probe, pull

    def _rules(self, taps: Taps, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor]:
        """The same for the rows that state a rule."""
        inputs, queries, keys = zip(*taps, strict=True)

        def pulled(layer: int, heads: slice, *to: Tensor) -> Tensor:
            return _span_pull(queries[layer][:, heads], keys[layer][:, heads], *to)

        stated = batch.field_at[..., 1] > 0
        name = pulled(stage.name_layer, _FIRST_HEADS, batch.threshold_at, batch.field_at, stated)
        # only what comes earlier can be looked at: where the label comes first, the threshold looks at the label
        of_clauses = batch.clause_label_at[:, :-1]
        later, earlier = torch.maximum(of_clauses, batch.threshold_at), torch.minimum(of_clauses, batch.threshold_at)
        own = pulled(2, _LAST_HEADS, later, torch.stack([earlier, earlier + 1], -1), stated)

        n_rows, n_turns = batch.header.shape
        rows = torch.arange(n_rows)[:, None]
        value_ok = batch.header_ok[:, :, None] & batch.slot_ok[:, None]
        # the last "place to look" is the row's first token: nowhere
        thresholds = F.pad(batch.threshold_at, (0, 1))[:, None, None].expand(-1, 2, n_turns * N_SLOTS, -1)
        at_values = batch.value_at.view(n_rows, -1)
        looked = _log_attention(queries[3][:, _LAST_HEADS], keys[3][:, _LAST_HEADS], at_values).gather(3, thresholds)
        looked = looked.view(n_rows, 2, n_turns, N_SLOTS, N_CLAUSES + 1)
        same = -(looked[:, 0] * batch.same_field).sum(-1)[value_ok].mean()
        first = -looked[:, 1].gather(-1, batch.first_true[..., None])[..., 0][value_ok].mean()

        def answers_look(layer: int, at: Tensor) -> Tensor:
            """Cross-entropy of the answers' attention in a layer to one position each, (B, P)."""
            seen = _log_attention(queries[layer][:, _FIRST_HEADS], keys[layer][:, _FIRST_HEADS], batch.header)
            seen = seen.gather(3, at[:, None, :, None].expand(-1, 2, -1, -1))[..., 0]
            return -seen.mean(1)[batch.header_ok].mean()

        pulls = name + own + same + first + answers_look(5, batch.clause_label_at.gather(1, batch.fired))
        if stage.decide:
            slot_of_clause = F.pad(batch.same_field[:, 0, :, :-1].argmax(1), (0, 1))
            deciding = batch.value_at.gather(2, slot_of_clause.gather(1, batch.fired)[..., None])[..., 0]
            pulls = pulls + answers_look(4, torch.where(batch.fired < stated.sum(1, keepdim=True), deciding, 0))

        known = self._normal(inputs[4][rows[:, :, None], batch.value_at][value_ok]) @ self.clause_probe
        clause = F.cross_entropy(known, batch.first_true[value_ok])
        known = self._normal(inputs[5][rows, batch.header][batch.header_ok]) @ self.fired_probe
        return 0.5 * clause + 0.5 * F.cross_entropy(known, batch.fired[batch.header_ok]), pulls

    def _normal(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (self._width,))


def _span_pull(queries: Tensor, keys: Tensor, place: Tensor, span: Tensor, valid: Tensor) -> Tensor:
    """Mean excess cross-entropy of attention from ``place`` (B, ...) to uniform weights over ``span`` (B, ..., 2)."""
    log_attention = _log_attention(queries, keys, place.flatten(1))
    low, high = span.flatten(1, -2).unbind(-1)
    position = torch.arange(keys.shape[2])
    inside = (position >= low[..., None]) & (position < high[..., None])
    n_inside = inside.sum(-1).clamp(min=1)
    cross = -(log_attention * inside[:, None]).sum(-1).mean(1) / n_inside
    return (cross - n_inside.log())[valid.flatten(1)].mean()


def token_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy; logits (n, V), targets and weights (n,)."""
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum() / weights.sum()


def _log_attention(queries: Tensor, keys: Tensor, place: Tensor) -> Tensor:
    """Log attention (B, H, n, T) of the queries at positions ``place`` (B, n), causal."""
    b, _, t, h = queries.shape
    chosen = queries.transpose(1, 2)[torch.arange(b)[:, None], place].transpose(1, 2)
    scores = chosen.float() @ keys.float().transpose(-1, -2) / math.sqrt(h)
    later = torch.arange(t)[None, None, None] > place[:, None, :, None]
    return scores.masked_fill(later, -1e9).log_softmax(-1)
