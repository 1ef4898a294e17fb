"""What a store of answers, a ledger and a store of stages promise, whether they are on disk or in a shared database."""

import multiprocessing
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from copa_harness.errors import ConfigurationError
from copa_harness.lm.budget.cost import Cost, OverBudget
from copa_harness.lm.budget.ledger import RunLedger
from copa_harness.lm.cache.store import CacheWarning, ResponseCache
from copa_harness.results import Budget
from copa_harness.shared import database as shared_database
from copa_harness.shared.answers import SharedAnswers
from copa_harness.shared.database import SharedDatabase
from copa_harness.shared.ledger import SharedLedger
from copa_harness.shared.stages import SharedStages
from copa_harness.store.stages import StageStore

KEY, OTHER = "ab" * 32, "cd" * 32
ANSWER = {"message": {"role": "assistant", "parts": [{"type": "text", "text": "grüße"}]}}
FORKED = multiprocessing.get_context("fork")


class OnDisk:
    def __init__(self, directory):
        self.directory = directory

    def answers(self):
        return ResponseCache(self.directory / "responses")

    def ledger(self, **ceilings):
        return RunLedger(self.directory, "r", budget=Budget(**ceilings))

    def stages(self):
        return StageStore(self.directory / "stages")

    def damage(self, store):
        row = b"0" * 64 + b"\n{}"
        store._store.set(KEY, row)


class InDatabase(OnDisk):
    """Each store is opened as by another machine: over a connection, and with a cache directory, of its own."""

    def __init__(self, directory, url):
        super().__init__(directory)
        self.url, self.opened = url, []

    def database(self):
        self.opened.append(SharedDatabase(self.url))
        return self.opened[-1]

    def answers(self):
        database = self.database()
        return SharedAnswers(database, local=ResponseCache(self.directory / str(len(self.opened))))

    def ledger(self, **ceilings):
        return SharedLedger(self.database(), "r", budget=Budget(**ceilings))

    def stages(self):
        return SharedStages(self.database())

    def damage(self, store):
        store._database.put("answer", KEY, b"0" * 64 + b"\n{}")


@pytest.fixture
def short_lease(monkeypatch):
    monkeypatch.setattr(shared_database, "LEASE_S", 1.0)
    monkeypatch.setattr(shared_database, "BEAT_S", 0.2)


@pytest.fixture(params=["disk", "database"])
def place(request, tmp_path, short_lease):
    if request.param == "disk":
        yield OnDisk(tmp_path)
        return
    there = InDatabase(tmp_path, request.getfixturevalue("postgres").database("contracts"))
    yield there
    for one in there.opened:
        one.close()


def test_what_is_set_is_got_by_everybody_and_nothing_else(place):
    one, other = place.answers(), place.answers()
    assert other.get(KEY) is None
    one.set(KEY, ANSWER)
    assert one.get(KEY) == other.get(KEY) == ANSWER
    assert other.get(OTHER) is None


def test_a_damaged_answer_is_refused_with_a_warning_and_can_be_replaced(place):
    one = place.answers()
    one.set(KEY, ANSWER)
    place.damage(one)
    with pytest.warns(CacheWarning, match="damaged"):
        assert one.get(KEY) is None
    assert one.get(KEY) is None
    one.set(KEY, ANSWER)
    assert place.answers().get(KEY) == ANSWER


def test_of_many_who_ask_the_same_one_pays_and_the_others_get_its_answer(place):
    stores, paid = [place.answers() for _ in range(3)], []

    def ask(number):
        store, key = stores[number % 3], f"{number % 7:064x}"
        with store.locked(key):
            if (found := store.get(key)) is None:
                paid.append(key)
                time.sleep(0.02)
                store.set(key, {"number": number % 7})
                return number % 7
            return found["number"]

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(63))) == [number % 7 for number in range(63)]
    assert len(paid) == len(set(paid)) == 7


def test_a_claim_that_ended_without_an_answer_is_anybodys(place):
    one, other = place.answers(), place.answers()
    with pytest.raises(ZeroDivisionError), one.locked(KEY):
        raise ZeroDivisionError
    with other.locked(KEY):
        assert other.get(KEY) is None
        other.set(KEY, ANSWER)
    with one.locked(KEY):
        assert one.get(KEY) == ANSWER


def in_a_child(action):
    """The process that runs `action`, which says when it is where it wants to be killed."""
    told = FORKED.Event()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = FORKED.Process(target=action, args=(told,), daemon=True)
        child.start()
    assert told.wait(20)
    return child


def killed(child):
    os.kill(child.pid, signal.SIGKILL)
    child.join()


def test_the_claim_of_a_killed_process_is_taken_over(place):
    def hold(told):
        store = place.answers()
        with store.locked(KEY):
            told.set()
            time.sleep(60)

    child = in_a_child(hold)
    one, entered = place.answers(), threading.Event()

    def take():
        with one.locked(KEY):
            assert one.get(KEY) is None
            entered.set()

    waiting = threading.Thread(target=take)
    waiting.start()
    assert not entered.wait(1.5)  # longer than a lease: its owner lives
    killed(child)
    assert entered.wait(20)
    waiting.join()


def test_a_child_forked_from_a_process_with_an_open_store_pays_for_itself(place):
    one = place.answers()
    with one.locked(KEY):

        def ask(told):
            with one.locked(OTHER):
                one.set(OTHER, ANSWER)
            told.set()

        child = in_a_child(ask)
        child.join()
        assert one.get(OTHER) == ANSWER
        one.set(KEY, ANSWER)


def test_threads_of_several_openings_never_pass_a_ceiling(place):
    ledgers, refused = [place.ledger(calls=30, tokens=1000) for _ in range(3)], []

    def pay(number):
        ledger = ledgers[number % 3]
        try:
            reservation = ledger.reserve(Cost(calls=1, input_tokens=20, output_tokens=10))
        except OverBudget as error:
            refused.append(str(error))
            return
        assert ledger.spent.calls + ledger.reserved.calls <= 30
        ledger.settle(reservation, Cost(calls=1, input_tokens=20, output_tokens=number % 10))

    with ThreadPoolExecutor(9) as pool:
        list(pool.map(pay, range(60)))
    assert ledgers[0].spent.calls == 30
    assert ledgers[1].reserved == Cost()
    assert len(refused) == 30
    assert all("30 of 30 paid calls" in text for text in refused)


@pytest.mark.parametrize(
    ("ceilings", "cost", "what"),
    [
        ({"tokens": 100}, Cost(1, 60, 41), "tokens"),
        ({"input_tokens": 59}, Cost(1, 60, 41), "input_tokens"),
        ({"usd": 1}, Cost(1, 0, 0, 10**12 + 1), "usd"),
        ({"train_steps": 7}, Cost(train_steps=8), "train_steps"),
    ],
)
def test_every_ceiling_is_kept_by_name(place, ceilings, cost, what):
    ledger = place.ledger(**ceilings)
    with pytest.raises(OverBudget) as caught:
        ledger.reserve(cost)
    assert caught.value.what == what
    assert ledger.reserved == Cost()
    ledger.release(ledger.reserve(Cost(calls=1)))
    assert ledger.spent == Cost()


def test_a_reservation_waits_for_one_that_may_turn_out_cheaper(place):
    one, other = place.ledger(tokens=100), place.ledger(tokens=100)
    first = one.reserve(Cost(1, 0, 80))
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(other.reserve, Cost(1, 0, 60))
        time.sleep(0.1)
        assert not second.done()
        one.settle(first, Cost(1, 0, 10))
        other.settle(second.result(20), Cost(1, 0, 60))
    assert one.spent == Cost(2, 0, 70)


def test_what_a_killed_process_had_reserved_counts_as_spent(place):
    def reserve(told):
        ledger = place.ledger(calls=5)
        for _ in range(3):
            ledger.reserve(Cost(calls=1))
        told.set()
        time.sleep(60)

    child = in_a_child(reserve)
    ledger = place.ledger(calls=5)
    assert (ledger.spent.calls, ledger.reserved.calls) == (0, 3)
    for _ in range(2):
        ledger.settle(ledger.reserve(Cost(calls=1)), Cost(calls=1))
    killed(child)
    with pytest.raises(OverBudget, match="5 of 5 paid calls"):
        ledger.reserve(Cost(calls=1))
    assert (ledger.spent.calls, ledger.reserved.calls) == (5, 0)


def test_a_run_has_one_set_of_ceilings(place):
    place.ledger(calls=5)
    with pytest.raises(ConfigurationError, match="opened with the ceilings"):
        place.ledger(calls=6)


def test_a_finished_stage_is_everybodys_and_a_damaged_one_nobodys(place):
    one, other = place.stages(), place.stages()
    assert other.get("k") is None
    one.put("k", {"score": 0.5, "text": "ä"})
    assert other.get("k") == {"score": 0.5, "text": "ä"}
    one._write("k", one._read("k").replace("0.5", "0.9"))
    with pytest.warns(RuntimeWarning, match="does not match its checksum"):
        assert other.get("k") is None
    other.put("k", {"score": 0.7})
    assert one.get("k") == {"score": 0.7}


def test_one_makes_a_stage_while_the_others_wait(place):
    stages, made = [place.stages() for _ in range(3)], []

    def make(number):
        store = stages[number % 3]
        with store.exclusive("k" * 40):
            if store.get("k") is None:
                made.append(number)
                time.sleep(0.1)
                store.put("k", {"score": 1})

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(make, range(6)))
    assert len(made) == 1
