"""Which examples a candidate sees next, and what a half-filled sheet says."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copa_harness.optimize.search.racing import (
    cannot_catch_up,
    estimated_difference,
    next_rows,
    paired_differences,
    worse_p_value,
)

right_wrong = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=40)


def raced(bar, candidate, *, size, ties_lose, fixed_order=False):
    """(whether the candidate was dropped, how many examples it saw)."""
    seen = {}
    while len(seen) < len(bar):
        known = [None] * len(bar) if fixed_order else bar
        for row in next_rows(known, seen=seen, size=size):
            seen[row] = candidate[row]
        order = [*seen, *(row for row in range(len(bar)) if row not in seen)]
        if len(seen) < len(bar) and cannot_catch_up(
            [bar[row] for row in order], list(seen.values()), ties_lose=ties_lose
        ):
            return True, len(seen)
    return False, len(seen)


def test_what_can_be_gained_comes_first_and_the_most_of_it_before_the_rest():
    bar = [1.0, 0.5, 1.0, 0.0, None, 0.5]
    assert next_rows(bar, seen=(), size=9) == [3, 1, 5]
    assert next_rows(bar, seen={3, 1}, size=2) == [5]
    assert next_rows(bar, seen={1, 3, 5}, size=2) == [0, 2]
    assert next_rows(bar, seen=range(6), size=2) == []


@given(pairs=right_wrong, size=st.integers(1, 9), ties_lose=st.booleans())
def test_a_race_drops_only_candidates_that_would_not_end_better(pairs, size, ties_lose):
    bar, candidate = [a for a, _ in pairs], [b for _, b in pairs]
    dropped, n_seen = raced(bar, candidate, size=size, ties_lose=ties_lose)
    difference = sum(candidate) - sum(bar)
    if dropped:
        assert difference < 0 or (ties_lose and difference == 0)
    if sum(bar) == len(bar) - 1 and candidate[bar.index(0.0)] == 0.0 and ties_lose and len(bar) > 1:
        assert n_seen == 1  # nothing to be gained is known after the only example that could be


@given(pairs=right_wrong, seen=st.integers(1, 40))
def test_the_sign_test_never_speaks_against_a_candidate_that_would_end_as_good(pairs, seen):
    bar, candidate = [a for a, _ in pairs], [b for _, b in pairs]
    rows = next_rows(bar, seen=(), size=seen)
    if sum(candidate) >= sum(bar):
        assert worse_p_value([bar[row] for row in rows], [candidate[row] for row in rows]) >= 0.5


def test_where_hard_examples_are_hard_for_all_fewer_are_needed_than_in_a_fixed_order():
    generator = np.random.default_rng(0)
    bar = (generator.random(25) < 0.88).astype(float)
    chance = np.where(bar == 1.0, 0.92, 0.2)
    candidates = (generator.random((300, 25)) < chance).astype(float).tolist()
    bar = bar.tolist()
    ours, fixed = (
        sum(raced(bar, one, size=7, ties_lose=True, fixed_order=fixed_order)[1] for one in candidates)
        for fixed_order in (False, True)
    )
    assert ours < 0.75 * fixed


def test_a_half_filled_sheet_is_weighed_by_strata_and_does_not_flatter():
    bar = [0.0, 0.0, *[1.0] * 8]
    nothing_gained = [0.0, 0.0, *[None] * 8]
    one_gained = [1.0, 0.0, *[None] * 8]
    held_elsewhere = [1.0, 0.0, *[1.0] * 6, None, None]
    assert estimated_difference(nothing_gained, bar) == pytest.approx(-0.16)
    assert estimated_difference(one_gained, bar) == pytest.approx(0.1 - 0.16)
    assert estimated_difference(held_elsewhere, bar) == pytest.approx((1 - 2 * 0.4 / 8) / 10)
    assert math.isnan(estimated_difference([None] * 10, bar))


@given(pairs=right_wrong)
def test_a_full_sheet_is_estimated_exactly(pairs):
    bar, candidate = [a for a, _ in pairs], [b for _, b in pairs]
    differences = paired_differences(candidate, bar)
    assert estimated_difference(candidate, bar) == pytest.approx(sum(differences) / len(differences))
