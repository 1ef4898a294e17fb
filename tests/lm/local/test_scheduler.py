"""Requests become batches: company is waited for, nobody hangs, errors reach every caller."""

from __future__ import annotations

import threading
import time

import pytest

from copa_harness.lm.local import scheduler
from copa_harness.lm.local.scheduler import Batcher

HANGS_S = 60.0
"""After so long nothing will come any more; no measure of how long it should take."""


def echo_batcher(log, **options):
    def run(batch):
        log.append([job.payload for job in batch])
        for job in batch:
            job.future.set_result(job.payload)

    return Batcher(lambda waiting: waiting, run, **options)


def test_a_lone_caller_does_not_wait_for_company():
    log = []
    batcher = echo_batcher(log, window_s=3600.0)
    assert batcher.wait(batcher.submit("a"), timeout_s=HANGS_S) == "a"


def test_a_batch_waits_for_a_job_that_is_being_prepared():
    log = []
    batcher = echo_batcher(log, window_s=3600.0)
    with batcher.arriving():
        first = batcher.submit("a")
        time.sleep(0.05)
        assert not first.future.done()
        batcher.submit("b")
    batcher.wait(first)
    assert log == [["a", "b"]]


def test_the_wait_for_company_ends_at_the_deadline():
    log = []
    batcher = echo_batcher(log, window_s=0.05)
    with batcher.arriving():
        assert batcher.submit("a").future.result(timeout=HANGS_S) == "a"


def test_an_error_in_a_batch_reaches_every_caller():
    def run(batch):
        raise KeyboardInterrupt

    batcher = Batcher(lambda waiting: waiting, run)
    with batcher.arriving():
        jobs = [batcher.submit(i) for i in range(3)]
    for job in jobs:
        with pytest.raises(KeyboardInterrupt):
            batcher.wait(job)


def test_an_error_in_choosing_a_batch_reaches_every_caller_instead_of_hanging():
    def choose(waiting):
        raise ZeroDivisionError

    batcher = Batcher(choose, lambda batch: None)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            batcher.submit(1).future.result(timeout=HANGS_S)


def test_jobs_that_were_not_chosen_stay_in_order():
    log = []

    def run(batch):
        log.append([job.payload for job in batch])
        for job in batch:
            job.future.set_result(None)

    batcher = Batcher(lambda waiting: waiting[:2], run, window_s=2.0)
    with batcher.arriving():
        jobs = [batcher.submit(i) for i in range(5)]
    for job in jobs:
        batcher.wait(job)
    assert log == [[0, 1], [2, 3], [4]]


def test_the_worker_thread_ends_when_idle_and_a_later_job_starts_another(monkeypatch):
    monkeypatch.setattr(scheduler, "IDLE_S", 0.05)
    batcher = echo_batcher([])
    batcher.wait(batcher.submit(1))
    if (worker := batcher._worker) is not None:
        worker.join(HANGS_S)
    assert batcher._worker is None
    assert batcher.wait(batcher.submit(2)) == 2


def test_jobs_of_callers_that_gave_up_are_not_run():
    log = []
    batcher = echo_batcher(log, window_s=0.2)
    with batcher.arriving():
        gone, kept = batcher.submit("gone"), batcher.submit("kept")
        gone.cancelled = True
    batcher.wait(kept)
    assert log == [["kept"]]


def test_who_comes_while_others_are_under_way_is_started_between_two_steps():
    log, stepped, go_on = [], threading.Event(), threading.Event()
    under_way = []

    def run(jobs):
        log.append([job.payload for job in jobs])
        under_way.extend(jobs)

    def step():
        if len(under_way) == 1:
            stepped.set()
            go_on.wait(HANGS_S)
            return True
        for job in under_way:
            job.future.set_result(job.payload)
        return False

    batcher = Batcher(lambda waiting: waiting, run, step=step)
    first = batcher.submit("a")
    assert stepped.wait(HANGS_S)
    second = batcher.submit("b")
    go_on.set()
    assert (batcher.wait(first, timeout_s=HANGS_S), batcher.wait(second, timeout_s=HANGS_S)) == ("a", "b")
    assert log == [["a"], ["b"]]


def test_who_waited_while_others_were_answered_waits_for_those_to_come_again():
    log, entered, go_on = [], threading.Event(), threading.Event()

    def run(jobs):
        log.append([job.payload for job in jobs])
        entered.set()
        go_on.wait(HANGS_S)
        for job in jobs:
            job.future.set_result(job.payload)

    batcher = Batcher(lambda waiting: waiting, run, window_s=1.0)
    with batcher.arriving():
        jobs = [batcher.submit(name) for name in "ab"]
    assert entered.wait(HANGS_S)
    late = batcher.submit("c")
    time.sleep(1.1)  # longer than the window
    go_on.set()
    for job in jobs:
        batcher.wait(job, timeout_s=HANGS_S)
    again = [batcher.submit(name) for name in "de"]
    for job in (late, *again):
        batcher.wait(job, timeout_s=HANGS_S)
    assert log == [["a", "b"], ["c", "d", "e"]]


def test_jobs_put_back_come_before_all_others():
    log = []

    def run(jobs):
        log.append([job.payload for job in jobs])
        if len(jobs) > 1:
            batcher.put_back(jobs)
            return
        for job in jobs:
            job.future.set_result(job.payload)

    batcher = Batcher(lambda waiting: waiting[: 1 if log else 2], run, window_s=0.5)
    with batcher.arriving():
        jobs = [batcher.submit(i) for i in range(3)]
    for job in jobs:
        batcher.wait(job, timeout_s=HANGS_S)
    assert log == [[0, 1], [0], [1], [2]]
