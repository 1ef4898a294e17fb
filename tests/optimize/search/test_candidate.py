"""Candidates and the space they come from."""

import dspy
import numpy as np
import pytest

from copa_harness.errors import ConfigurationError, TaskError
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.space import DemoSet, InstructionOption, Space, WeightsChoice

DEMO = dspy.Example(size="1", weight="2", kind="small").with_inputs("size", "weight")


@pytest.fixture
def candidate(toy):
    return Candidate.of(toy.program(), lm=toy.lm())


def test_applying_settings_leaves_the_template_alone(candidate):
    changed = candidate.with_instructions({"self": "New."}).with_demos({"self": (DEMO,)})
    program = changed.program()
    assert program.signature.instructions == "New."
    assert program.demos == [DEMO]
    assert candidate.template.signature.instructions == "Tell the kind from the sizes."
    assert candidate.template.demos == []
    assert candidate.template.lm is None


def test_equal_settings_have_equal_keys_and_different_ones_do_not(candidate, toy):
    again = Candidate.of(toy.program(), lm=candidate.lms[0])
    assert candidate.key == again.key
    others = [
        candidate.with_instructions({"self": "New."}),
        candidate.with_demos({"self": (DEMO,)}),
        candidate.with_lms((candidate.lms[0].copy(model="scripted/model@tuned"),)),
    ]
    assert len({candidate.key, *(other.key for other in others)}) == 4


def test_demonstrations_and_words_make_a_candidate_larger(candidate):
    assert candidate.with_demos({"self": (DEMO,)}).size > candidate.size
    assert candidate.with_instructions({"self": "Tell the kind from the sizes. More."}).size > candidate.size


def test_a_program_without_predictors_is_refused():
    class Empty(dspy.Module):
        def forward(self):
            return None

    with pytest.raises(TaskError, match="without predictors"):
        Candidate.of(Empty(), lm=None)


def test_a_predictor_without_a_model_is_refused(toy):
    with pytest.raises(ConfigurationError, match="no language model"):
        Candidate.of(toy.program(), lm=None)


@pytest.fixture
def space(candidate):
    tuned = candidate.lms[0].copy(model="scripted/model@tuned")
    return Space.around(
        candidate,
        weights=[WeightsChoice("scripted/model@tuned", (tuned,))],
        instructions={"self": [InstructionOption("a", "A."), InstructionOption("again", "A.")]},
        demos={"self": [DemoSet("one", (DEMO,))]},
    )


def test_the_space_contains_the_incumbent_and_no_option_twice(space):
    assert space.dimensions == {
        "weights": ("scripted/model", "scripted/model@tuned"),
        "self.instruction": ("incumbent", "a"),
        "self.demos": ("none", "one"),
    }
    assert space.size == 8
    assert space.candidate({}).key == space.incumbent.key


def test_a_point_names_a_candidate(space):
    candidate = space.candidate({"weights": "scripted/model@tuned", "self.demos": "one", "self.instruction": "a"})
    assert candidate.model == "scripted/model@tuned"
    assert candidate.n_demos == 1
    assert candidate.parts[0].instruction == "A."


def test_unseen_points_run_out_exactly_when_all_were_seen(space):
    seen = set()
    generator = np.random.default_rng(0)
    for _ in range(space.size):
        point = space.unseen(seen, generator)
        assert space.signature(point) not in seen
        seen.add(space.signature(point))
    assert space.unseen(seen, generator) is None
