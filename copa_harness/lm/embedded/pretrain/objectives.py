"""The losses of pretraining: the next token, and supervision of what the layers in between should know and look at.

Small decoders stay for millions of tokens at "copies one of the labels seen". What ends that is telling the middle
layers what to do, during training only: probes regress an example's own feature values where the answer is decided, and
attention heads are pulled (cross-entropy over positions) to a Gaussian kernel over earlier examples (Nadaraya-Watson
regression), and, when the instruction states a rule, to the thresholds of the value's field and to the label of the
clause that fires. Symbols as in ``episodes``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copa_harness.lm.embedded.pretrain.batches import Batch
from copa_harness.lm.embedded.pretrain.episodes import KINDS, N_CLAUSES, N_SLOTS

# layer 1 or 0: numbers look at the field name before them (heads 0, 1)
# layer 2: a stated label looks at its clause's threshold (heads 2, 3), an answer at its own sentence (heads 0, 1)
# layer 3: an answer looks at like examples (heads 0, 1), a value at its field's thresholds (heads 2, 3)
# layer 4: an answer looks at the value that makes a clause fire (heads 0, 1)
# layer 5: an answer looks at the stated label of the clause that fires (heads 0, 1)
TAPPED_LAYERS = (0, 1, 2, 3, 4, 5)
_NAME_HEADS, _MATCH_HEADS, _DECIDE_HEADS, _CHOOSE_HEADS, _GATHER_HEADS = (slice(0, 2),) * 5
_OWN_HEADS, _READ_HEADS = (slice(2, 4),) * 2
_WAVES = (1.0, 2.0, 4.0)
_TARGETS_PER_SLOT = 1 + 2 * len(_WAVES)


@dataclass(frozen=True, slots=True)
class TensorBatch:
    """A ``Batch`` as tensors; same fields, same shapes."""

    ids: Tensor
    weights: Tensor
    positions: Tensor
    turn: Tensor
    naming: Tensor
    kind: Tensor
    header: Tensor
    header_ok: Tensor
    shares: Tensor
    slot_ok: Tensor
    kernel: Tensor
    words: Tensor
    sentence_at: Tensor
    value_at: Tensor
    name_at: Tensor
    field_at: Tensor
    threshold_at: Tensor
    clause_label_at: Tensor
    same_field: Tensor
    first_true: Tensor
    fired: Tensor


def to_tensors(batch: Batch) -> TensorBatch:
    """Shares memory with the arrays."""
    return TensorBatch(**{name: torch.from_numpy(getattr(batch, name)) for name in TensorBatch.__slots__})


class Supervision(nn.Module):
    """Linear probes and attention targets on the tapped layers; thrown away after training."""

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

    def forward(
        self,
        taps: list[Tensor],
        batch: TensorBatch,
        *,
        name_layer: int,
        decide: bool,
        word_table: Tensor | None = None,
        gather: bool = False,
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Probe loss, pull loss, and their parts for the log.

        Args:
            taps: For each of ``TAPPED_LAYERS`` its input, queries and keys.
            batch: The rows.
            name_layer: Where numbers are pulled to look at their field's name: 1 at first (easier to learn), 0 later,
                where the name's tokens are still plain embeddings; then only the first turns are supervised.
            decide: Whether answers are pulled to the value that makes a stated clause fire.
            word_table: Embeddings, when answers shall also know the key words of their own sentence.
            gather: Whether these answers are also pulled to look at the sentence.
        """
        inputs, queries, keys = taps[0::3], taps[1::3], taps[2::3]
        rows = torch.arange(len(batch.ids))[:, None]
        probe = pull = torch.zeros(())
        parts: dict[str, float] = {}

        place = torch.cat([batch.header, batch.header + 1], 1)
        place_ok = torch.cat([batch.header_ok, batch.header_ok], 1)
        shares = torch.cat([batch.shares, batch.shares], 1)
        waves = [f(2 * math.pi * w * shares) for w in _WAVES for f in (torch.cos, torch.sin)]
        targets = torch.stack([2 * shares - 1, *waves], -1)
        predicted = (self._normal(inputs[3][rows, place]) @ self.share_probe).view(targets.shape)
        mask = (place_ok[:, :, None] & batch.slot_ok[:, None]).float()
        loss = (((predicted - targets) ** 2).mean(-1) * mask).sum() / mask.sum().clamp(min=1)
        parts["values"] = loss.item()
        probe = probe + 3.0 * loss

        value_ok = batch.header_ok[:, :, None] & batch.slot_ok[:, None]
        if value_ok.any():
            slots = torch.arange(N_SLOTS).expand(value_ok.shape)
            at_values = inputs[2][rows[:, :, None], batch.value_at]
            loss = F.cross_entropy(self._normal(at_values[value_ok]) @ self.slot_probe, slots[value_ok])
            parts["slot"] = loss.item()
            probe = probe + 0.3 * loss

        said = place_ok & (batch.words[:, :, 0] > 0).repeat(1, 2)
        if word_table is not None and said.any():
            words = batch.words.repeat(1, 2, 1)[said]
            logits = (self._normal(inputs[3][rows, place][said]) @ self.word_probe) @ word_table.detach().float().T
            looked = logits.log_softmax(-1).gather(1, words)
            loss = -((looked * (words > 0)).sum(1) / (words > 0).sum(1)).mean()
            parts["words"] = loss.item()
            probe = probe + 0.4 * loss
            if gather:
                span = batch.sentence_at.repeat(1, 2, 1)
                loss = _span_pull(queries[2][:, _GATHER_HEADS], keys[2][:, _GATHER_HEADS], place, span, said)
                parts["sentence"] = loss.item()
                pull = pull + loss

        log_attention = _log_attention(queries[3][:, _MATCH_HEADS], keys[3][:, _MATCH_HEADS], batch.header)
        on_labels = _at(log_attention, (batch.header + 1)[:, None].expand(-1, batch.header.shape[1], -1))
        has_target = (batch.kernel.sum(-1) > 0).float()
        entropy = -(batch.kernel * (batch.kernel + 1e-9).log()).sum(-1)
        loss = -(on_labels * batch.kernel[:, None]).sum(-1).mean(1)
        n = has_target.sum().clamp(min=1)
        parts["kernel"] = (((loss - entropy) * has_target).sum() / n).item()
        pull = pull + (loss * has_target).sum() / n

        named = value_ok & (batch.name_at[..., 1] > batch.name_at[..., 0])
        if named[:, :4].any():
            n = named.shape[1] if name_layer else 4
            name_queries, name_keys = queries[name_layer][:, _NAME_HEADS], keys[name_layer][:, _NAME_HEADS]
            loss = _span_pull(name_queries, name_keys, batch.value_at[:, :n], batch.name_at[:, :n], named[:, :n])
            parts["name"] = loss.item()
            pull = pull + loss

        ruled = (batch.kind == KINDS.index("rule")) & batch.header_ok.any(1)
        if ruled.any():
            rule_probe, rule_pull, rule_parts = self._rules(
                inputs, queries, keys, batch, ruled.nonzero()[:, 0], name_layer, decide
            )
            probe, pull = probe + rule_probe, pull + rule_pull
            parts |= rule_parts
        return probe, pull, parts

    def _rules(
        self,
        inputs: list[Tensor],
        queries: list[Tensor],
        keys: list[Tensor],
        batch: TensorBatch,
        ruled: Tensor,
        name_layer: int,
        decide: bool,
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        field_at, threshold_at, label_at = (
            batch.field_at[ruled],
            batch.threshold_at[ruled],
            batch.clause_label_at[ruled],
        )
        stated = field_at[..., 1] > 0
        name = _span_pull(
            queries[name_layer][ruled, _NAME_HEADS],
            keys[name_layer][ruled, _NAME_HEADS],
            threshold_at,
            field_at,
            stated,
        )
        # only what comes earlier can be looked at: where the label comes first, the threshold looks at the label
        later, earlier = torch.maximum(label_at[:, :-1], threshold_at), torch.minimum(label_at[:, :-1], threshold_at)
        span = torch.stack([earlier, earlier + 1], -1)
        own = _span_pull(queries[2][ruled, _OWN_HEADS], keys[2][ruled, _OWN_HEADS], later, span, stated)

        value_at, header, header_ok = batch.value_at[ruled], batch.header[ruled], batch.header_ok[ruled]
        n_rows, n_turns = header.shape
        rows = torch.arange(n_rows)[:, None]
        value_ok = header_ok[:, :, None] & batch.slot_ok[ruled][:, None]
        # the last "place to look" is the row's first token: nowhere
        thresholds = F.pad(batch.threshold_at[ruled], (0, 1))
        read_queries, read_keys = queries[3][ruled, _READ_HEADS], keys[3][ruled, _READ_HEADS]
        log_attention = _log_attention(read_queries, read_keys, value_at.view(n_rows, -1))
        looked = _at(log_attention, thresholds[:, None, None].expand(-1, 2, n_turns * N_SLOTS, -1), given=True)
        looked = looked.view(n_rows, 2, n_turns, N_SLOTS, N_CLAUSES + 1)
        same = -(looked[:, 0] * batch.same_field[ruled]).sum(-1)[value_ok].mean()
        first_true = batch.first_true[ruled]
        first = -looked[:, 1].gather(-1, first_true[..., None])[..., 0][value_ok].mean()

        log_attention = _log_attention(queries[5][ruled, _CHOOSE_HEADS], keys[5][ruled, _CHOOSE_HEADS], header)
        label_at = label_at.gather(1, batch.fired[ruled])
        fired = (
            -log_attention.gather(3, label_at[:, None, :, None].expand(-1, 2, -1, -1))[..., 0].mean(1)[header_ok].mean()
        )

        extra = {}
        pulls = name + own + same + first + fired
        if decide:
            slot_of_clause = F.pad(batch.same_field[ruled][:, 0, :, :-1].argmax(1), (0, 1))
            deciding = value_at.gather(2, slot_of_clause.gather(1, batch.fired[ruled])[..., None])[..., 0]
            n_clauses = stated.sum(1, keepdim=True)
            deciding = torch.where(batch.fired[ruled] < n_clauses, deciding, 0)
            log_attention = _log_attention(queries[4][ruled, _DECIDE_HEADS], keys[4][ruled, _DECIDE_HEADS], header)
            chosen = log_attention.gather(3, deciding[:, None, :, None].expand(-1, 2, -1, -1))[..., 0]
            decided = -chosen.mean(1)[header_ok].mean()
            pulls = pulls + decided
            extra["decided"] = decided.item()

        at_values = self._normal(inputs[4][ruled][rows[:, :, None], value_at][value_ok])
        clause_logits = at_values @ self.clause_probe
        clause = F.cross_entropy(clause_logits, first_true[value_ok])
        at_headers = self._normal(inputs[5][ruled][rows, header][header_ok])
        fired_logits = at_headers @ self.fired_probe
        fired_class = F.cross_entropy(fired_logits, batch.fired[ruled][header_ok])
        parts = {
            "clause_name": name.item(),
            "own_clause": own.item(),
            "same_field": same.item(),
            "first_true": first.item(),
            "fired": fired.item(),
            "clause_right": (clause_logits.argmax(-1) == first_true[value_ok]).float().mean().item(),
            "fired_right": (fired_logits.argmax(-1) == batch.fired[ruled][header_ok]).float().mean().item(),
        }
        return 0.5 * clause + 0.5 * fired_class, pulls, parts | extra

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


def _at(log_attention: Tensor, places: Tensor, *, given: bool = False) -> Tensor:
    """Log attention at key positions: (B, n, K) shared by the heads, or (B, H, n, K) when ``given`` per head."""
    if not given:
        places = places[:, None].expand(-1, log_attention.shape[1], -1, -1)
    return log_attention.gather(3, places)
