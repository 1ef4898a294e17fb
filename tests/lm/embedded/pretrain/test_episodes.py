from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from copa_harness.lm.embedded.pretrain.batches import Batch, EpisodeMaker
from copa_harness.lm.embedded.pretrain.episodes import KINDS, Mix
from copa_harness.lm.embedded.pretrain.worlds import BANNED_WORDS, OWN_TASK_WORDS

OWN = Mix(
    kinds=(1, 0.2, 0.2, 0.5, 1.5),
    n_features=(1, 1, 1, 2, 1),
    n_classes=(1, 1, 1, 1, 1, 1, 1),
    plain_answer=0.2,
    any_output=0.9,
    n_outputs=(2, 1, 1),
    output_kinds=(2, 1, 1),
    any_inputs=0.7,
    extra_inputs=0.4,
    reasoning=0.1,
)
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
    fields = dataclasses.fields(Batch)
    assert all(np.array_equal(getattr(batch, f.name), getattr(again, f.name)) for f in fields)
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


@pytest.fixture(scope="module")
def own(tokenizer) -> tuple[Batch, list[str]]:
    batch = EpisodeMaker(tokenizer, n_tokens=640).batch(OWN, 80, seed=(7,))
    return batch, [tokenizer.decode(row[row > 0]) for row in batch.ids]


def test_own_names_come_in_all_shapes_and_are_never_those_of_the_own_name_tasks(own):
    texts = own[1]
    for sign in ("(bool)", "(int)", "Literal[", "2. `", "3. `", ", then `[[ ## "):
        assert sum(sign in text for text in texts) >= 3, sign
    words = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
    assert not words & (BANNED_WORDS | OWN_TASK_WORDS)
    outputs = {re.search(r"Your output fields are:\n1\. `(\w+)`", text).group(1) for text in texts}
    assert len(outputs) > 40


def test_a_marker_of_every_output_is_written_in_order_and_its_name_is_asked(tokenizer, own):
    batch, texts = own
    for row, text in enumerate(texts):
        listed = text[text.index("Your output fields") : text.index("All interactions")]
        names = re.findall(r"^\d\. `(\w+)`", listed, re.M)
        turn = text.split("<|assistant|>")[1:2]
        if not turn or "<|end|>" not in turn[0]:
            continue
        assert re.findall(r"\[\[ ## (\w+) ## \]\]", turn[0].split("<|end|>")[0]) == [*names, "completed"]
        asked = tokenizer.decode(batch.ids[row, 1:][batch.naming[row]])
        assert asked == "".join(f"{name} ## ]]\n" for name in names)
        assert np.all(batch.weights[row][batch.naming[row]] > 0.2)


def test_sentences_are_near_when_they_share_key_words(own):
    batch, _ = own
    texts = np.nonzero(batch.kind == KINDS.index("text"))[0]
    assert len(texts) > 10
    assert any((batch.kernel[row].sum(-1) > 0).any() for row in texts)
    for row in texts:
        for turn, earlier in zip(*np.nonzero(batch.kernel[row] > 0.3), strict=True):
            assert earlier < turn


def test_key_words_stand_in_the_marked_sentence(tokenizer, own):
    batch, _ = own
    compared = 0
    for row in np.nonzero(batch.kind == KINDS.index("text"))[0]:
        for turn in np.nonzero(batch.header_ok[row])[0]:
            low, high = batch.sentence_at[row, turn]
            sentence = tokenizer.decode(batch.ids[row, low:high]).lower()
            for word in batch.words[row, turn]:
                if word:
                    assert tokenizer.decode([word]).lower()[1:] in sentence
                    compared += 1
    assert compared > 30
    places = batch.sentence_at[batch.kind != KINDS.index("text")]
    assert np.array_equal(places[..., 0], places[..., 1])


def test_a_value_that_nothing_says_is_not_asked_before_it_was_shown(tokenizer):
    mix = dataclasses.replace(OWN, kinds=(1, 0, 0, 0, 0), output_kinds=(0, 0, 1), n_outputs=(1,), reasoning=0.0)
    batch = EpisodeMaker(tokenizer, n_tokens=400).batch(mix, 40, seed=(3,))
    unsaid = 0
    for row in batch.ids:
        listed = re.search(r"1\. `\w+` \(int\): ?(.*)\n", tokenizer.decode(row).split("output fields")[1])
        unsaid += listed.group(1) == ""
    assert unsaid > 0
    assert (batch.turn == 0).any(1).sum() < len(batch.ids)
