"""Episodes as token rows with everything the objectives supervise.

A row holds one episode: the system message and as many turns as fit into T tokens. Symbols: B rows, T tokens, P
recorded turns, S feature slots, C clauses. Position arrays index the T input tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from copa_harness.lm.embedded.pretrain import template
from copa_harness.lm.embedded.pretrain.episodes import KINDS, N_CLAUSES, N_SLOTS, N_TURNS, Episode, Mix
from copa_harness.lm.embedded.pretrain.tokenizer import SYSTEM
from copa_harness.lm.embedded.pretrain.worlds import BANNED_WORDS

_LONG_ROW, _LONG_TURNS = 1000, 96
N_WORDS = 3
_KERNEL_WIDTH = 0.05
"""Standard deviation of the Gaussian kernel over feature shares."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows stacked along a leading B, as arrays or as tensors.

    Attributes:
        ids: (B, T + 1) tokens; input is ``[:, :-1]``, target ``[:, 1:]``.
        weights: (B, T) loss weight of predicting the next token: 1 first label token, .3 later ones, .1 the
            marker after it, .08 format tokens of a quarter of the turns, 0 what cannot be known.
        positions: (B, T) rotary positions.
        turn: (B, T) number of the turn at a first label token's predictor, else -1.
        naming: (B, T) predictors of an output's name in a first turn.
        kind: (B,) index into ``KINDS``.
        header: (B, P) position that predicts the turn's first label token (which stands at header + 1).
        header_ok: (B, P) whether both positions are inside the row.
        shares: (B, P, S) printed feature values as shares of their format's range.
        slot_ok: (B, S) which slots exist.
        kernel: (B, P, P) Gaussian weights over earlier turns, rows sum to 1 or are all 0.
        words: (B, P, W) first tokens of the key words in each turn's sentence, 0 where none.
        sentence_at: (B, P, 2) first and last + 1 position of each turn's deciding sentence, equal if none.
        value_at: (B, P, S) position of each value token, 0 where none.
        name_at: (B, P, S, 2) first and last + 1 position of the field name before each value, equal if none.
        field_at: (B, C, 2) likewise for the field names in a stated rule's clauses.
        threshold_at: (B, C) positions of a stated rule's thresholds, 0 where none.
        clause_label_at: (B, C + 1) positions of the labels in the stated rule, the last clause's at index n_clauses.
        same_field: (B, P, S, C + 1) where a value token should look: uniform over its field's clauses, or the last
            index (nowhere).
        first_true: (B, P, S) index of the first clause of the value's field that holds, C if none.
        fired: (B, P) index into ``clause_label_at`` of the label that the rule gives.
    """

    ids: Any
    weights: Any
    positions: Any
    turn: Any
    naming: Any
    kind: Any
    header: Any
    header_ok: Any
    shares: Any
    slot_ok: Any
    kernel: Any
    words: Any
    sentence_at: Any
    value_at: Any
    name_at: Any
    field_at: Any
    threshold_at: Any
    clause_label_at: Any
    same_field: Any
    first_true: Any
    fired: Any

    def each(self, change: Callable[[Any], Any]) -> Batch:
        """The same with every field changed."""
        return Batch(*(change(getattr(self, one.name)) for one in fields(self)))


class EpisodeMaker:
    """Makes rows of one length from a ``Mix``.

    Args:
        tokenizer: The embedded model's tokenizer.
        n_tokens: T.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, n_tokens: int) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._n_tokens = n_tokens
        vocabulary = tokenizer.get_vocab()
        self._pieces = sorted(
            piece
            for piece in vocabulary
            if len(piece) >= 2 and piece.isascii() and piece.isalpha() and piece.islower() and piece not in BANNED_WORDS
        )

    def batch(self, mix: Mix, n_rows: int, *, seed: tuple[int, ...]) -> Batch:
        """``n_rows`` episodes, a pure function of the mix and the seed."""
        numpy_rng = np.random.default_rng(seed)
        rng = random.Random(int(numpy_rng.integers(2**62)))
        rows = [self._row(mix, rng, numpy_rng) for _ in range(n_rows)]
        return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})

    def _row(self, mix: Mix, rng: random.Random, numpy_rng: np.random.Generator) -> dict[str, Any]:
        """One episode as the fields of a ``Batch``, without the leading B."""
        n_turns = N_TURNS if self._n_tokens < _LONG_ROW else _LONG_TURNS
        episode = Episode(mix, rng, numpy_rng, self._pieces, n_turns=n_turns)
        t, c = self._n_tokens, N_CLAUSES
        ids: list[int] = []
        weights = np.zeros(t + 1, np.float32)
        turn = np.full(t + 1, -1, np.int64)
        naming = np.zeros(t + 1, np.bool_)
        positions = np.arange(t + 1)
        row_threshold, row_label = np.zeros(c, np.int64), np.zeros(c + 1, np.int64)
        row_field, name_at = np.zeros((c, 2), np.int64), np.zeros((N_TURNS, N_SLOTS, 2), np.int64)
        header, value_at = np.zeros(N_TURNS, np.int64), np.zeros((N_TURNS, N_SLOTS), np.int64)
        header_ok, sentence_at = np.zeros(N_TURNS, np.bool_), np.zeros((N_TURNS, 2), np.int64)
        whole = rng.random() < mix.system
        if whole or episode.threshold_places:
            # a stated rule is needed even where the mix leaves the system message out: then it stands there alone
            text = SYSTEM + (template.system_text(episode.shape, episode.instruction) if whole else episode.instruction)
            encoded = self._backend.encode(text, add_special_tokens=False)
            starts = np.array([start for start, _ in encoded.offsets])
            shift = len(text) - len(episode.instruction)
            for i, place in enumerate(episode.threshold_places):
                row_threshold[i] = np.searchsorted(starts, place + shift)
                name = episode.names[episode.clauses[i].feature]
                field = episode.field_places[i] + shift
                row_field[i] = np.searchsorted(starts, (field, field + len(name)))
            for i, place in enumerate(episode.label_places):
                row_label[i] = np.searchsorted(starts, place + shift)
            ids += encoded.ids
        stretch = rng.randint(1, 300) if rng.random() < mix.stretch else 0
        told = whole or bool(episode.threshold_places)
        seen: set[tuple[int, str]] = set()
        for i, outputs in enumerate(episode.outputs):
            if len(ids) > t:
                break
            written = episode.turn_text(i, mix)
            encoded = self._backend.encode(written.text, add_special_tokens=False)
            starts = np.array([start for start, _ in encoded.offsets])
            base = len(ids)
            if stretch:
                positions[base:] += rng.randint(0, stretch)
            ids += encoded.ids
            label_at = base + int(np.searchsorted(starts, written.label_at))
            # a value can be known that the prompt says or an earlier turn showed
            known_values = [
                (told and listed) or (n, value) in seen
                for n, (listed, value) in enumerate(zip(episode.listed, outputs, strict=True))
            ]
            known = known_values[episode.main]
            seen.update(enumerate(outputs))
            format_weight = 0.08 if rng.random() < 0.25 else 0.0
            for span in written.spans:
                if span.output is not None and not known_values[span.output]:
                    continue
                if span.naming and not (whole or "Respond with" in written.text):
                    continue
                first, later = (span.first, span.later) if span.first else (format_weight, format_weight)
                lo, hi = base + int(np.searchsorted(starts, span.start)), base + int(np.searchsorted(starts, span.end))
                for at in range(lo, min(hi, t + 1)):
                    weights[at - 1] = first if at == lo else min(later, first)
                    naming[at - 1] = span.naming
            if known and label_at - 1 < t:
                turn[label_at - 1] = i
            if i < N_TURNS and label_at < t and not episode.shape.reasoning:
                header[i], header_ok[i] = label_at - 1, True
                sentence_at[i] = base + np.searchsorted(starts, written.sentence)
                for j, (name_start, name_end, place) in enumerate(written.values):
                    value_at[i, j] = base + np.searchsorted(starts, place)
                    name_at[i, j] = base + np.searchsorted(starts, (name_start, name_end))
        ids = (ids + [0] * (t + 1))[: t + 1]
        return {
            "ids": np.array(ids, np.int64),
            "weights": weights[:t],
            "positions": np.minimum(positions[:t], 2047),
            "turn": turn[:t],
            "naming": naming[:t],
            "kind": episode.kind,
            "header": header,
            "header_ok": header_ok,
            "shares": episode.printed_shares(),
            "slot_ok": np.arange(N_SLOTS) < episode.n_features,
            "kernel": self._kernel(episode, header_ok),
            "words": self._words(episode, header_ok),
            "sentence_at": sentence_at,
            "value_at": value_at,
            "name_at": name_at,
            "field_at": row_field,
            "threshold_at": row_threshold,
            "clause_label_at": row_label,
            **episode.rule_targets(),
        }

    def _words(self, episode: Episode, header_ok: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """First tokens of each recorded turn's key words, (P, W)."""
        words = np.zeros((N_TURNS, N_WORDS), np.int64)
        for turn in np.nonzero(header_ok)[0] if episode.key_words else ():
            for i, word in enumerate(sorted(episode.key_words[turn])[:N_WORDS]):
                words[turn, i] = self._backend.encode(word, add_special_tokens=False).ids[0]
        return words

    def _kernel(self, episode: Episode, header_ok: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
        """Nadaraya-Watson weights of earlier turns, (P, P); zero for rules, where nearness is beside the point.

        Numbers are near by their distance, sentences by how many key words they have in common.
        """
        weights = np.zeros((N_TURNS, N_TURNS), np.float32)
        if episode.kind in (KINDS.index("rule"), KINDS.index("axis")):
            return weights
        earlier = np.tril(np.ones((N_TURNS, N_TURNS), bool), -1) & header_ok[None] & header_ok[:, None]
        if episode.key_words:
            words = episode.key_words[:N_TURNS]
            common = np.array([[len(a & b) for b in words] for a in words], np.float64) * earlier
            raw = np.where(common > 0, 6.0 ** (common - common.max(1, keepdims=True)), 0.0)
            return np.asarray(raw / np.maximum(raw.sum(1, keepdims=True), 1e-9), np.float32)
        shares = episode.printed_shares()
        distance = ((shares[:, None] - shares[None]) ** 2).sum(-1)
        distance = np.where(earlier, distance, np.inf)
        nearest = distance.min(1, keepdims=True)
        nearest = np.where(np.isfinite(nearest), nearest, 0.0)
        raw = np.exp(-np.minimum((distance - nearest) / (2 * _KERNEL_WIDTH**2), 60.0)) * earlier
        return np.asarray(raw / np.maximum(raw.sum(1, keepdims=True), 1e-9), np.float32)
