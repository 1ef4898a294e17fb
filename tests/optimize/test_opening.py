"""The opening: how many points, which ones, and who survives."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from copa_harness.optimize.opening import MAX_POINTS, balanced_points, n_opening_points, survivors
from copa_harness.optimize.space import Space


@pytest.fixture
def space(toy):
    from copa_harness.optimize.candidate import Candidate
    from copa_harness.optimize.demos import DemoSet
    from copa_harness.optimize.instructions import InstructionOption

    sets = [DemoSet(f"set {i}", (toy.train[i],)) for i in range(5)]
    texts = [InstructionOption(f"text {i}", f"Say {i}.") for i in range(3)]
    return Space.around(Candidate.of(toy.program(), lm=toy.lm()), demos={"self": sets}, instructions={"self": texts})


def test_every_option_occurs_about_equally_often(space):
    points = balanced_points(space, 12, np.random.default_rng(0))
    assert len({space.signature(point) for point in points}) == 12
    for name, options in space.dimensions.items():
        counts = Counter(point[name] for point in points)
        assert set(counts) == set(options)
        assert max(counts.values()) - min(counts.values()) <= 2


def test_points_seen_already_do_not_come_again_and_a_small_space_runs_out(space):
    own = space.signature(space.point_of_incumbent())
    points = balanced_points(space, 1000, np.random.default_rng(0), taken=[own])
    assert own not in {space.signature(point) for point in points}
    assert space.size // 2 < len(points) < space.size


@pytest.mark.parametrize(("n_examples", "expected"), [(10, 0), (56, 4), (196, 14), (10_000, 26), (math.inf, 26)])
def test_the_opening_is_sized_to_its_calls_and_to_the_largest_dimension(n_examples, expected):
    assert n_opening_points(n_examples, block_size=7, n_options=13) == expected
    assert n_opening_points(math.inf, block_size=7, n_options=1000) == MAX_POINTS


def test_the_better_half_survives_but_never_fewer_than_three():
    generator = np.random.default_rng(0)
    assert survivors([0.1, 0.9, 0.5, 0.8, 0.2, 0.7, 0.3, 0.6], generator) == (1, 3, 5, 7)
    assert len(survivors([0.5, 0.5, 0.5, 0.5], generator)) == 3
    assert survivors([math.nan, 0.2], generator) == (1,)
    assert survivors([], generator) == ()


def test_equal_candidates_survive_by_lot():
    generator = np.random.default_rng(0)
    survived = Counter(i for _ in range(400) for i in survivors([0.5] * 8, generator))
    assert set(survived) == set(range(8))
    assert min(survived.values()) > 140


def test_a_tournament_scores_the_many_briefly_and_the_few_fully(toy):
    from tests.optimize.test_study import searched

    outcome, validation, incumbent, scope = searched(toy, calls=400, max_trials=13)
    lengths = Counter(trial.n_scored for trial in outcome.trials)
    assert lengths[validation.block_size] >= 3
    assert lengths[validation.n] >= 2
    assert validation.mean(outcome.best) > validation.mean(incumbent)
    assert SimpleNamespace(calls=scope.charged_calls).calls < 13 * validation.n


def test_the_first_start_is_scored_in_full_before_anything_else_is_looked_at(toy):
    from tests.optimize.test_study import searched

    alone = searched(toy, calls=400, max_trials=2)[0]
    outcome = searched(toy, calls=400, max_trials=13)[0]
    assert outcome.trials[:2] == alone.trials
    assert outcome.trials[1].outcome == "complete"
    assert len(outcome.trials) == 13
