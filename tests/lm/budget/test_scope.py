"""The scope: distinct requests counted exactly, refunds, phases, and its way into threads."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from copa_harness.errors import BudgetExhausted
from copa_harness.lm.budget.cost import Cost
from copa_harness.lm.budget.scope import Scope
from copa_harness.lm.call_context import current_scope, open_scope
from copa_harness.results import Budget, Phase, Usage

PAID = Usage(paid_calls=1, input_tokens=10, output_tokens=2)


def test_a_key_charged_once_is_free_afterwards():
    scope = Scope("t", budget=Budget(1))
    scope.charge("a").settle(Cost(), PAID)
    scope.replay("a", cost=Cost)
    assert scope.charged_calls == 1
    assert scope.usage().paid_calls == 1
    assert scope.usage().cached_calls == 1


def test_the_request_after_the_last_allowed_one_is_refused_with_a_message_that_helps():
    scope = Scope("iris", budget=Budget(2, "light"))
    for name in "ab":
        scope.charge(name).settle(Cost(), PAID)
    assert not scope.exhausted
    with pytest.raises(BudgetExhausted, match=r"budget 'light' of 'iris' is spent: 2 .* of 2 .* raise --copa-budget"):
        scope.charge("c")
    assert scope.exhausted
    assert scope.remaining_calls == 0


def test_a_refund_gives_the_place_back_and_counts_the_failure():
    scope = Scope("t", budget=Budget(1))
    scope.charge("a").refund()
    assert scope.charged_calls == 0
    assert scope.usage().failed_calls == 1
    scope.charge("b").settle(Cost(), PAID)


def test_buying_an_answer_again_because_it_was_lost_counts_again():
    scope = Scope("t", budget=Budget(2))
    scope.charge("a").settle(Cost(), PAID)
    scope.charge("a").settle(Cost(), PAID)
    assert scope.charged_calls == 2
    with pytest.raises(BudgetExhausted):
        scope.charge("a")


def test_no_ceiling_means_infinitely_many_remaining_calls():
    assert Scope("t").remaining_calls == math.inf


@pytest.mark.parametrize("n_threads", [2, 32])
def test_many_threads_never_pass_the_ceiling_and_use_all_of_it(n_threads):
    scope = Scope("t", budget=Budget(50))
    start = threading.Barrier(n_threads)

    def work(thread: int) -> int:
        start.wait()
        n_bought = 0
        for index in range(40):
            try:
                charge = scope.charge(f"{thread}-{index}")
            except BudgetExhausted:
                continue
            assert scope.charged_calls <= 50
            if index % 7 == 3:
                charge.refund()
            else:
                charge.settle(Cost(), PAID)
                n_bought += 1
        return n_bought

    with ThreadPoolExecutor(n_threads) as pool:
        n_bought = sum(pool.map(work, range(n_threads)))
    assert n_bought == scope.charged_calls == scope.usage().paid_calls
    assert n_bought == min(50, n_threads * 34)


class Ledger(RuleBasedStateMachine):
    """Any interleaving of charges, settlements and refunds keeps the count of distinct keys and the ceiling."""

    def __init__(self):
        super().__init__()
        self.scope = Scope("model", budget=Budget(4))
        self.open = []
        self.settled = set()
        self.n_again = 0
        self.n_paid = 0

    @rule(key=st.sampled_from("abcdefg"), paying=st.booleans())
    def charge(self, key, paying):
        before = self.scope.charged_calls
        again = paying and key in self.settled
        free = not again and (key in self.settled or any(one.key == key and not one.again for one in self.open))
        if free or before < 4:
            self.open.append(self.scope.charge(key, paying=paying))
            assert self.scope.charged_calls == before + (not free)
        else:
            with pytest.raises(BudgetExhausted):
                self.scope.charge(key, paying=paying)
            assert self.scope.charged_calls == before

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def settle(self, data):
        charge = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        charge.settle(Cost(), PAID)
        self.n_paid += 1
        self.n_again += charge.again
        self.settled.add(charge.key)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def refund(self, data):
        self.open.pop(data.draw(st.integers(0, len(self.open) - 1))).refund()

    @invariant()
    def counts_distinct_keys_below_the_ceiling(self):
        keys = self.settled | {one.key for one in self.open if not one.again}
        again = self.n_again + sum(one.again for one in self.open)
        assert self.scope.charged_calls == len(keys) + again <= 4
        assert self.scope.usage().paid_calls == self.n_paid


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_calls_of_any_thread_are_stamped_with_the_phase_of_the_scope():
    scope = Scope("t")
    with scope.phase(Phase.DEMOS), ThreadPoolExecutor(2) as pool:
        pool.submit(lambda: scope.charge("a").settle(Cost(), PAID)).result()
        with scope.phase(Phase.WEIGHTS):
            scope.charge("b").settle(Cost(), PAID)
        scope.charge("c").settle(Cost(), PAID)
    usages = scope.phase_usages()
    assert {name: usage.paid_calls for name, usage in usages.items()} == {"demos": 2, "weights": 1}
    assert list(usages) == ["demos", "weights"]


def test_a_call_that_ends_after_its_phase_is_billed_to_the_phase_it_began_in():
    scope = Scope("t")
    with scope.phase(Phase.DEMOS):
        charge = scope.charge("a")
    with scope.phase(Phase.EVALUATE):
        charge.settle(Cost(), PAID)
    assert scope.phase_usages()["demos"].paid_calls == 1


def test_nested_phases_count_no_second_twice(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("copa_harness.lm.budget.scope.time.monotonic", lambda: float(next(clock)))
    scope = Scope("t")
    with scope.phase(Phase.SEARCH), scope.phase(Phase.WEIGHTS):
        scope.add_train_steps(12, 99.0)
    usages = scope.phase_usages()
    assert (usages["search"].wall_s, usages["weights"].wall_s) == (2.0, 1.0)
    assert usages["weights"].train_steps == 12


def test_training_outside_a_phase_brings_its_own_seconds():
    scope = Scope("t")
    scope.add_train_steps(3, 1.5)
    assert scope.usage() == Usage(train_steps=3, wall_s=1.5)


def test_the_innermost_open_scope_is_the_current_one_also_in_raw_threads():
    with open_scope("outer"), open_scope("inner") as inner, ThreadPoolExecutor(1) as pool:
        assert current_scope() is inner
        assert pool.submit(current_scope).result() is inner


def test_dspy_worker_threads_keep_the_scope_they_were_started_in():
    with open_scope("first") as first:
        executor = dspy.Parallel(num_threads=2, disable_progress_bar=True)
        assert executor([(lambda x: current_scope(), {"x": 1}), (lambda x: current_scope(), {"x": 2})]) == [first] * 2


def test_outside_every_scope_calls_are_unlimited():
    assert current_scope().remaining_calls == math.inf


def test_after_its_end_a_scope_sells_nothing_to_leftover_threads_but_replays_what_it_has():
    with open_scope("t") as scope:
        scope.charge("a").settle(Cost(), PAID)
    scope.replay("a", cost=Cost)
    with pytest.raises(BudgetExhausted, match="'t' has ended"):
        scope.charge("b")
    assert not scope.exhausted


def test_scopes_may_be_closed_in_another_order_than_opened():
    first, second = open_scope("first"), open_scope("second")
    outer = first.__enter__()
    inner = second.__enter__()
    with ThreadPoolExecutor(1) as pool:
        second.__exit__(None, None, None)
        assert pool.submit(current_scope).result() is outer
    first.__exit__(None, None, None)
    assert inner is not current_scope() is not outer


@given(st.integers(0, 30), st.lists(st.integers(0, 20), max_size=60))
def test_a_replay_of_the_same_requests_is_refused_at_the_same_one(ceiling, asked):
    def run(usage):
        scope = Scope("t", budget=Budget(ceiling))
        for index, key in enumerate(asked):
            try:
                scope.charge(str(key), paying=False).settle(Cost(), usage)
            except BudgetExhausted:
                return index
        return None

    assert run(PAID) == run(Usage(cached_calls=1))


WORST = Cost(calls=1, input_tokens=20, output_tokens=9)


def charged(scope, key="a"):
    return scope.charge(key, worst=WORST)


def test_a_charge_left_by_an_exception_gives_everything_back_and_counts_the_failure():
    scope = Scope("t", budget=Budget(1, tokens=100))
    with pytest.raises(ValueError, match="no answer"), charged(scope):
        raise ValueError("no answer")
    assert (scope.charged_calls, scope.usage().failed_calls, scope._account.spent) == (0, 1, Cost())
    with charged(scope) as charge:
        charge.settle(Cost(1, 10, 2), PAID)
    assert scope._account.totals() == {"spent": Cost(1, 10, 2), "reserved": Cost()}


def test_a_charge_interrupted_in_the_middle_leaves_the_worst_case_spent():
    scope = Scope("t", budget=Budget(1, tokens=100))
    with pytest.raises(KeyboardInterrupt), charged(scope):
        raise KeyboardInterrupt
    assert (scope.charged_calls, scope.usage().failed_calls, scope._account.spent) == (0, 0, WORST)


def test_a_charge_that_may_have_been_billed_is_booked_at_its_worst():
    scope = Scope("t", budget=Budget(5, tokens=100))
    with charged(scope) as charge:
        charge.lose()
    usage = scope.usage()
    assert (usage.paid_calls, usage.failed_calls, usage.estimated_calls) == (1, 1, 1)
    assert (scope.charged_calls, scope._account.spent) == (1, WORST)


def test_a_step_shares_the_books_of_its_run_and_stops_alone():
    scope = Scope("run", budget=Budget(10, tokens=1000))
    outer = scope.step(6, name="outer")
    inner = outer.step(3, name="inner")
    with scope.phase(Phase.SEARCH):
        for key in "abc":
            charged(inner, key).settle(Cost(1, 5, 1), PAID)
        with pytest.raises(BudgetExhausted, match=r"step 'run \[outer\] \[inner\]' used its share of the budget \(3 "):
            charged(inner, "d")
        charged(outer, "d").settle(Cost(1, 5, 1), PAID)
    assert (inner.exhausted, outer.exhausted, scope.exhausted) == (True, False, False)
    assert (inner.remaining_calls, outer.remaining_calls, scope.remaining_calls) == (0, 2, 6)
    assert inner.usage() == outer.usage() == scope.usage()
    assert inner.phase_usages()["search"].paid_calls == 4
    assert scope._account.spent == Cost(4, 20, 4)


def test_a_failure_inside_a_step_is_counted_once_in_its_run():
    scope = Scope("run")
    scope.step(3, name="step").note_failure("timeout", "a traceback")
    assert scope.failures == {"timeout": 1}


def test_a_step_is_refused_what_its_run_cannot_pay():
    scope = Scope("run", budget=Budget(usd=1e-6, name="small"))
    step = scope.step(3, name="step")
    with pytest.raises(BudgetExhausted, match=r"budget 'small' of 'run' is spent: \$0 of"):
        step.charge("a", worst=Cost(1, 1, 1, Cost.picodollars_of(1.0)))
    assert (step.exhausted, scope.exhausted, scope.charged_calls) == (False, True, 0)
