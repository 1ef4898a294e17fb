"""Ensembles: of a run's best programs, by majority or mean, never worse than the best of them."""

import dspy
import pytest

from copa_harness import COPA
from copa_harness.errors import ConfigurationError
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.steps import ensemble_of, majority, mean
from copa_harness.strategy import StepKind, parse_strategy


def optimized(toy, strategy="p -> ensemble", **given):
    lm = toy.lm()
    optimizer = COPA(metric=toy.metric, strategy=strategy, budget=150, lm=lm, n_demo_sets=5, **given)
    return optimizer.compile(toy.program(), trainset=toy.train, valset=toy.val), lm


def test_the_commonest_answer_wins_and_the_better_member_when_there_is_none():
    says = [dspy.Prediction(kind=kind) for kind in ("big", "small", " SMALL ", "Big")]
    assert majority(says[:3]).kind == "small"
    assert majority(says).kind == "big"


def test_numbers_are_averaged_and_words_are_the_first_members():
    found = mean([dspy.Prediction(price="10", why="a", n=1), dspy.Prediction(price="20", why="b", n=2)])
    assert (found.price, found.why, found.n) == ("15", "a", 1.5)


def test_the_best_programs_of_a_run_are_asked_together_at_no_call_on_validation(toy):
    program, _ = optimized(toy)
    result = program.copa_result
    ensemble = next(phase for phase in result.phases if phase.phase == "2: ensemble")
    assert ensemble.usage.paid_calls == 0
    assert ensemble.score_after >= ensemble.score_before
    note = next(note for note in result.notes if note.startswith("ensemble of 3 by majority"))
    if " adopted (" in note and "not adopted" not in note:
        assert len(program.programs) == 3
        assert program(size="1.0", weight="1.0").kind in ("big", "small")


def test_an_ensemble_is_a_last_step():
    assert [step.kind for step in parse_strategy("p -> ensemble")] == [StepKind.PROMPTS, StepKind.ENSEMBLE]
    for wrong in ("ensemble", "ensemble -> p", "p -> ensemble -> w"):
        with pytest.raises(ConfigurationError, match="'ensemble' is a last step"):
            parse_strategy(wrong)


@pytest.mark.parametrize("wrong", [{"size": 1}, {"reduce": "max"}, {"members": 3}])
def test_wrong_arguments_are_refused(toy, wrong):
    with pytest.raises(ConfigurationError, match="ensemble"):
        optimized(toy, optimizer_kwargs={"ensemble": wrong})


def test_programs_asked_together_count_as_other_prompts(toy):
    plain = Candidate.of(toy.program(), lm=toy.lm())
    together = ensemble_of([plain, plain.with_instructions({"self": "Be brief."})])
    assert together.changes(plain) == (False, True)
