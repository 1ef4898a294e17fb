"""Hard limits: what is returned keeps them all, whatever they are, or nothing is returned."""

import json
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copa_harness import COPA
from copa_harness.documents import from_json, to_json
from copa_harness.errors import ConfigurationError
from copa_harness.lm.call_context import observing
from copa_harness.optimize.constraints import Constraints, parse_constraints
from copa_harness.optimize.options import LIMITS
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.scoring import AnswerCost
from copa_harness.results import OptimizationResult


def test_every_limit_has_a_name_that_is_checked_before_anything_is_loaded():
    assert tuple(entry.name for entry in fields(Constraints)) == LIMITS


def compiled(toy, *, lm=None, budget=150, **given):
    arguments = {"strategy": "p", "n_demo_sets": 6, **given}
    optimizer = COPA(metric=toy.metric, lm=lm or toy.lm(), budget=budget, **arguments)
    return optimizer.compile(toy.program(), trainset=toy.train, valset=toy.val)


def longest_prompt(toy, program, lm):
    with observing() as observer:
        for example in toy.val:
            program(**example.inputs())
    return max(call.input_tokens for call in observer.seen)


@given(
    limit=st.one_of(st.none(), st.integers(40, 400)),
    forbidden=st.sets(st.sampled_from(["size is", "one of", "3.4", "kind", "9"]), max_size=2),
    required=st.sets(st.sampled_from(["Be brief.", "Think twice."]), max_size=1),
    seed=st.integers(0, 3),
)
@settings(max_examples=12)
def test_no_returned_program_breaks_a_limit(toy_factory, limit, forbidden, required, seed):
    toy = toy_factory()
    lm = toy.lm()
    constraints = Constraints(limit, tuple(sorted(forbidden)), tuple(sorted(required)))
    try:
        program = compiled(toy, lm=lm, constraints=constraints, seed=seed, budget=100)
    except ConfigurationError:
        return  # nothing kept them, see below
    returned = Candidate.of(program, lm=lm)
    assert constraints.broken_by_text(returned) is None
    if limit is not None:
        assert longest_prompt(toy, program, lm) <= limit


def test_a_limit_on_prompt_tokens_takes_the_best_of_the_short_ones(toy):
    lm = toy.lm()
    free = compiled(toy, lm=lm, strategy="p")
    limit = longest_prompt(toy, free, lm) - 1
    short = compiled(toy, lm=lm, constraints={"max_prompt_tokens": limit})
    assert longest_prompt(toy, short, lm) <= limit
    assert short.copa_result.score_after <= free.copa_result.score_after


def test_required_texts_are_appended_and_forbidden_ones_avoided(toy):
    limits = {"required_text": "Be polite.", "forbidden_text": ["size is"]}
    program = compiled(toy, constraints=limits)
    instruction = program.signature.instructions
    assert instruction.startswith("Tell the kind from the sizes.")
    assert "Be polite." in instruction
    assert "size is" not in instruction  # which the rule, the best instruction there is, would say


def test_when_nothing_keeps_the_limits_nothing_is_returned(toy):
    with pytest.raises(ConfigurationError, match=r"no program keeps the constraints: .* more than 3; .* in full"):
        compiled(toy, constraints={"max_prompt_tokens": 3}, budget=60)


def test_a_program_the_budget_could_not_measure_is_not_returned_under_a_measured_limit(toy):
    with pytest.raises(ConfigurationError, match="could not be measured"):
        compiled(toy, constraints={"max_prompt_tokens": 4000}, budget=3)
    assert compiled(toy, constraints={"forbidden_text": "secret"}, budget=3).copa_result.stopped == "budget"


def test_what_is_unknown_keeps_no_limit():
    unknown = AnswerCost(n_answers=5, longest_prompt=None, prompt_tokens=None, usd=None)
    assert "are unknown" in Constraints(max_prompt_tokens=10).broken_by_cost(unknown)
    assert "are unknown" in Constraints(max_usd_per_answer=1.0).broken_by_cost(unknown)
    assert Constraints(max_usd_per_answer=1.0).broken_by_cost(AnswerCost()) is None
    assert "2 dollars per answer" in Constraints(max_usd_per_answer=1).broken_by_cost(AnswerCost(n_answers=2, usd=4.0))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_tokens": 3}, "expected some of max_prompt_tokens"),
        ({"max_prompt_tokens": 2.5}, "a whole number of at least 1"),
        ({"forbidden_text": [""]}, "none of them empty"),
        ({"max_usd_per_answer": -1}, "a number of at least 0"),
        ({"required_text": "no secrets", "forbidden_text": "secret"}, "no prompt keeps both"),
        (["max_prompt_tokens"], "expected a dictionary"),
    ],
)
def test_wrong_limits_are_refused_by_name(wrong, said):
    with pytest.raises(ConfigurationError, match=said):
        parse_constraints(wrong)


def test_the_cheapest_within_so_many_points_is_returned_with_the_front(toy):
    lm = toy.lm()
    best = compiled(toy, lm=lm, strategy="p")
    short = compiled(toy, lm=lm, prefer="shortest within 30 points of best")
    result = short.copa_result
    assert result.score_after >= best.copa_result.score_after - 0.3
    assert longest_prompt(toy, short, lm) <= longest_prompt(toy, best, lm)
    (returned,) = [entry for entry in result.front if entry.returned]
    assert returned.score == result.score_after
    scores = [entry.score for entry in result.front]
    assert scores == sorted(scores)
    again = from_json(OptimizationResult, json.loads(json.dumps(to_json(result))))
    assert again.front == result.front


def test_costs_are_the_same_when_the_answers_are_replayed(toy):
    lm = toy.lm()
    first = compiled(toy, lm=lm, prefer="fastest within 5 points of best").copa_result
    second = compiled(toy, lm=lm, prefer="fastest within 5 points of best").copa_result
    assert second.usage.paid_calls == 0
    assert second.front == first.front
    assert all(entry.seconds_per_answer > 0 for entry in first.front)
