"""Which examples a candidate sees next, and what a partly seen candidate says."""

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


def raced(incumbent, candidate, *, size, ties_lose, fixed_order=False):
    """(whether the candidate was dropped, how many examples it saw)."""
    seen = {}
    while len(seen) < len(incumbent):
        known = [None] * len(incumbent) if fixed_order else incumbent
        for row in next_rows(known, seen=seen, size=size):
            seen[row] = candidate[row]
        order = [*seen, *(row for row in range(len(incumbent)) if row not in seen)]
        if len(seen) < len(incumbent) and cannot_catch_up(
            [incumbent[row] for row in order], list(seen.values()), ties_lose=ties_lose
        ):
            return True, len(seen)
    return False, len(seen)


def test_what_can_be_gained_comes_first_and_the_most_of_it_before_the_rest():
    incumbent = [1.0, 0.5, 1.0, 0.0, None, 0.5]
    assert next_rows(incumbent, seen=(), size=9) == [3, 1, 5]
    assert next_rows(incumbent, seen={3, 1}, size=2) == [5]
    assert next_rows(incumbent, seen={1, 3, 5}, size=2) == [0, 2]
    assert next_rows(incumbent, seen=range(6), size=2) == []


@given(pairs=right_wrong, size=st.integers(1, 9), ties_lose=st.booleans())
def test_a_race_drops_only_candidates_that_would_not_end_better(pairs, size, ties_lose):
    incumbent, candidate = [a for a, _ in pairs], [b for _, b in pairs]
    dropped, n_seen = raced(incumbent, candidate, size=size, ties_lose=ties_lose)
    difference = sum(candidate) - sum(incumbent)
    if dropped:
        assert difference < 0 or (ties_lose and difference == 0)
    if (
        sum(incumbent) == len(incumbent) - 1
        and candidate[incumbent.index(0.0)] == 0.0
        and ties_lose
        and len(incumbent) > 1
    ):
        assert n_seen == 1  # nothing to be gained is known after the only example that could be


@given(pairs=right_wrong, seen=st.integers(1, 40))
def test_the_sign_test_never_speaks_against_a_candidate_that_would_end_as_good(pairs, seen):
    incumbent, candidate = [a for a, _ in pairs], [b for _, b in pairs]
    rows = next_rows(incumbent, seen=(), size=seen)
    if sum(candidate) >= sum(incumbent):
        assert worse_p_value([incumbent[row] for row in rows], [candidate[row] for row in rows]) >= 0.5


def test_where_hard_examples_are_hard_for_all_fewer_are_needed_than_in_a_fixed_order():
    generator = np.random.default_rng(0)
    incumbent = (generator.random(25) < 0.88).astype(float)
    chance = np.where(incumbent == 1.0, 0.92, 0.2)
    candidates = (generator.random((300, 25)) < chance).astype(float).tolist()
    incumbent = incumbent.tolist()
    ours, fixed = (
        sum(raced(incumbent, one, size=7, ties_lose=True, fixed_order=fixed_order)[1] for one in candidates)
        for fixed_order in (False, True)
    )
    assert ours < 0.75 * fixed


def test_a_partly_seen_candidate_is_weighed_by_strata_and_does_not_flatter():
    incumbent = [0.0, 0.0, *[1.0] * 8]
    nothing_gained = [0.0, 0.0, *[None] * 8]
    one_gained = [1.0, 0.0, *[None] * 8]
    held_elsewhere = [1.0, 0.0, *[1.0] * 6, None, None]
    assert estimated_difference(nothing_gained, incumbent) == pytest.approx(-0.16)
    assert estimated_difference(one_gained, incumbent) == pytest.approx(0.1 - 0.16)
    assert estimated_difference(held_elsewhere, incumbent) == pytest.approx((1 - 2 * 0.4 / 8) / 10)
    assert math.isnan(estimated_difference([None] * 10, incumbent))


@given(pairs=right_wrong)
def test_a_fully_seen_candidate_is_estimated_exactly(pairs):
    incumbent, candidate = [a for a, _ in pairs], [b for _, b in pairs]
    differences = paired_differences(candidate, incumbent)
    assert estimated_difference(candidate, incumbent) == pytest.approx(sum(differences) / len(differences))
