"""What a DSPy optimizer returns keeps the limits too: it is repaired, replaced by its next best, or refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copa_harness.errors import ConfigurationError
from copa_harness.lm.call_context import observing
from copa_harness.optimize import COPA
from copa_harness.optimize.constraints import Constraints
from copa_harness.optimize.search.candidate import Candidate


def compiled(toy, strategy, *, lm=None, budget=120, **given):
    optimizer = COPA(metric=toy.metric, strategy=strategy, budget=budget, lm=lm or toy.lm(), **given)
    return optimizer.compile(toy.program(), trainset=toy.train[:12], valset=toy.val[:8])


def longest_prompt(toy, program):
    with observing() as observer:
        for example in toy.val[:8]:
            program(**example.inputs())
    return max(call.input_tokens for call in observer.seen)


@given(
    strategy=st.sampled_from(
        [
            "labeled_fewshot",
            "bootstrap_fewshot",
            "bootstrap_fewshot_random_search",
            "knn_fewshot",
            "miprov2",
            "copro",
            "p -> ensemble",
            "labeled_fewshot -> ensemble",
            "joint",
            "p -> w",
            "demos -> instructions",
            "none",
        ]
    ),
    limit=st.one_of(st.none(), st.integers(60, 300)),
    forbidden=st.sets(st.sampled_from(["big", "9.", "one of", "7"]), max_size=2),
    required=st.sets(st.sampled_from(["Be brief."]), max_size=1),
)
@settings(max_examples=10)
def test_no_strategy_returns_a_program_that_breaks_a_limit(toy_factory, strategy, limit, forbidden, required):
    toy = toy_factory()
    lm = toy.lm(provider=toy.provider)
    constraints = Constraints(limit, tuple(sorted(forbidden)), tuple(sorted(required)))
    try:
        program = compiled(toy, strategy, lm=lm, constraints=constraints, n_demo_sets=4)
    except ConfigurationError as error:
        if "keep" in str(error) or "at least 2" in str(error):  # nothing kept them, or nothing to vote
            return
        raise
    assert constraints.broken_by_text(Candidate.of(program, lm=lm)) is None
    if limit is not None:
        assert longest_prompt(toy, program) <= limit
    neighbours = getattr(program, "_copa_neighbours", None)  # demonstrations that are chosen in use
    for example in toy.val[:8] if neighbours else ():
        demos = neighbours.demos("self", program.signature, dict(example.inputs()))
        assert all(constraints.allows(demo) for demo in demos)


def test_required_texts_are_put_into_what_an_optimizer_wrote(stages):
    program = stages.compiled("miprov2", constraints={"required_text": "Be brief."})
    assert all("Be brief." in predictor.signature.instructions for predictor in program.predictors())
    assert program.copa_result.score_after > program.copa_result.score_before


def test_demonstrations_with_forbidden_texts_are_left_out_of_a_result(stages):
    # The first stage says "little" to half of the rows; what it said is bootstrapped.
    program = stages.compiled("bootstrap_fewshot", constraints={"forbidden_text": "little"})
    assert program.copa_result.score_after > program.copa_result.score_before
    assert "little" not in str([predictor.demos for predictor in program.predictors()])


def test_the_next_best_program_of_an_optimizer_takes_the_place_of_one_that_breaks_a_limit(toy):
    free = compiled(toy, "bootstrap_fewshot_random_search", budget=160)
    limit = longest_prompt(toy, free) - 1
    program = compiled(toy, "bootstrap_fewshot_random_search", budget=160, constraints={"max_prompt_tokens": limit})
    assert longest_prompt(toy, program) <= limit
    (note,) = [note for note in program.copa_result.notes if "liked better" in note]
    assert f"more than {limit}" in note


def test_an_optimizer_all_of_whose_programs_break_a_limit_is_refused_and_that_is_said(toy):
    program = compiled(toy, "labeled_fewshot", constraints={"max_prompt_tokens": 120})
    assert program.demos == []
    assert program.copa_result.notes[-1].startswith("labeled_fewshot: result not adopted, nor any other program")


def test_a_program_that_breaks_a_limit_itself_is_named_and_not_returned(toy):
    limits = {"constraints": {"forbidden_text": "from the sizes"}}  # what its own instruction says
    with pytest.raises(ConfigurationError, match=r"no program keeps the constraints.*from the sizes"):
        compiled(toy, "labeled_fewshot", **limits)
    with pytest.raises(ConfigurationError, match="no program keeps the constraints"):
        compiled(toy, "none", **limits)


def test_the_program_as_written_is_measured_when_a_limit_asks_for_it(toy):
    assert compiled(toy, "none", constraints={"max_prompt_tokens": 500}).copa_result.score_after is not None
    with pytest.raises(ConfigurationError, match="more than 20"):
        compiled(toy, "none", constraints={"max_prompt_tokens": 20})


def test_required_texts_are_kept_also_when_the_budget_pays_for_nothing(toy):
    program = compiled(toy, "p", budget=2, constraints={"required_text": "Be brief."})
    assert "Be brief." in program.signature.instructions


def test_tuned_weights_under_long_prompts_give_way_to_tuned_weights_under_short_ones(toy):
    lm = toy.lm(provider=toy.provider)
    program = compiled(toy, "labeled_fewshot -> w", lm=lm, constraints={"max_prompt_tokens": 120}, adoption_p=1.0)
    assert longest_prompt(toy, program) <= 120
    assert "@" in program.lm.model


def test_neighbours_with_forbidden_texts_are_not_shown(stages):
    program = stages.compiled("knn_fewshot", constraints={"forbidden_text": "little"})
    neighbours = program._copa_neighbours
    demos = neighbours.demos("tell", program.tell.signature, {"size": "2.2", "weight": "3.3"})
    assert "little" not in str(demos)
    assert any("little" in str(trace) for trace in neighbours.traces.values())
