"""Why a run ended, in words."""

import pytest

from copa_harness import COPA
from copa_harness.lm.call_context import open_scope
from copa_harness.optimize.run import Run
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.results import Budget
from tests.optimize.conftest import context_of


@pytest.mark.parametrize(
    ("strategy", "budget", "ending"),
    [
        ("p", 10, "0 of 10 calls used; the rest does not pay for scoring the program as written"),
        ("p", 40, "; the rest does not pay for another candidate in full"),
        ("joint", 120, "; the rest does not pay for another candidate in full"),
        ("labeled_fewshot", 31, "16 of 31 calls used; the rest does not pay for another candidate in full"),
    ],
)
def test_calls_that_a_spent_budget_has_left_are_explained(toy, strategy, budget, ending):
    optimizer = COPA(metric=toy.metric, strategy=strategy, budget=budget, lm=toy.lm(provider=toy.provider))
    result = optimizer.compile(toy.program(), trainset=toy.train, valset=toy.val).copa_result
    assert result.stopped == "budget"
    assert result.reason.startswith("the budget: ")
    assert result.reason.endswith(ending)


def test_a_budget_that_is_used_up_needs_no_more_words(toy):
    optimizer = COPA(metric=toy.metric, strategy="p", budget=16, lm=toy.lm())
    result = optimizer.compile(toy.program(), trainset=toy.train, valset=toy.val).copa_result
    assert result.reason == "the budget: 16 of 16 calls used"


@pytest.mark.parametrize(
    ("calls", "said"),
    [(16, "set aside for what comes after the search"), (15, "does not pay for another candidate in full")],
)
def test_more_than_a_candidate_costs_was_set_aside(toy, calls, said):
    with open_scope("test", budget=Budget(len(toy.val) + calls)) as scope:
        run = Run(context_of(toy, Candidate.of(toy.program(), lm=toy.lm())), scope=scope)
        assert run.baseline()
        run.stop("budget")
    assert said in run.reason
