"""Startup trials: how many, which points, and who survives."""

from collections import Counter

import numpy as np
import pytest

from copa_harness.optimize.search.space import Space
from copa_harness.optimize.search.study import MAX_STARTUP_TRIALS, MIN_STARTUP_TRIALS, balanced_points, n_startup_trials


@pytest.fixture
def space(toy):
    from copa_harness.optimize.search.candidate import Candidate
    from copa_harness.optimize.search.space import DemoSet, InstructionOption

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


@pytest.mark.parametrize(("n_options", "expected"), [(1, MIN_STARTUP_TRIALS), (13, 26), (1000, MAX_STARTUP_TRIALS)])
def test_the_startup_trials_are_sized_to_the_largest_dimension(n_options, expected):
    assert n_startup_trials(n_options) == expected


def test_starts_come_first_and_then_every_option_before_the_sampler_chooses(toy):
    from tests.optimize.search.test_study import searched

    outcome, _, _, _ = searched(
        toy, calls=10_000, max_trials=MIN_STARTUP_TRIALS, patience=None, stop_without_headroom=False
    )
    for name in outcome.trials[0].point:
        assert len({trial.point[name] for trial in outcome.trials}) > 2


def test_a_study_looks_at_many_and_scores_few_in_full(toy):
    from tests.optimize.search.test_study import searched

    outcome, validation, incumbent, scope = searched(toy, calls=400, max_trials=13)
    lengths = Counter(trial.n_scored for trial in outcome.trials)
    assert validation.mean(outcome.best) > validation.mean(incumbent)
    assert lengths[validation.n] < len(outcome.trials) / 2
    assert scope.charged_calls < 13 * validation.n / 2


def test_the_first_start_is_scored_before_anything_else_is_looked_at(toy):
    from tests.optimize.search.test_study import searched

    alone = searched(toy, calls=400, max_trials=2)[0]
    outcome = searched(toy, calls=400, max_trials=13)[0]
    assert outcome.trials[:2] == alone.trials
    assert outcome.trials[1].outcome == "complete"
    assert len(outcome.trials) == 13
