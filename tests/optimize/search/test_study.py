"""Scoring block by block, and the study over it."""

import math

import pytest

from copa_harness.errors import ConfigurationError, ContextOverflowError, ProviderError
from copa_harness.evaluate.runner import run_examples
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize.options import SearchOptions
from copa_harness.optimize.propose.proposer import propose_demos
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.samplers import SAMPLERS, build_sampler
from copa_harness.optimize.search.scoring import Validation
from copa_harness.optimize.search.space import Space
from copa_harness.optimize.search.study import search
from copa_harness.optimize.search.trial_memory import SearchMemory
from copa_harness.optimize.step_budget import CallBudget, OutOfCalls
from copa_harness.results import Budget, Phase
from tests.optimize.conftest import context_of


@pytest.fixture
def validation(toy):
    return Validation(toy.val, metric=toy.metric, threads=4, seed=0)


def unlimited(scope):
    return CallBudget(scope, math.inf)


def test_blocks_are_scored_in_one_fixed_order_and_remembered(toy, validation):
    candidate = Candidate.of(toy.program(), lm=toy.lm())
    with open_scope("test") as scope:
        first = validation.advance(candidate, allowance=unlimited(scope), phase=Phase.SEARCH)
        assert validation.n_seen(candidate) == validation.block_size == 5
        assert None not in first[:5]
        assert set(first[5:]) == {None}
        mean = validation.complete(candidate, allowance=unlimited(scope), phase=Phase.SEARCH)
        assert validation.scores(candidate)[:5] == first[:5]
        calls = scope.charged_calls
        assert calls == len(toy.val)
        assert validation.complete(candidate, allowance=unlimited(scope), phase=Phase.SEARCH) == mean
        assert scope.charged_calls == calls
    again = Validation(toy.val, metric=toy.metric, threads=1, seed=0)
    assert again.ids == validation.ids
    assert Validation(toy.val, metric=toy.metric, threads=1, seed=1).ids != validation.ids


def test_what_is_scored_without_a_race_goes_out_in_one_piece(toy, validation, monkeypatch):
    sizes = []

    def noted(program, examples, **settings):
        sizes.append(len(examples))
        return run_examples(program, examples, **settings)

    monkeypatch.setattr("copa_harness.optimize.search.scoring.run_examples", noted)
    candidate = Candidate.of(toy.program(), lm=toy.lm())
    with open_scope("test") as scope:
        validation.advance(candidate, allowance=unlimited(scope), phase=Phase.SEARCH)
        validation.complete(candidate, allowance=unlimited(scope), phase=Phase.SEARCH)
    assert sizes == [5, len(toy.val) - 5]


def test_a_block_that_does_not_fit_is_not_begun(toy, validation):
    lm = toy.lm()
    candidate = Candidate.of(toy.program(), lm=lm)
    with open_scope("test", budget=Budget(calls=4)) as scope, pytest.raises(OutOfCalls):
        validation.advance(candidate, allowance=unlimited(scope), phase=Phase.SEARCH)
    assert lm.calls == 0
    assert not scope.exhausted


def test_a_provider_that_is_down_ends_the_search_with_its_error(toy, validation):
    lm = ScriptedLM(lambda messages: ProviderError("the cable is out"))
    base = Candidate.of(toy.program(), lm=lm)
    with open_scope("test") as scope, pytest.raises(ProviderError, match="the cable is out"):
        validation.advance(base, allowance=unlimited(scope), phase=Phase.SEARCH)


def test_a_provider_that_goes_down_later_ends_the_search_with_its_error(toy, validation):
    def answers(messages):
        down = "Try" in messages[0]["content"]
        return ProviderError("the cable is out") if down else {"kind": "small"}

    base = Candidate.of(toy.program(), lm=ScriptedLM(answers))
    with open_scope("test") as scope:
        validation.complete(base, allowance=unlimited(scope), phase=Phase.BASELINE)
        ways = [base.with_instructions({"self": f"Try {i}."}) for i in range(3)]
        for candidate in ways[:2]:
            validation.advance(candidate, allowance=unlimited(scope), phase=Phase.SEARCH)
        with pytest.raises(ProviderError, match="3 candidates in a row"):
            validation.advance(ways[2], allowance=unlimited(scope), phase=Phase.SEARCH)


def test_equal_scores_prefer_the_simpler_candidate(toy, validation):
    plain = Candidate.of(toy.program(), lm=toy.lm())
    wordy = plain.with_instructions({"self": "Tell the kind from the sizes, and please do it well."})
    with open_scope("test") as scope:
        for candidate in (plain, wordy):
            validation.complete(candidate, allowance=unlimited(scope), phase=Phase.SEARCH)
    assert validation.mean(plain) == validation.mean(wordy)
    assert validation.is_better(plain, wordy)
    assert not validation.is_better(wordy, plain)


def searched(toy, *, calls=200, sampler="tpe", lm=None, seed=0, **settings):
    validation = Validation(toy.val, metric=toy.metric, threads=4, seed=0)
    incumbent = Candidate.of(toy.program(), lm=lm or toy.lm())
    with open_scope("test", budget=Budget(calls=calls)) as scope:
        allowance = unlimited(scope)
        validation.complete(incumbent, allowance=allowance, phase=Phase.BASELINE)
        context = context_of(toy, incumbent, n_demo_sets=12)
        demos = propose_demos(context, incumbent, allowance=allowance, memory=SearchMemory(), seed=(0,))
        space = Space.around(incumbent, demos=demos)
        outcome = search(
            space,
            validation=validation,
            allowance=allowance,
            settings=SearchOptions(sampler=sampler, seed=seed, **settings),
            phase=Phase.DEMOS,
        )
        return outcome, validation, incumbent, scope


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "gp"])
def test_a_search_finds_something_better_within_its_calls(toy, sampler):
    outcome, validation, incumbent, scope = searched(toy, sampler=sampler)
    assert validation.mean(outcome.best) > validation.mean(incumbent) + 0.2
    assert scope.charged_calls <= 200
    assert not scope.exhausted


def test_the_best_is_a_fully_scored_candidate_no_worse_than_any_other(toy):
    outcome, validation, _, _ = searched(toy)
    assert validation.is_complete(outcome.best)
    complete = [trial.score for trial in outcome.trials if trial.outcome == "complete"]
    assert validation.mean(outcome.best) == max(complete)


def test_dropped_trials_cost_less_than_a_full_pass(toy):
    outcome, validation, _, _ = searched(toy, calls=400)
    dropped = [trial for trial in outcome.trials if trial.outcome == "dropped"]
    assert dropped
    assert all(trial.n_scored < validation.n for trial in dropped)


def test_two_searches_with_one_seed_are_the_same(toy):
    first, second = searched(toy)[0], searched(toy)[0]
    assert first.trials == second.trials
    assert first.best.key == second.best.key


def test_a_search_ends_before_the_budget_and_says_so(toy):
    outcome, _, _, scope = searched(toy, calls=50)
    assert outcome.stopped == "budget"
    assert scope.charged_calls <= 50
    assert not scope.exhausted


def test_a_search_ends_when_everything_was_tried(toy):
    toy.metric = lambda example, prediction, trace=None: 0.5
    outcome, _, _, _ = searched(toy, calls=10_000, patience=None, stop_without_headroom=False)
    assert outcome.stopped == "search space exhausted"
    assert len({tuple(trial.point.items()) for trial in outcome.trials}) == 13


def test_a_search_ends_without_improvement_for_a_while(toy):
    toy.metric = lambda example, prediction, trace=None: 0.5
    outcome, _, incumbent, _ = searched(toy, calls=10_000, patience=4)
    assert outcome.stopped == "no improvement"
    assert outcome.best.key == incumbent.key


def test_a_perfect_score_ends_a_search(toy):
    toy.metric = lambda example, prediction, trace=None: 1.0
    outcome, _, _, scope = searched(toy)
    assert outcome.stopped == "perfect score"
    assert scope.charged_calls == len(toy.val)


def test_prompts_too_long_for_the_model_are_left_behind(toy):
    good = toy.lm()

    def answers(messages, model):
        if len(messages) > 2 and len(messages) < 20:
            return ContextOverflowError("too long for me")
        return good.engine._answers(messages, model)

    outcome, validation, incumbent, _ = searched(toy, calls=400, lm=ScriptedLM(answers))
    assert any(trial.outcome == "failed" for trial in outcome.trials)
    assert validation.mean(outcome.best) >= validation.mean(incumbent)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_are_optunas_own(name):
    assert type(build_sampler(name, seed=0)).__module__.startswith("optuna.samplers")


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ConfigurationError, match="tpe"):
        build_sampler("annealing", seed=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_the_same_trials_again(toy, sampler):
    settings = {"max_trials": 12, "calls": 400, "sampler": sampler}
    first, second = searched(toy, **settings)[0], searched(toy, **settings)[0]
    assert first.trials == second.trials
    assert len(first.trials) == 12
