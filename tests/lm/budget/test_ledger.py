"""The ledger of a whole run: shared by threads and processes, never over its ceilings, closed against the dead."""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from copa_harness.errors import BudgetExhausted, CacheError, ConfigurationError
from copa_harness.lm.budget.cost import Cost, OverBudget
from copa_harness.lm.budget.ledger import RunLedger, current_ledger, whole_run
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.results import Budget

WORKER = """
import json, random, sys, time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from pathlib import Path
from copa_harness.errors import BudgetExhausted
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.budget.ledger import whole_run
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.results import Budget

directory, seed, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
chance = random.Random(seed)

def answer(messages):
    with open(directory / "paid.log", "a") as log:
        log.write(messages[-1]["content"] + "\\n")
    time.sleep(60 if mode == "hang" else chance.uniform(0, 0.004))
    return "word " * 5

lm = ScriptedLM(answer, gateway=Gateway(cache=ResponseCache(directory)), fingerprint="w", max_tokens=8)
budget = Budget(calls=40, tokens=9000)

def ask(prompt):
    try:
        return lm(prompt)[0]
    except BudgetExhausted as error:
        return "refused: " + str(error)

with whole_run(budget, directory=directory, run_id="r"), open_scope("t") as scope:
    print("ready", flush=True)
    sys.stdin.readline()
    # half of the prompts are asked by every process
    prompts = ["shared %d" % i for i in range(20)] + ["own %d %d" % (seed, i) for i in range(20)]
    chance.shuffle(prompts)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, prompts))
    print(json.dumps({"paid": scope.usage().paid_calls, "answers": answers}), flush=True)
"""


@pytest.fixture
def start(tmp_path):
    processes = []

    def start_(seed, mode="work"):
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(seed), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        processes.append(process)
        return process

    yield start_
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def paid(tmp_path):
    return (tmp_path / "paid.log").read_text().splitlines()


def test_processes_and_threads_together_pay_no_more_than_the_run_allows_and_nothing_twice(start, tmp_path):
    processes = [start(seed) for seed in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [json.loads(process.stdout.readline()) for process in processes]
    bought = paid(tmp_path)
    assert len(bought) == len(set(bought)) == sum(result["paid"] for result in results) == 40
    refusals = [answer for result in results for answer in result["answers"] if answer.startswith("refused")]
    assert refusals
    assert all("'the whole run'" in text and "40 of 40 paid calls" in text for text in refusals)
    ledger = RunLedger(tmp_path, "r", budget=Budget(calls=40, tokens=9000))
    assert (ledger.spent.calls, ledger.reserved) == (40, Cost())
    ledger.close()


def test_what_a_killed_process_had_in_flight_counts_as_spent(start, tmp_path):
    process = start(0, "hang")
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()
    while not (tmp_path / "paid.log").exists() or len(paid(tmp_path)) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ledger = RunLedger(tmp_path, "r", budget=Budget(calls=40, tokens=9000))
    assert (ledger.spent.calls, ledger.reserved.calls) == (0, 4)
    for _ in range(36):
        ledger.settle(ledger.reserve(Cost(calls=1)), Cost(calls=1))
    with pytest.raises(OverBudget, match="40 of 40 paid calls"):
        ledger.reserve(Cost(calls=1))
    assert (ledger.spent.calls, ledger.reserved.calls) == (40, 0)
    ledger.close()


def test_the_run_counts_real_payments_and_a_scope_counts_distinct_requests(tmp_path):
    lm = ScriptedLM("x", gateway=Gateway(cache=ResponseCache(tmp_path)), fingerprint="w")
    for name in "ab":
        lm(name)
    with whole_run(Budget(calls=1), directory=tmp_path, run_id="r") as ledger, open_scope("t") as scope:
        for name in "abc":
            lm(name)
        assert ledger.spent.calls == 1
        assert scope.charged_calls == 3
        with pytest.raises(BudgetExhausted, match="of 'the whole run' is spent: 1 of 1 paid calls"):
            lm("d")
        assert scope.exhausted
        lm("a")


def test_a_run_started_again_begins_with_an_empty_ledger(tmp_path):
    for run_id in ("first", "second"):
        with whole_run(Budget(calls=3), directory=tmp_path, run_id=run_id) as ledger:
            assert ledger.spent == Cost()
            ledger.settle(ledger.reserve(Cost(calls=3)), Cost(calls=3))
    assert current_ledger() is None


def test_the_seconds_of_a_run_are_shared_and_end_it(tmp_path, monkeypatch):
    now = [1e9]
    monkeypatch.setattr(
        "copa_harness.lm.budget.ledger.time",
        SimpleNamespace(time=time.time, monotonic=lambda: now[0], sleep=time.sleep),
    )
    lm = ScriptedLM("x", gateway=Gateway(cache=None))
    with whole_run(Budget(seconds=0.05), directory=tmp_path, run_id="r"):
        lm("a")
        now[0] += 0.06
        with pytest.raises(BudgetExhausted, match=r"its 0\.05 seconds are over"):
            lm("b")
        lm("a")


def test_processes_that_disagree_about_the_budget_are_told(tmp_path):
    RunLedger(tmp_path, "r", budget=Budget(calls=3)).close()
    with pytest.raises(ConfigurationError, match=r"ceilings .*3.* now with .*4.*same --copa-total-budget"):
        RunLedger(tmp_path, "r", budget=Budget(calls=4))


@pytest.mark.parametrize("run_id", ["", "../x", "a b", ".hidden"])
def test_a_run_id_that_is_no_file_name_is_refused(tmp_path, run_id):
    with pytest.raises(ConfigurationError, match="got the run id"):
        RunLedger(tmp_path, run_id, budget=Budget())


def test_two_runs_at_once_in_one_process_are_refused(tmp_path):
    with (
        whole_run(Budget(), directory=tmp_path, run_id="a"),
        pytest.raises(ConfigurationError, match="open already: 'a'"),
        whole_run(Budget(), directory=tmp_path, run_id="b"),
    ):
        pass


def test_a_ledger_that_cannot_be_written_stops_the_run_with_one_clear_error(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(CacheError, match=r"cannot keep the ledger.*--copa-cache-dir"):
        RunLedger(tmp_path, "r", budget=Budget())


def test_a_damaged_ledger_stops_the_run_instead_of_losing_count(tmp_path):
    lm = ScriptedLM("x", gateway=Gateway(cache=None))
    with whole_run(Budget(calls=3), directory=tmp_path, run_id="r") as ledger:
        lm("a")
        with sqlite3.connect(ledger.path) as sql:
            sql.execute("DROP TABLE spent")
        sql.close()
        with pytest.raises(CacheError, match="cannot keep the ledger"):
            lm("b")
    assert lm.calls == 1


def test_old_ledgers_are_removed_and_foreign_files_left(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    for name in ("old.sqlite", "notes.txt"):
        (folder / name).write_text("x")
        os.utime(folder / name, (1, 1))
    with whole_run(Budget(), directory=tmp_path, run_id="new"):
        assert not (folder / "old.sqlite").exists()
    assert (folder / "notes.txt").exists()


def test_a_clock_that_jumps_removes_no_ledger_in_use(tmp_path, monkeypatch):
    live = RunLedger(tmp_path, "live", budget=Budget(calls=5))
    over = RunLedger(tmp_path, "over", budget=Budget(calls=5))
    over.close()
    own = RunLedger(tmp_path, "own", budget=Budget(calls=5))
    own.settle(own.reserve(Cost(calls=1)), Cost(calls=2))
    own.close()
    jumped = time.time() + 1e9
    monkeypatch.setattr("copa_harness.lm.budget.ledger.time.time", lambda: jumped)
    assert RunLedger(tmp_path, "own", budget=Budget(calls=5)).spent == Cost(calls=2)
    assert live.path.exists()
    assert not over.path.exists()
    live.close()


def test_threads_of_one_process_share_the_connection_safely(tmp_path):
    ledger = RunLedger(tmp_path, "r", budget=Budget(calls=50))

    def work(_):
        try:
            ledger.settle(ledger.reserve(Cost(calls=1)), Cost(calls=1))
        except OverBudget:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(80))) == 50
    assert ledger.spent.calls == 50
    ledger.close()


def test_no_flipped_byte_of_a_ledger_makes_it_lose_count(tmp_path):
    budget = Budget(calls=10, output_tokens=5000)
    ledger = RunLedger(tmp_path, "r", budget=budget)
    ledger.settle(ledger.reserve(Cost(calls=3)), Cost(calls=3, input_tokens=100, output_tokens=200))
    number = ledger.reserve(Cost(calls=2, output_tokens=300))
    ledger.close()
    whole, chance = ledger.path.read_bytes(), random.Random(4)

    def account():
        again = RunLedger(tmp_path, "r", budget=budget)
        try:
            first = again.spent, again.reserved
            again.settle(number, Cost(calls=2, output_tokens=100))
            return *first, again.spent, again.reserved
        finally:
            again.close()

    expected, n_refused = account(), 0
    for place in [place for place, byte in enumerate(whole) if byte]:
        for path in ledger.path.parent.iterdir():
            path.unlink()
        flipped = whole[place] ^ chance.randrange(1, 256)
        ledger.path.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        try:
            assert account() == expected, place
        except (CacheError, ConfigurationError):
            n_refused += 1
    assert n_refused > 300


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked and killed")
def test_no_flipped_byte_of_what_a_killed_process_left_beside_the_ledger_makes_it_lose_count(tmp_path):
    budget, chance = Budget(calls=100), random.Random(5)
    child = os.fork()
    if child == 0:
        ledger = RunLedger(tmp_path, "r", budget=budget)
        for n in range(1, 7):
            ledger.settle(ledger.reserve(Cost(calls=n)), Cost(calls=n))
        ledger.reserve(Cost(calls=5))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    left = {path.name: path.read_bytes() for path in (tmp_path / "runs").iterdir()}
    (log,) = [name for name in left if name.endswith("-wal")]

    def account():
        for name, content in left.items():
            (tmp_path / "runs" / name).write_bytes(content)
        ledger = RunLedger(tmp_path, "r", budget=budget)
        try:
            return ledger.spent.calls, ledger.reserved.calls
        finally:
            ledger.close()

    assert account() == (21, 5)
    whole = left[log]
    for place in [place for place, byte in enumerate(whole) if byte or place < 56]:
        left[log] = whole[:place] + bytes([whole[place] ^ chance.randrange(1, 256)]) + whole[place + 1 :]
        with contextlib.suppress(CacheError, ConfigurationError):
            assert account() == (21, 5), place
