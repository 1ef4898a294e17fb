"""Checkpoints as choices of the weights."""

from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.space import checkpoint_choices, spread


def test_epochs_are_spread_evenly_and_never_more_than_there_are():
    assert spread([1, 2, 3], 1) == (2,)
    assert spread([1, 2, 3], 3) == (1, 2, 3)
    assert spread(list(range(1, 12)), 2) == (4, 8)
    assert spread([1, 2], 9) == (1, 2)
    assert spread([], 2) == spread([1, 2], 0) == ()


def test_models_without_checkpoints_offer_none(toy):
    candidate = Candidate.of(toy.program(), lm=toy.lm())
    assert checkpoint_choices(candidate, candidate.lms, n=2) == ()
    assert checkpoint_choices(candidate, (), n=2) == ()
