"""Several processes at one optimization: every call paid once, every trial taken once, nothing lost with a process."""

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from contextlib import suppress

import optuna
import pytest

from copa_harness import COPA
from copa_harness.errors import ConfigurationError
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.journal import open_journal
from copa_harness.optimize.search.shared import SharedCalls, alone_at, colleagues_at, identity_of, why_not_shared
from copa_harness.results import Budget
from copa_harness.strategy import parse_strategy
from tests.optimize.conftest import answer_of

BUDGET = 160


def compiled(toy, folder, *, log, pause_s=0.0, kill_at=None, **settings):
    """The toy optimized by this process; every call that reaches the model is a line of `log`."""

    def answers(messages, model):
        time.sleep(pause_s)
        with log.open("a") as file:
            file.write(f"{os.getpid()} {hash((str(messages), model)) & 0xFFFFFFFF:08x}\n")
        doomed = folder / "doomed"
        if kill_at is not None and len(log.read_text().splitlines()) >= kill_at:
            with suppress(FileNotFoundError):  # it is done already
                pid = int(doomed.rename(folder / f"killed by {threading.get_native_id()}").read_text())
                os.kill(pid, signal.SIGKILL)
        return {"kind": answer_of(messages, model)}

    gateway = Gateway(cache=ResponseCache(folder / "responses"))
    lm = ScriptedLM(answers, fingerprint=lambda model: f"toy:{model}", gateway=gateway)
    settings = {"strategy": "p", "budget": BUDGET, "threads": 2, "n_rounds": 1, "trials_at_once": 3, **settings}
    optimizer = COPA(metric=toy.metric, lm=lm, journal=folder / "journal.jsonl", **settings)
    return optimizer.compile(toy.program(), trainset=toy.train, valset=toy.val).copa_result


def started(toy, folder, log, *, gate=None, **settings):
    def work():
        if gate is not None:
            if gate.wait(60) == 0:
                (folder / "doomed").write_text(str(os.getpid()))
            gate.wait(60)
        result = compiled(toy, folder, log=log, **settings)
        (folder / f"{os.getpid()}.result").write_text(repr((result.score_after, result.charged_calls, result.state)))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def trials_of(folder):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        storage = open_journal(folder / "journal.jsonl")
        return {
            name: optuna.load_study(study_name=name, storage=storage).get_trials()
            for name in optuna.get_all_study_names(storage)
        }
    finally:
        optuna.logging.set_verbosity(optuna.logging.INFO)


def seen(folder):
    return {name: [(t.params, t.value) for t in trials] for name, trials in trials_of(folder).items()}


@pytest.fixture(scope="module")
def expected(toy_factory, tmp_path_factory):
    """What one process alone finds, and its journal."""
    folder = tmp_path_factory.mktemp("alone")
    result = compiled(toy_factory(), folder, log=folder / "calls.log")
    return repr((result.score_after, result.charged_calls, result.state)), seen(folder)


def test_two_processes_share_the_calls_and_find_what_one_finds(toy, tmp_path, expected):
    folder = tmp_path / "shared"
    folder.mkdir()
    log = folder / "calls.log"
    gate = multiprocessing.get_context("fork").Barrier(2)  # so that neither is nearly through when the other begins
    both = [started(toy, folder, log, pause_s=0.01, gate=gate) for _ in range(2)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert [path.read_text() for path in folder.glob("*.result")] == [expected[0]] * 2
    assert seen(folder) == expected[1]
    lines = [line.split() for line in log.read_text().splitlines()]
    by_process, by_call = Counter(pid for pid, _ in lines), Counter(call for _, call in lines)
    assert max(by_call.values()) == 1, "a call was paid twice"
    assert sum(by_call.values()) <= BUDGET
    assert len(by_process) == 2, by_process
    assert not (folder / "journal.jsonl.at-work").exists()


def test_a_killed_process_takes_nothing_with_it(toy, tmp_path, expected):
    folder = tmp_path / "shared"
    folder.mkdir()
    log = folder / "calls.log"
    gate = multiprocessing.get_context("fork").Barrier(2)
    both = [started(toy, folder, log, pause_s=0.01, kill_at=40, gate=gate) for _ in range(2)]
    for process in both:
        process.join(60)
    assert sorted(process.exitcode for process in both) == [-signal.SIGKILL, 0]
    assert [path.read_text() for path in folder.glob("*.result")] == [expected[0]]
    assert seen(folder) == expected[1]
    again = Counter(line.split()[1] for line in log.read_text().splitlines())
    n_in_flight = 2  # the doomed one's threads: what they asked was never answered to anybody
    assert sum(count - 1 for count in again.values()) <= n_in_flight
    assert len(again) <= BUDGET


def test_trials_at_once_change_the_search_and_none_of_them_comes_twice(toy, tmp_path, expected):
    compiled(toy, tmp_path, log=tmp_path / "calls.log", trials_at_once=1)
    assert seen(tmp_path) != expected[1]
    for trials in expected[1].values():
        points = Counter(tuple(sorted(params.items())) for params, _ in trials)
        assert max(points.values()) == 1


def test_another_optimization_does_not_join(tmp_path, monkeypatch):
    monkeypatch.setattr("copa_harness.optimize.search.shared.ENTER_S", 0.1)
    path = tmp_path / "journal.jsonl"
    with colleagues_at(path, identity="a" * 64, budget=Budget(10)) as first:
        with colleagues_at(path, identity="a" * 64, budget=Budget(10)) as second:
            assert len(first.present()) == 2
            assert first.present() == second.present()
        assert len(first.present()) == 1
        with (
            pytest.raises(ConfigurationError, match="not the same"),
            colleagues_at(path, identity="b" * 64, budget=Budget(10)),
        ):
            pass
        with pytest.raises(ConfigurationError, match="another process is writing"), alone_at(path):
            pass


def test_processes_know_each_other_by_what_they_search(toy, tmp_path):
    def identity(**changes):
        lm = ScriptedLM([], gateway=Gateway(cache=ResponseCache(tmp_path / "responses")), fingerprint="toy")
        given = {"strategy": "p", "budget": 100, "seed": 0, "metric": toy.metric, "constraints": None, **changes}
        optimizer = COPA(lm=lm, **given)
        student = Candidate.of(toy.program(), lm=lm)
        return identity_of(
            student,
            optimizer.steps,
            lms=[lm],
            settings=optimizer.settings,
            budget=optimizer.budget,
            metric=optimizer.metric,
            splits=(toy.train, toy.val),
            further=(object(),),
        )

    assert identity() == identity()
    other = [identity(seed=1), identity(budget=101), identity(max_demos=3), identity(metric=lambda *_: 0.0)]
    assert len({identity(), *other}) == 5


def test_distinct_calls_of_all_processes_never_pass_the_budget(tmp_path):
    one, two = (SharedCalls(tmp_path / "calls.sqlite", ceiling=3) for _ in range(2))
    assert [one.admit("a"), two.admit("a"), two.admit("b"), one.admit("c")] == [True] * 4
    assert not one.admit("d")
    assert not two.admit("e")
    assert one.admit("b")
    assert one.n == two.n == 3
    one.close()
    two.close()


@pytest.mark.parametrize(
    ("strategy", "budget", "reason"),
    [
        ("p", Budget(100), None),
        ("gepa", Budget(100), "'gepa' decides for itself"),
        ("p", Budget(100, usd=1.0), "ceiling on usd"),
        ("p -> w", Budget(100), "provider's fine-tuning job"),
    ],
)
def test_what_cannot_be_shared_says_why(tmp_path, strategy, budget, reason):
    lm = ScriptedLM([], gateway=Gateway(cache=ResponseCache(tmp_path / "responses")))
    found = why_not_shared(parse_strategy(strategy), [lm], budget)
    assert found is None if reason is None else reason in found
    in_memory = why_not_shared(parse_strategy("p"), [ScriptedLM([])], Budget(100))
    assert in_memory is not None
    assert "in memory" in in_memory
