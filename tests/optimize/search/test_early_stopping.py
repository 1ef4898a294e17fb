"""Early stopping: when a study may stop after its startup trials."""

from copa_harness.optimize.search.study import (
    MIN_CANDIDATES,
    MIN_LOOKS,
    gained_examples,
    has_headroom,
    informative_looks,
)
from tests.optimize.search.test_study import searched


def test_an_example_that_one_candidate_wins_is_head_room():
    incumbent = [1.0, 0.0, 0.0, None]
    others = [[1.0, 0.0]] * MIN_LOOKS
    assert not has_headroom(incumbent, others)
    assert has_headroom(incumbent, [*others, [0.0, 1.0]])
    assert gained_examples(incumbent, [*others, [0.0, 1.0, 1.0, 1.0]]) == 2


def test_candidates_that_only_saw_what_the_incumbent_gets_right_prove_nothing():
    incumbent = [1.0] * 7 + [0.0] * 5
    easy, full = [1.0] * 7, [1.0] * 7 + [0.0] * 5
    assert informative_looks(incumbent, [easy] * 10 + [full] * 3) == 15
    assert has_headroom(incumbent, [easy] * 10 + [full] * 3)
    assert not has_headroom(incumbent, [full] * 12)


def test_few_candidates_prove_nothing():
    assert has_headroom([0.0], [[0.0]] * (MIN_CANDIDATES - 1) + [[]])


def test_a_study_without_head_room_stops_at_part_of_the_calls(toy):
    toy.metric = lambda example, prediction, trace=None: float(example.kind == "big")  # whatever is answered
    outcome, _, incumbent, scope = searched(toy, calls=400, patience=None)
    assert outcome.stopped == "no head-room"
    assert outcome.best.key == incumbent.key
    assert scope.charged_calls < 400 / 4
    on = searched(toy, calls=400, patience=None, stop_without_headroom=False)[0]
    assert on.stopped == "search space exhausted"
