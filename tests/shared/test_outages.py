"""A database that goes away: it is waited for, then one clear error; what was paid is kept, nothing is paid twice."""

import threading
import time

import pytest

from copa_harness.errors import CacheError, ConfigurationError
from copa_harness.lm.budget.cost import Cost
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.results import Budget
from copa_harness.shared import database as shared_database
from copa_harness.shared.answers import SharedAnswers
from copa_harness.shared.database import SharedDatabase
from copa_harness.shared.ledger import SharedLedger

KEY, OTHER = "ab" * 32, "cd" * 32
ANSWER = {"text": "7"}
CUT_OFF = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'copa-harness'"


@pytest.fixture
def url(postgres):
    return postgres.database("outages")


@pytest.fixture
def opened(url):
    databases = []

    def opened_():
        databases.append(SharedDatabase(url))
        return databases[-1]

    yield opened_
    for one in databases:
        one.close()


def later(action, after_s=0.3):
    thread = threading.Timer(after_s, action)
    thread.start()
    return thread


def test_a_lost_connection_is_made_again_and_nobody_notices(opened, postgres, tmp_path):
    answers = SharedAnswers(opened(), local=ResponseCache(tmp_path))
    for number in range(5):
        key = f"{number:064x}"
        postgres.sql(CUT_OFF)
        with answers.locked(key):
            postgres.sql(CUT_OFF)
            answers.set(key, {"n": number})
        assert answers.get(key) == {"n": number}


def test_a_name_that_is_unknown_for_a_moment_is_waited_for_once_it_was_known(opened, postgres, tmp_path):
    answers = SharedAnswers(opened(), local=ResponseCache(tmp_path))
    postgres.sql(CUT_OFF)
    postgres.sql("ALTER DATABASE outages RENAME TO elsewhere")
    back = later(lambda: postgres.sql("ALTER DATABASE elsewhere RENAME TO outages"))
    answers.set(KEY, ANSWER)
    back.join()
    assert answers.get(KEY) == ANSWER


def test_a_killed_server_is_waited_for_and_has_lost_nothing(opened, postgres, tmp_path):
    one, other = opened(), opened()
    answers, ledger = SharedAnswers(one, local=ResponseCache(tmp_path)), SharedLedger(one, "r", budget=Budget(calls=3))
    with answers.locked(KEY):
        number = ledger.reserve(Cost(calls=1))
        postgres.kill()
        starting = later(postgres.start)
        answers.set(KEY, ANSWER)
        ledger.settle(number, Cost(calls=1))
        starting.join()
    seen = SharedAnswers(other, local=ResponseCache(tmp_path / "other"))
    assert seen.get(KEY) == ANSWER
    assert (ledger.spent, ledger.reserved) == (Cost(calls=1), Cost())


def test_the_claim_of_a_living_process_outlasts_a_restart_of_the_server(opened, postgres, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_database, "LEASE_S", 1.0)
    monkeypatch.setattr(shared_database, "BEAT_S", 0.2)
    one, other = (SharedAnswers(opened(), local=ResponseCache(tmp_path / name)) for name in ("one", "other"))
    got = []

    def wait():
        with other.locked(KEY):
            got.append(other.get(KEY))

    with one.locked(KEY):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.5)
        postgres.stop("immediate")
        time.sleep(1.5)  # longer than a lease
        postgres.start()
        time.sleep(0.8)
        assert got == []
        one.set(KEY, ANSWER)
    waiting.join()
    assert got == [ANSWER]


def test_a_database_that_stays_away_is_one_clear_error_and_the_paid_answer_is_kept(
    opened, postgres, tmp_path, monkeypatch
):
    monkeypatch.setattr(shared_database, "WAIT_S", 0.5)
    database = opened()
    answers = SharedAnswers(database, local=ResponseCache(tmp_path / "one"))
    with answers.locked(KEY):
        postgres.stop("immediate")
        with pytest.raises(CacheError, match="Nothing is lost"):
            answers.set(KEY, ANSWER)
        n_lost = database._n_lost
        with pytest.raises(CacheError, match="has not answered"):
            answers.get(OTHER)
        assert database._n_lost == n_lost + 1  # it is known to be away: nobody waits a second time
        postgres.start()
    again = SharedAnswers(opened(), local=ResponseCache(tmp_path / "one"))
    assert again.get(KEY) == ANSWER
    elsewhere = SharedAnswers(opened(), local=ResponseCache(tmp_path / "other"))
    assert elsewhere.get(KEY) == ANSWER


def test_a_reservation_whose_reply_was_lost_is_made_once(opened, monkeypatch):
    database = opened()
    ledger = SharedLedger(database, "r", budget=Budget(calls=5))
    execute = database.execute

    def twice(statement, **values):
        if "INSERT INTO copa_reservations" in statement or "DELETE FROM copa_reservations" in statement:
            execute(statement, **values)
        return execute(statement, **values)

    monkeypatch.setattr(database, "execute", twice)
    number = ledger.reserve(Cost(calls=1))
    assert ledger.reserved == Cost(calls=1)
    ledger.settle(number, Cost(calls=1))
    assert (ledger.spent, ledger.reserved) == (Cost(calls=1), Cost())


def test_who_was_taken_for_dead_by_mistake_settles_nothing_twice(opened, tmp_path):
    one, other = opened(), opened()
    ledger = SharedLedger(one, "r", budget=Budget(calls=5, tokens=100))
    number = ledger.reserve(Cost(1, 0, 50))
    answers = SharedAnswers(one, local=ResponseCache(tmp_path))
    with answers.locked(KEY):
        ((beat,),) = other.execute("SELECT beat FROM copa_owners WHERE owner = %(owner)s", owner=one.owner)
        other.execute(shared_database._BURY, owner=one.owner, beat=beat)
        assert ledger.spent == Cost(1, 0, 50)
        ledger.settle(number, Cost(1, 0, 10))
        answers.set(KEY, ANSWER)
    assert (ledger.spent, ledger.reserved) == (Cost(1, 0, 50), Cost())
    seen = SharedAnswers(other, local=ResponseCache(tmp_path / "other"))
    assert seen.get(KEY) == ANSWER
    assert seen.set(KEY, {"text": "another"}) == ANSWER  # the first is everybody's
    assert seen.get(KEY) == ANSWER


def test_a_beat_that_went_on_meanwhile_buries_nobody(opened):
    one, other = opened(), opened()
    owner = one.owner
    other.execute(shared_database._BURY, owner=owner, beat=1)
    assert other.execute("SELECT count(*) FROM copa_owners WHERE owner = %(owner)s", owner=owner) == [(1,)]


def test_closing_gives_back_what_was_held(opened, tmp_path):
    one, other = opened(), opened()
    SharedLedger(one, "r", budget=Budget(calls=5)).reserve(Cost(calls=2))
    one.close()
    ledger = SharedLedger(other, "r", budget=Budget(calls=5))
    assert (ledger.spent, ledger.reserved) == (Cost(calls=2), Cost())
    assert other.execute("SELECT count(*) FROM copa_owners") == [(0,)]


@pytest.mark.parametrize("address", ["nonsense", "postgresql://", "postgresql://h:x/d"], ids=["none", "bare", "port"])
def test_other_addresses_are_refused_without_their_password(address, monkeypatch):
    monkeypatch.setattr(shared_database, "WAIT_S", 0.1)
    with pytest.raises((ConfigurationError, CacheError)):
        SharedDatabase(address)


def test_a_database_that_is_not_there_is_told_at_once_and_without_the_password(postgres):
    address = f"postgresql://copa:geheimes-wort@127.0.0.1:{postgres.port}/nowhere"
    with pytest.raises(CacheError, match="does not exist") as caught:
        SharedDatabase(address)
    assert "geheim" not in str(caught.value)


def test_an_answer_that_only_this_machine_had_is_given_to_the_others(opened, tmp_path):
    ResponseCache(tmp_path / "one").set(KEY, ANSWER)
    assert SharedAnswers(opened(), local=ResponseCache(tmp_path / "one")).get(KEY) == ANSWER
    assert SharedAnswers(opened(), local=ResponseCache(tmp_path / "other")).get(KEY) == ANSWER


def test_processes_that_come_first_all_at_once_make_the_tables_once(url):
    threads = [threading.Thread(target=lambda: SharedDatabase(url).close()) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    database = SharedDatabase(url)
    assert database.execute("SELECT count(*) FROM copa_rows") == [(0,)]
    database.close()


def test_a_beat_that_is_late_does_not_outlive_who_has_closed(opened, monkeypatch):
    one, late = opened(), threading.Event()
    monkeypatch.setattr(shared_database, "BEAT_S", 0.01)
    execute = one.execute

    def slow(statement, **values):
        if statement == shared_database._BEAT and one._beating is not None:
            late.set()
            time.sleep(0.3)
        return execute(statement, **values)

    monkeypatch.setattr(one, "execute", slow)
    assert one.owner
    assert late.wait(20)
    one.close()
    time.sleep(0.4)
    assert opened().execute("SELECT count(*) FROM copa_owners") == [(0,)]
