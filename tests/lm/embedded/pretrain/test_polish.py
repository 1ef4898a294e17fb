from __future__ import annotations

import dataclasses

import numpy as np

from copa_harness.lm.embedded.pretrain.batches import EpisodeMaker
from copa_harness.lm.embedded.pretrain.episodes import Mix
from copa_harness.lm.embedded.pretrain.recipe import FOUNDATION

MIX = Mix(kinds=(1, 0.2, 0.2, 0.5), n_features=(1, 1, 1, 1, 1))


def test_rows_of_fourteen_hundred_tokens_are_filled_with_turns(tokenizer):
    batch = EpisodeMaker(tokenizer, n_tokens=1400).batch(MIX, 3, seed=(1,))
    assert (batch.ids == 0).mean() < 0.05
    assert batch.turn.max() >= 24
    assert batch.shares.shape[1] == batch.header.shape[1] == 24


def test_labels_of_one_start_share_their_first_token_and_weigh_the_later_ones_fully(tokenizer):
    mix = dataclasses.replace(MIX, same_start=1.0, kinds=(1, 0, 0, 0), reasoning=0.0, name_weight=0.2)
    batch = EpisodeMaker(tokenizer, n_tokens=300).batch(mix, 12, seed=(2,))
    alike = [
        len({batch.ids[row, at + 1] for at in np.nonzero(batch.turn[row] >= 0)[0]}) == 1
        for row in range(len(batch.ids))
    ]
    assert np.mean(alike) > 0.5
    assert not np.any(np.isclose(batch.weights, 0.3))


def test_the_polishing_stage_falls_along_a_line_and_leaves_the_runs_decay_alone():
    polish, end = FOUNDATION.stages[-1], FOUNDATION.total_steps - FOUNDATION.stages[-1].steps
    without = dataclasses.replace(FOUNDATION, stages=FOUNDATION.stages[:-1])
    for step in (10, 1500, 3000, end - 1):
        assert FOUNDATION.rate_share(step) == without.rate_share(step)
    assert FOUNDATION.rate_share(end) == polish.slope[0]
    assert FOUNDATION.rate_share(FOUNDATION.total_steps - 1) < 0.05 * polish.slope[0]
