"""Which rows make a demonstration set."""

import dspy
import numpy as np
import pytest

from copa_harness.optimize.propose import similarity as selection
from copa_harness.optimize.propose.demos import SelectionBasis, chosen_sets
from copa_harness.optimize.propose.similarity import distances, row_vectors


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def clusters(n_each, *, seed=0):
    """Vectors of three tight clusters in each of two strata, and the strata."""
    generator = np.random.default_rng(seed)
    centres = [(0, 0), (10, 0), (0, 10), (100, 0), (110, 0), (100, 10)]
    vectors = np.vstack([np.array(centre) + generator.normal(0, 0.1, (n_each, 2)) for centre in centres])
    return vectors, ["a"] * 3 * n_each + ["b"] * 3 * n_each


def test_places_are_shared_among_labels_as_far_as_they_go(generator):
    assert selection.quotas(["a"] * 9 + ["b"] * 9, 6, generator) == {"a": 3, "b": 3}
    assert selection.quotas(["a"] * 9 + ["b"], 6, generator) == {"a": 5, "b": 1}
    assert sum(selection.quotas(["a", "b"], 6, generator).values()) == 2


@pytest.mark.parametrize("choose", [selection.diverse_rows, selection.typical_rows])
def test_spread_and_typical_sets_show_every_cluster_once(choose, generator):
    vectors, strata = clusters(8)
    rows = choose(vectors, strata, 6, generator)
    assert sorted(row // 8 for row in rows) == [0, 1, 2, 3, 4, 5]


def test_typical_rows_are_no_outliers_and_diverse_rows_are(generator):
    vectors = np.vstack([np.random.default_rng(1).normal(0, 1, (30, 2)), [[50.0, 50.0]]])
    strata = ["a"] * 31
    assert 30 in selection.diverse_rows(vectors, strata, 2, generator)
    assert 30 not in selection.typical_rows(vectors, strata, 1, generator)


def test_equal_rows_do_not_stop_a_choice(generator):
    vectors, strata = np.zeros((6, 2)), ["a"] * 6
    assert len(set(selection.diverse_rows(vectors, strata, 4, generator))) == 4
    assert len(set(selection.typical_rows(vectors, strata, 4, generator))) == 4


def test_the_heaviest_rows_of_every_label_are_taken(generator):
    rows = selection.heaviest_rows(["a", "a", "a", "b", "b", "b"], [1, 5, 2, 9, 0, 3], 4, generator)
    assert sorted(rows) == [1, 2, 3, 5]


def test_sets_are_repeatable_distinct_and_named_by_their_arm():
    pool = [(dspy.Example(x=str(i), y="ab"[i % 2]), "ab"[i % 2]) for i in range(20)]
    vectors = row_vectors([demo for demo, _ in pool], ["x"])
    basis = SelectionBasis(vectors=vectors, targets=vectors[:0])
    plan = [(4, method) for method in ("typical", "random", "diverse")] * 3
    made = [
        chosen_sets(pool, source="labelled", plan=plan, basis=basis, generator=np.random.default_rng(7))
        for _ in range(2)
    ]
    assert made[0] == made[1]
    assert len({frozenset(demo.x for demo in one.demos) for one, _ in made[0]}) == 9
    assert {arm for _, arm in made[0]} >= {"labelled", "labelled typical", "labelled diverse"}
    assert basis.methods == ("random", "diverse", "typical")


def test_numbers_categories_and_texts_count_alike():
    rows = [
        dspy.Example(size=f"{i}.0", colour="red" if i % 2 else "blue", note=f"word{i % 5} and word{i % 3} again {i}")
        for i in range(20)
    ]
    for field in ("size", "colour", "note"):
        vectors = row_vectors(rows, [field])
        assert np.mean(distances(vectors, vectors) ** 2) == pytest.approx(1.0, rel=0.01)
    far = distances(*[row_vectors(rows, ["note"])] * 2)
    assert far[0, 15] < far[0, 1]


def test_missing_numbers_and_constant_columns_have_a_place():
    rows = [dspy.Example(size=size, same="x") for size in ("1", "?", "3", "5")]
    vectors = row_vectors(rows, ["size", "same"])
    assert vectors.shape == (4, 1)
    assert vectors[1, 0] == pytest.approx(0.0)
    assert row_vectors(rows, ["same"]).shape == (4, 1)
