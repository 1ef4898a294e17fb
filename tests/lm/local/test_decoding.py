"""Every row by its own rules: what is sampled, near-ties, where an answer ends."""

from __future__ import annotations

import numpy as np

from copa_harness.lm.local.decoding import DecodingRules, Guesses, RowChooser, RowState, RowStopper


def choose(scores, rules, *, steps=1):
    import torch

    rows = [RowState(rule) for rule in rules]
    chooser = RowChooser(rows, dtype="float32")
    chosen = []
    for _ in range(steps):
        chosen.append(chooser(None, torch.tensor(scores, dtype=torch.float32)).argmax(-1).tolist())
        for row, token in zip(rows, chosen[-1], strict=True):
            row.ids.append(token)
    return chosen, chooser, rows


def test_sampled_tokens_follow_the_models_distribution():
    scores = np.log([[0.5, 0.3, 0.2]] * 3000)
    chosen, _, _ = choose(scores, [DecodingRules(1, temperature=1.0, seed=seed) for seed in range(3000)])
    frequencies = np.bincount(chosen[0], minlength=3) / 3000
    assert np.abs(frequencies - [0.5, 0.3, 0.2]).max() < 0.04


def test_top_p_and_top_k_leave_only_the_likeliest_tokens():
    scores = np.log([[0.2, 0.5, 0.3]] * 400)
    by_p, _, _ = choose(scores, [DecodingRules(1, temperature=1.0, top_p=0.7, seed=seed) for seed in range(400)])
    by_k, _, _ = choose(scores, [DecodingRules(1, temperature=1.0, top_k=1, seed=seed) for seed in range(400)])
    assert set(by_p[0]) == {1, 2}
    assert set(by_k[0]) == {1}


def test_a_sampled_row_draws_anew_at_every_step():
    chosen, _, _ = choose(np.zeros((1, 50)), [DecodingRules(20, temperature=1.0, seed=3)], steps=20)
    assert len({step[0] for step in chosen}) > 5


def test_a_near_tie_is_flagged_only_in_the_row_and_step_that_has_it():
    _, chooser, rows = choose([[1.0, 1.0, 0.0], [1.0, 0.5, 0.0]], [DecodingRules(1)] * 2)
    chooser.note_near_ties()
    assert [row.near_tie for row in rows] == [True, False]


def stop(tokens, rules, *, eos=frozenset({9}), is_cancelled=lambda: False):
    import torch

    rows = [RowState(rules, eos_ids=eos, decode=lambda ids: "".join(map(str, ids)), is_cancelled=is_cancelled)]
    stopper = RowStopper(rows)
    for i in range(len(tokens)):
        if stopper(torch.tensor([tokens[: i + 1]]), None).all():
            break
    return rows[0]


def test_a_row_ends_at_its_end_token_limit_or_stop_string():
    assert (stop([1, 9, 2], DecodingRules(5)).reason, stop([1, 9, 2], DecodingRules(5)).ids) == ("stop", [1, 9])
    assert (stop([1, 2, 3], DecodingRules(2)).reason, stop([1, 2, 3], DecodingRules(2)).ids) == ("length", [1, 2])
    by_string = stop([1, 2, 3, 4], DecodingRules(9, stop=("23",)))
    assert (by_string.reason, by_string.text) == ("stop", "1")


def test_a_row_nobody_waits_for_ends():
    assert stop([1, 2, 3], DecodingRules(5), is_cancelled=lambda: True).ids == [1]


def row_with(ids, *, temperature=0.0, max_tokens=50):
    row = RowState(DecodingRules(max_tokens, temperature=temperature))
    row.ids = list(ids)
    return row


def test_a_guess_is_what_followed_the_same_tokens_the_last_time():
    guesses = Guesses([1, 2, 3, 4, 1, 2, 5, 6, 7, 8])
    assert guesses.next(row_with([1, 2]), n_most=3) == [5, 6, 7]
    assert guesses.next(row_with([1, 2, 5, 6]), n_most=9) == [
        7,
        8,
        1,
        2,
        5,
        6,
    ]  # what the row itself has said counts too
    assert guesses.next(row_with([1, 2, 5, 6, 9]), n_most=9) == []


def test_no_guess_where_none_may_be_used():
    assert Guesses([]).next(row_with([1, 1, 1]), n_most=3) == []
    assert Guesses([1, 2, 3, 1, 2]).next(row_with([], temperature=0.5), n_most=3) == []
    assert Guesses([1, 2, 3, 1, 2]).next(row_with([], max_tokens=1), n_most=3) == []
    assert Guesses([1, 2, 3, 1, 2]).next(row_with([]), n_most=0) == []


def test_guesses_grow_as_they_come_true_and_pause_when_they_do_not():
    guesses, row = Guesses([5, 6, *range(10, 40), 5, 6]), row_with([])
    assert len(guesses.next(row, n_most=30)) == 8
    guesses.note(n_guessed=8, n_right=8)
    assert len(guesses.next(row, n_most=30)) == 16
    guesses.note(n_guessed=16, n_right=3)
    assert len(guesses.next(row, n_most=30)) == 16
    guesses.note(n_guessed=16, n_right=0)
    assert len(guesses.next(row, n_most=30)) == 8
    for _ in range(9):
        guesses.note(n_guessed=1, n_right=0)
    assert guesses.next(row, n_most=30) == []
    assert guesses.next(row_with([7, 8, 9, 10, 11, 12, 13]), n_most=30) == [14]  # four tokens alike are worth a try
