"""Requests from many threads become batches: one worker thread, a deadline of a few milliseconds, groups.

A lone caller never waits: the deadline counts only while others are on their way or the last batch had company.
Knows nothing of models; what may share a batch is the key that comes with a job, and the jobs run elsewhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Payload = TypeVar("Payload")
Answer = TypeVar("Answer")

DEFAULT_WINDOW_S = 0.004
IDLE_S = 2.0
"""Seconds without work after which the worker thread ends; the next job starts another."""


@dataclass(eq=False, slots=True)
class Job(Generic[Payload, Answer]):
    """One request on its way; `cancelled` is set when its caller has gone."""

    payload: Payload
    arrived_s: float = field(default_factory=time.monotonic)
    future: Future[Answer] = field(default_factory=Future)
    cancelled: bool = False

    def is_cancelled(self, row: int = 0) -> bool:
        """Whether its caller has gone."""
        return self.cancelled


class Batcher(Generic[Payload, Answer]):
    """Collects jobs and hands them, a batch at a time, to `run` on one worker thread.

    Args:
        choose: picks the jobs of the next batch out of all that wait, oldest first; at least one.
        run: answers a batch: must set every job's future. What it raises goes to all jobs left open.
        prepare: does what those that wait need before they can be answered, where it takes long: who comes meanwhile
            may still join their batch. Raises nothing.
        window_s: longest time the oldest job waits for company, in seconds.
    """

    def __init__(
        self,
        choose: Callable[[Sequence[Job[Payload, Answer]]], Sequence[Job[Payload, Answer]]],
        run: Callable[[Sequence[Job[Payload, Answer]]], None],
        *,
        prepare: Callable[[Sequence[Job[Payload, Answer]]], None] = lambda waiting: None,
        window_s: float = DEFAULT_WINDOW_S,
    ) -> None:
        self._choose = choose
        self._run = run
        self._prepare = prepare
        self._window_s = window_s
        self._condition = threading.Condition()
        self._waiting: list[Job[Payload, Answer]] = []
        self._n_arriving = 0
        self._had_company = False
        self._worker: threading.Thread | None = None

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Announces a job that is still being prepared, so that a batch may wait for it."""
        with self._condition:
            self._n_arriving += 1
        try:
            yield
        finally:
            with self._condition:
                self._n_arriving -= 1
                self._condition.notify_all()

    def submit(self, payload: Payload) -> Job[Payload, Answer]:
        """Queue a job; its future will hold the answer."""
        job: Job[Payload, Answer] = Job(payload)
        with self._condition:
            self._waiting.append(job)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="copa-local-model", daemon=True)
                self._worker.start()
            self._condition.notify_all()
        return job

    def wait(self, job: Job[Payload, Answer], *, timeout_s: float | None = None) -> Answer:
        """The answer of a queued job; a caller that is interrupted, or waits too long, abandons the job.

        Raises:
            TimeoutError: No answer after `timeout_s` seconds.
        """
        try:
            return job.future.result(timeout_s)
        except BaseException:
            job.cancelled = True
            raise

    def _work(self) -> None:
        while True:
            with self._condition:
                if not self._condition.wait_for(lambda: self._waiting, timeout=IDLE_S):
                    self._worker = None
                    return
                first = [job for job in self._waiting if not job.cancelled]
            if first:
                self._prepare(first)
            del first
            with self._condition:
                self._collect()
                waiting = [job for job in self._waiting if not job.cancelled]
                self._waiting = []
                self._had_company = len(waiting) > 1
            if waiting:
                self._work_off(waiting)
            del waiting  # an idle worker must not keep answers alive

    def _work_off(self, waiting: list[Job[Payload, Answer]]) -> None:
        """Run one batch out of `waiting` and put the rest back in front of what has come since."""
        batch = waiting
        try:
            batch = list(self._choose(waiting))
            taken = set(map(id, batch))
            with self._condition:
                self._waiting[:0] = [job for job in waiting if id(job) not in taken]
            self._run(batch)
        except BaseException as error:  # noqa: BLE001 - handed to every caller, who raises it
            for job in batch:
                if not job.future.done():
                    job.future.set_exception(error)

    def _collect(self) -> None:
        """Wait for company until the oldest job's deadline, if any is to be expected."""
        # A job that waited while others were answered, or prepared, has waited for company long enough.
        deadline = self._waiting[0].arrived_s + self._window_s
        while (left := deadline - time.monotonic()) > 0 and (self._n_arriving or self._had_company):
            self._condition.wait(left)
