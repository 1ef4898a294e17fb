"""Shares of a budget."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from copa_harness.errors import BudgetExhausted
from copa_harness.lm.budget.scope import Scope
from copa_harness.lm.call_context import current_scope, in_context, open_scope
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize.step_budget import CallBudget, share_of, step_scope
from copa_harness.results import Budget, Phase


def test_a_share_is_counted_from_what_was_spent_already():
    with open_scope("run", budget=Budget(calls=100)) as scope:
        scope.charge("one")
        allowance = share_of(scope, 1, 3, reserved=9)
        assert allowance.remaining == 30
        assert allowance.can_afford(30)
        assert not allowance.can_afford(31)


def test_without_a_ceiling_a_share_has_none():
    assert share_of(Scope("run"), 1, 3).can_afford(10**9)


def test_an_allowance_never_exceeds_the_run():
    with open_scope("run", budget=Budget(calls=10)) as scope:
        assert CallBudget(scope, 50).remaining == 10


def ask(lm, i):
    return lm(f"q{i}")


def test_a_step_is_stopped_at_its_share_and_the_run_goes_on():
    lm = ScriptedLM(lambda messages: "yes")
    with open_scope("run", budget=Budget(calls=10)) as scope:
        with step_scope(CallBudget(scope, 3), name="step"):
            for i in range(3):
                ask(lm, i)
            ask(lm, 0)
            with pytest.raises(BudgetExhausted, match="share of the budget"):
                ask(lm, 3)
        assert scope.charged_calls == 3
        assert not scope.exhausted
        ask(lm, 3)
        assert current_scope() is scope
        assert scope.usage().paid_calls == 4


def test_many_threads_never_pass_a_steps_share():
    lm = ScriptedLM(lambda messages: "yes")
    with open_scope("run", budget=Budget(calls=1000)) as scope:
        with step_scope(CallBudget(scope, 17), name="step") as step:

            def one(i):
                with in_context(scope=step):
                    try:
                        ask(lm, i)
                    except BudgetExhausted:
                        return 1
                return 0

            with ThreadPoolExecutor(8) as pool:
                refused = sum(pool.map(one, range(60)))
        assert lm.calls == 17
        assert refused == 43
        assert scope.charged_calls == 17


def test_calls_of_a_step_are_stamped_in_the_run():
    lm = ScriptedLM(lambda messages: "yes")
    with open_scope("run", budget=Budget(calls=10)) as scope:
        with scope.phase(Phase.SEARCH), step_scope(CallBudget(scope, 5), name="step") as step:
            ask(lm, 0)
            assert step.current_phase is Phase.SEARCH
            assert step.remaining_calls == 4
        assert scope.phase_usages()["search"].paid_calls == 1


def test_a_thread_left_over_from_a_step_buys_nothing():
    lm = ScriptedLM(lambda messages: "yes")
    with open_scope("run", budget=Budget(calls=10)) as scope:
        with step_scope(CallBudget(scope, 5), name="step") as step:
            pass
        with in_context(scope=step), pytest.raises(BudgetExhausted, match="has ended"):
            ask(lm, 0)
