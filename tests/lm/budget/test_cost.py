"""Accounts: spent plus reserved never passes a ceiling, in whatever order is reserved, settled and released."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from copa_harness.lm.budget.cost import PICO, Account, Ceilings, Cost, OverBudget
from copa_harness.lm.budget.ledger import RunLedger
from copa_harness.results import Budget

CEILINGS = {"calls": 6, "tokens": 100, "input_tokens": 80, "output_tokens": 60, "usd": 3.0}

COSTS = st.builds(
    Cost,
    calls=st.just(1),
    input_tokens=st.integers(0, 40),
    output_tokens=st.integers(0, 40),
    picodollars=st.integers(0, PICO),
)


class AccountMachine(RuleBasedStateMachine):
    """Never reserves what would have to wait: one thread cannot wait for itself."""

    def __init__(self):
        super().__init__()
        self.account = self.make()
        self.open = []
        self.spent = Cost()

    def make(self):
        return Account(Ceilings.of(Budget(**CEILINGS), calls=True))

    @property
    def reserved(self):
        return sum((cost for _, cost in self.open), Cost())

    def fits(self, total, asked):
        try:
            self.account.ceilings.check(total, spent=total, asked=asked)
        except OverBudget:
            return False
        return True

    @rule(cost=COSTS)
    def reserve(self, cost):
        if not self.fits(self.spent + cost, cost):
            with pytest.raises(OverBudget):
                self.account.reserve(cost)
        elif self.fits(self.spent + self.reserved + cost, cost):
            self.open.append((self.account.reserve(cost), cost))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def settle_for_less(self, data):
        number, held = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        actual = Cost(
            1,
            data.draw(st.integers(0, held.input_tokens)),
            data.draw(st.integers(0, held.output_tokens)),
            data.draw(st.integers(0, held.picodollars)),
        )
        self.account.settle(number, actual)
        self.spent += actual

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def release(self, data):
        number, _ = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.account.release(number)

    @invariant()
    def the_sum_is_under_every_ceiling(self):
        total = self.spent + self.reserved
        assert total.calls <= 6
        assert total.input_tokens + total.output_tokens <= 100
        assert total.input_tokens <= 80
        assert total.output_tokens <= 60
        assert total.picodollars <= 3 * PICO

    @invariant()
    def the_account_knows_what_was_spent(self):
        assert self.account.spent == self.spent


TestAccount = AccountMachine.TestCase
TestAccount.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


class LedgerMachine(AccountMachine):
    """The same for the ledger on disk, with a second process' view of it taking turns."""

    def make(self):
        import tempfile
        from pathlib import Path

        self.folder = tempfile.TemporaryDirectory()
        first, second = (RunLedger(Path(self.folder.name), "run", budget=Budget(**CEILINGS)) for _ in range(2))
        self.both = [first, second]
        return first

    @rule()
    def the_other_takes_over(self):
        self.both.reverse()
        self.account = self.both[0]

    def teardown(self):
        for ledger in self.both:
            ledger.close()
        self.folder.cleanup()


TestRunLedger = LedgerMachine.TestCase
TestRunLedger.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


@pytest.fixture
def account():
    return Account(Ceilings.of(Budget(tokens=100), calls=False))


def test_a_cost_that_only_calls_in_flight_keep_out_waits_for_them(account):
    first = account.reserve(Cost(output_tokens=80))
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(account.reserve, Cost(output_tokens=50))
        time.sleep(0.05)
        assert not second.done()
        account.settle(first, Cost(output_tokens=10))
        account.release(second.result(5))
    assert account.spent.output_tokens == 10


def test_a_cost_that_can_never_fit_is_refused_at_once_even_while_others_are_in_flight(account):
    account.reserve(Cost(output_tokens=80))
    with pytest.raises(OverBudget, match="0 of 100 tokens spent, the next call may cost up to 101"):
        account.reserve(Cost(output_tokens=101))


def test_those_who_wait_in_vain_are_refused_when_the_calls_in_flight_turn_out_dear(account):
    first = account.reserve(Cost(output_tokens=80))
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(account.reserve, Cost(output_tokens=50))
        time.sleep(0.05)
        account.settle(first, Cost(output_tokens=80))
        with pytest.raises(OverBudget, match="80 of 100"):
            second.result(5)


def test_dollars_add_up_without_rounding():
    account = Account(Ceilings.of(Budget(usd=0.3), calls=False))
    for _ in range(3):
        number = account.reserve(Cost(picodollars=Cost.picodollars_of(0.1)))
        account.settle(number, Cost(picodollars=Cost.picodollars_of(0.1)))
    assert account.spent.usd == 0.3
    with pytest.raises(OverBudget, match=r"\$0.3 of \$0.3 dollars"):
        account.reserve(Cost(picodollars=1))


def test_what_a_ceiling_does_not_count_passes_a_spent_account(account):
    account.settle(account.reserve(Cost(output_tokens=100)), Cost(output_tokens=100))
    account.reserve(Cost(calls=1, train_steps=5))


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 12), st.integers(20, 200), st.randoms(use_true_random=False))
def test_no_interleaving_of_threads_passes_the_ceiling(n_threads, ceiling, random):
    account = Account(Ceilings.of(Budget(tokens=ceiling), calls=False))
    plans = [[(random.randint(1, 30), random.random()) for _ in range(15)] for _ in range(n_threads)]
    worst = []
    start = threading.Barrier(n_threads)

    def work(plan):
        start.wait()
        for asked, share in plan:
            try:
                number = account.reserve(Cost(output_tokens=asked))
            except OverBudget:
                continue
            totals = account.totals()
            worst.append((totals["spent"] + totals["reserved"]).output_tokens)
            account.settle(number, Cost(output_tokens=int(asked * share)))

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(work, plans))
    assert max(worst, default=0) <= ceiling
    assert account.totals()["reserved"] == Cost()
