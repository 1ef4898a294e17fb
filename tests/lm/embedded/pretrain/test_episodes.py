from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from copa_harness.lm.embedded.pretrain.batches import Batch, EpisodeMaker
from copa_harness.lm.embedded.pretrain.episodes import KINDS, Mix
from copa_harness.lm.embedded.pretrain.worlds import BANNED_WORDS

MIX = Mix(kinds=(1, 0.3, 0.3, 2), n_features=(1, 1, 1, 2, 1), reasoning=0.1, stretch=0.5)


@pytest.fixture(scope="module")
def maker(tokenizer) -> EpisodeMaker:
    return EpisodeMaker(tokenizer, n_tokens=384)


@pytest.fixture(scope="module")
def batch(maker) -> Batch:
    return maker.batch(MIX, 60, seed=(1, 2))


def test_the_same_seed_gives_the_same_batch(maker, batch):
    again = maker.batch(MIX, 60, seed=(1, 2))
    other = maker.batch(MIX, 60, seed=(1, 3))
    assert all(np.array_equal(getattr(batch, f.name), getattr(again, f.name)) for f in dataclasses.fields(Batch))
    assert not np.array_equal(batch.ids, other.ids)


def test_no_episode_contains_a_word_of_the_held_out_tasks(tokenizer, batch):
    for row in batch.ids:
        words = set(re.findall(r"[a-z]+", tokenizer.decode(row[row > 0]).lower()))
        assert not words & BANNED_WORDS


def test_rows_are_nearly_full(batch):
    assert (batch.ids == 0).mean() < 0.05


def test_the_header_stands_before_the_label_and_values_are_numbers(tokenizer, batch):
    for row in range(len(batch.ids)):
        for turn in np.nonzero(batch.header_ok[row])[0]:
            header = batch.header[row, turn]
            assert tokenizer.decode([batch.ids[row, header]]).endswith(" ## ]]\n")
            for slot in np.nonzero(batch.slot_ok[row])[0]:
                text = tokenizer.decode([batch.ids[row, batch.value_at[row, turn, slot]]])
                assert re.fullmatch(r"\d+(\.\d+)?", text)


def test_a_stated_rule_decides_every_label(tokenizer, batch):
    seen = 0
    for row in np.nonzero(batch.kind == KINDS.index("rule"))[0]:
        for turn in np.nonzero(batch.header_ok[row])[0]:
            place = batch.clause_label_at[row, batch.fired[row, turn]]
            assert batch.ids[row, place] == batch.ids[row, batch.header[row, turn] + 1]
            seen += 1
    assert seen > 50


def test_a_value_that_fulfils_its_clause_points_at_that_clauses_threshold(tokenizer, batch):
    compared = 0
    for row in np.nonzero(batch.kind == KINDS.index("rule"))[0]:
        text = tokenizer.decode(batch.ids[row])
        if text.count(" is below ") != (batch.threshold_at[row] > 0).sum():
            continue
        for turn in np.nonzero(batch.header_ok[row])[0]:
            for slot in np.nonzero(batch.slot_ok[row])[0]:
                clause = batch.first_true[row, turn, slot]
                if clause == 3:
                    continue
                value = float(tokenizer.decode([batch.ids[row, batch.value_at[row, turn, slot]]]))
                threshold = float(tokenizer.decode([batch.ids[row, batch.threshold_at[row, clause]]]))
                assert value < threshold
                compared += 1
    assert compared > 20


def test_kernel_weights_are_causal_and_sum_to_one_or_zero(batch):
    sums = batch.kernel.sum(-1)
    assert np.all(np.isclose(sums, 1, atol=1e-4) | (sums == 0))
    assert np.all(np.triu(batch.kernel) == 0)


def test_what_cannot_be_known_is_not_asked(maker):
    mix = dataclasses.replace(MIX, kinds=(1, 0, 0, 0), system=0.0, reasoning=0.0)
    rows = maker.batch(mix, 10, seed=(5,))
    assert not np.any(rows.turn == 0)


def test_positions_rise_and_stay_inside_the_rotary_table(batch):
    assert np.all(np.diff(batch.positions, axis=1) >= 0)
    assert batch.positions.max() < 2048
