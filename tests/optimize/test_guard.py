"""The guard: weights that lose more than a margin at another task are not returned."""

import dspy
import pytest

from copa_harness import COPA, Task
from copa_harness.errors import ConfigurationError


def other_task(toy, *, sizes):
    """Rows that are all "small": what the base model says to everything."""
    rows = [
        dspy.Example(size=str(size + place / 1000), weight="1.0", kind="small").with_inputs("size", "weight")
        for place in range(3)
        for size in sizes
    ]
    n = len(sizes)
    splits = {"trainset": rows[:n], "valset": rows[n : 2 * n], "testset": rows[2 * n :]}
    return Task(name="other", program=toy.program(), metric=toy.metric, **splits)


def compiled(toy, **given):
    lm = toy.lm(provider=toy.provider)
    optimizer = COPA(metric=toy.metric, lm=lm, budget=200, adoption_p=1.0, **given)
    return optimizer.compile(toy.program(), trainset=toy.train, valset=toy.val), lm


def tuned(program):
    return any("@" in predictor.lm.model for predictor in program.predictors())


def test_weights_that_lose_more_than_the_margin_are_not_returned(toy):
    broken = other_task(toy, sizes=[1, 2, 7, 8])  # tuned weights call two of four big
    program, _ = compiled(toy, strategy="w", guard=broken, guard_margin=0.4)
    assert not tuned(program)
    assert any("more than 0.4 lost" in line for line in program.copa_result.headlines)
    assert any(
        "guard other: 1.000 -> 0.500 on 4 rows" in note and "more than 0.4 lost" in note
        for note in program.copa_result.notes
    )


def test_within_the_margin_they_are_and_the_record_says_what_was_lost(toy):
    broken = other_task(toy, sizes=[1, 2, 7, 8])
    program, _ = compiled(toy, strategy="w", guard=lambda: broken, guard_margin=0.5)
    assert tuned(program)
    assert any("guard other: 1.000 -> 0.500 on 4 rows (-0.500 [" in note for note in program.copa_result.notes)


@pytest.mark.parametrize("strategy", ["joint", "p -> w -> p"])
def test_no_search_returns_weights_that_the_guard_refuses(toy, strategy):
    program, _ = compiled(toy, strategy=strategy, guard=other_task(toy, sizes=[7, 8]))
    assert not tuned(program)
    assert program.copa_result.score_after > program.copa_result.score_before


def test_prompts_alone_ask_nothing(toy):
    with_guard, _ = compiled(toy, strategy="p", guard=other_task(toy, sizes=[7, 8]))
    without, _ = compiled(toy, strategy="p")
    assert with_guard.copa_result.charged_calls == without.copa_result.charged_calls
    assert not any("guard" in note for note in with_guard.copa_result.notes)


def test_weights_are_asked_once_and_their_calls_count(toy):
    small = other_task(toy, sizes=[1, 2, 3])
    with_guard, _ = compiled(toy, strategy="w", guard=small)
    without, _ = compiled(toy, strategy="w")
    weights = {phase.phase for phase in with_guard.copa_result.phases}
    assert weights
    asked = sum("guard other" in note for note in with_guard.copa_result.notes)
    assert asked >= 1
    assert with_guard.copa_result.charged_calls == without.copa_result.charged_calls + 3 * (1 + asked)


def test_weights_that_the_budget_cannot_ask_are_not_returned(toy):
    many = other_task(toy, sizes=[i / 100 for i in range(150)])
    program, _ = compiled(toy, strategy="w", guard=many)
    assert not tuned(program)
    assert any("do not pay for asking the guard other" in note for note in program.copa_result.notes)


@pytest.mark.parametrize("given", ["iris", 3])
def test_what_is_no_task_is_refused_at_once(toy, given):
    with pytest.raises(ConfigurationError, match="guard"):
        COPA(metric=toy.metric, lm=toy.lm(), guard=given)


def test_what_makes_no_task_is_refused(toy):
    with pytest.raises(ConfigurationError, match="a Task or a function"):
        compiled(toy, strategy="w", guard=lambda: 3)
