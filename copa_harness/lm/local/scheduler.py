"""Requests from many threads become batches on one worker thread, and batches become answers.

`Batcher` collects: those who come within a few milliseconds start together. A lone caller never waits, since company is
expected only while others are on their way or came along the last time. Between any two steps of what is under way it
hands over those who have come meanwhile.

`BatchGenerator`, one per model in memory whatever the number of engines, decides: which prompts go together, whether
they fit into memory, which way they take. That is the cascade loop where the model fits it: rows join and leave a
running batch at every step, so nobody waits for somebody else's long answer. Else it is the library's `generate` behind
[shared prefix | padding | own suffix], one batch after the other.

A token that hangs on a near-tie is looked at again alone; a row whose token is a tie even then is answered again by the
library alone, after the others. Where a batch fails, for want of memory or otherwise, its rows are answered again in
halves, down to single ones: an error is told to the callers whose rows cause it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

from copa_harness.errors import OutOfMemoryError, ProviderError
from copa_harness.formatting import counted, size
from copa_harness.lm.local.decoding import FIRST_ROOM_TOKENS, NEAR_CHOICE, SHORT_LIST, CascadeRun, Row, RowState
from copa_harness.lm.local.executor import Answer, BatchExecutor, Prompt, lora_key
from copa_harness.lm.local.memory import (
    BATCH_LIMIT_BYTES,
    FREE_SHARE,
    free_bytes,
    is_out_of_memory,
    oom_message,
)
from copa_harness.lm.local.model import LocalModel
from copa_harness.lm.local.prefix_cache import PrefixCache, PrefixKey

logger = logging.getLogger(__name__)

Payload = TypeVar("Payload")
AnswerT = TypeVar("AnswerT")

MAX_BATCH = 128
"""Most requests answered together."""

DEFAULT_WINDOW_S = 0.004

IDLE_S = 2.0
"""Seconds without work after which the worker thread ends; the next job starts another."""

REMEDY = (
    "remedy: fewer or shorter demonstrations, a smaller max_tokens, a smaller model or --copa-dtype=bfloat16, another "
    "--copa-device, or less else in that memory; then the same command again, which goes on where this run ended"
)
"""Against too little memory for one prompt; batches have been split by then."""


@dataclass(eq=False, slots=True)
class BatchJob(Generic[Payload, AnswerT]):
    """One request on its way.

    `cancelled` is set when its caller has gone; `company` is the most rows it may be answered with at once.
    """

    payload: Payload
    arrived_s: float = field(default_factory=time.monotonic)
    future: Future[AnswerT] = field(default_factory=Future)
    cancelled: bool = False
    company: int = MAX_BATCH

    def is_cancelled(self, row: int = 0) -> bool:
        """Whether its caller has gone."""
        return self.cancelled


class Batcher(Generic[Payload, AnswerT]):
    """Collects jobs and hands them, some at a time, to `run` on one worker thread.

    Args:
        choose: picks the jobs to start now out of all that wait, oldest first; none only while others are under way.
        run: starts them, and may answer them at once. What it raises goes to all of them left open.
        step: takes what is under way one step further; returns whether anything is left under way. Raises nothing.
        window_s: longest time a job waits for company, in seconds.
    """

    def __init__(
        self,
        choose: Callable[[Sequence[BatchJob[Payload, AnswerT]]], Sequence[BatchJob[Payload, AnswerT]]],
        run: Callable[[Sequence[BatchJob[Payload, AnswerT]]], None],
        *,
        step: Callable[[], bool] = lambda: False,
        window_s: float = DEFAULT_WINDOW_S,
    ) -> None:
        self._choose = choose
        self._run = run
        self._step = step
        self._window_s = window_s
        self._condition = threading.Condition()
        self._waiting: list[BatchJob[Payload, AnswerT]] = []
        self._n_arriving = 0
        self._had_company = self._is_under_way = False
        self._stepped_s = 0.0
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

    def submit(self, payload: Payload) -> BatchJob[Payload, AnswerT]:
        """Queue a job; its future will hold the answer."""
        job: BatchJob[Payload, AnswerT] = BatchJob(payload)
        with self._condition:
            self._waiting.append(job)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="copa-local-model", daemon=True)
                self._worker.start()
            self._condition.notify_all()
        return job

    def put_back(self, jobs: Sequence[BatchJob[Payload, AnswerT]]) -> None:
        """Queue jobs that were started before all that wait."""
        with self._condition:
            self._waiting[:0] = jobs

    def wait(self, job: BatchJob[Payload, AnswerT], *, timeout_s: float | None = None) -> AnswerT:
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
                if not self._is_under_way and not self._condition.wait_for(lambda: self._waiting, timeout=IDLE_S):
                    self._worker = None
                    return
                self._wait_for_company()
                waiting: list[BatchJob[Payload, AnswerT]] = []
                if self._waiting and (not self._is_under_way or self._window_left_s() <= 0):
                    waiting = [job for job in self._waiting if not job.cancelled]
                    self._waiting = []
            if waiting:
                self._start_some(waiting)
            del waiting  # an idle worker must not keep answers alive
            self._is_under_way = self._step()
            self._stepped_s = time.monotonic()

    def _start_some(self, waiting: list[BatchJob[Payload, AnswerT]]) -> None:
        """Start some of those that wait and put the rest back in front of what has come since."""
        chosen = waiting
        try:
            chosen = list(self._choose(waiting))
            taken = set(map(id, chosen))
            self.put_back([job for job in waiting if id(job) not in taken])
            self._had_company = len(waiting) > 1 or self._is_under_way
            if chosen:
                self._run(chosen)
        except BaseException as error:  # noqa: BLE001 - handed to every caller, who raises it
            for job in chosen:
                if not job.future.done():
                    job.future.set_exception(error)

    def _wait_for_company(self) -> None:
        """With nothing under way: wait until the oldest job's window has passed, if company is to be expected."""
        while self._waiting and not self._is_under_way and (left_s := self._window_left_s()) > 0:
            self._condition.wait(left_s)

    def _window_left_s(self) -> float:
        """How much longer the oldest job should wait for company."""
        if not self._n_arriving and (self._is_under_way or not self._had_company):
            return 0.0
        # Those answered a moment ago come again: who waited while they were answered waits for them.
        since_s = self._waiting[0].arrived_s if self._is_under_way else max(self._waiting[0].arrived_s, self._stepped_s)
        return since_s + self._window_s - time.monotonic()


Job = BatchJob[Prompt, Answer]

_generators: dict[tuple[Path, str, str], tuple[str, BatchGenerator]] = {}

_generators_lock = threading.Lock()


def load_generator(directory: Path, *, device: str, dtype: str, fingerprint: str) -> BatchGenerator:
    """The process's one generator for this folder, device and dtype; the first call loads the weights.

    Other weights at the same place have another fingerprint and are loaded anew; nobody is given the old ones.

    Raises:
        ConfigurationError, OutOfMemoryError: see `LocalModel`.
    """
    with _generators_lock:
        key = (directory, device, dtype)
        loaded, generator = _generators.get(key, ("", None))
        if generator is None or loaded != fingerprint:
            try:
                generator = BatchGenerator(LocalModel(directory, device=device, dtype=dtype))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(
                    f"memory on {device} holds the weights of {directory} in {dtype}, but not what is made of them to "
                    f"answer ({oom_message(error)}); remedy: a smaller model, --copa-dtype=bfloat16, another "
                    "--copa-device, or less else in that memory"
                ) from error
            _generators[key] = (fingerprint, generator)
        return generator


class BatchGenerator:
    """Generates answers for prompts from any number of threads, in batches, on one worker thread.

    Attributes:
        model: the model in memory.
        cascades: whether the cascade loop is used where the model fits it.
        prefixes: states of shared prefixes.
        n_batches: how many times prompts were read together, since loading.
        n_rows: answers.
        n_near_ties: tokens looked at again alone, and batches' rows answered again.
        n_steps, n_row_steps: steps, and rows in each, summed.
    """

    def __init__(self, model: LocalModel) -> None:
        self.model = model
        self.cascades = model.cascades
        self.prefixes = PrefixCache()
        self._executor = BatchExecutor(model, self.prefixes)
        self._runs: dict[str, CascadeRun] = {}
        self._jobs: dict[Row, Job] = {}
        self._ties: list[Job] = []
        self.n_batches = self.n_rows = self.n_near_ties = self.n_steps = self.n_row_steps = 0
        self._batcher: Batcher[Prompt, Answer] = Batcher(self._choose, self._run, step=self._step)

    def describe(self) -> str:
        """One line on the model, the path its batches take, and what was answered since loading."""
        path = "cascade" if self.cascades else "transformers generate"
        rows = (
            f"{counted(self.n_rows, 'answer')}, {self.n_row_steps / self.n_steps:.1f} at a time"
            if self.n_rows
            else "no answer yet"
        )
        ties = f", {counted(self.n_near_ties, 'near-tie')} looked at again alone" if self.n_near_ties else ""
        return f"{self.model.describe()}, {path}; {rows}{ties}"

    def arriving(self) -> AbstractContextManager[None]:
        """Announces a prompt in preparation; see `Batcher.arriving`."""
        return self._batcher.arriving()

    def submit(self, prompt: Prompt) -> Job:
        """Queue a prompt."""
        return self._batcher.submit(prompt)

    def wait(self, job: Job, *, timeout_s: float | None = None) -> Answer:
        """The answer of a queued prompt; an interrupted caller abandons it."""
        return self._batcher.wait(job, timeout_s=timeout_s)

    # -- which prompts go together

    def _choose(self, waiting: Sequence[Job]) -> Sequence[Job]:
        """The oldest job and all that can start together with it, as far as there is room beside what is under way."""
        oldest = waiting[0].payload
        if self.cascades:
            family, scores = self._executor.family(oldest), bool(oldest.choices)
            jobs = [
                job
                for job in waiting
                if bool(job.payload.choices) == scores and self._executor.family(job.payload) == family
            ]
            return self._within_limits(jobs)
        groups: dict[tuple[PrefixKey, int, bool], list[Job]] = {}
        for job in waiting:
            if lora_key(job.payload) == lora_key(oldest) and bool(job.payload.choices) == bool(oldest.choices):
                groups.setdefault(self._group_key(job.payload), []).append(job)
        first = next(iter(groups.values()))
        if self._is_lone(first):  # new prefixes of one row each are padded together without sharing
            first = [group[0] for group in groups.values() if self._is_lone(group)]
        return self._within_limits(first)

    def _group_key(self, prompt: Prompt) -> tuple[PrefixKey, int, bool]:
        prefix = self._executor.prefix_key(prompt)
        width = 0 if self.model.pads else len(prompt.tokens.ids) - len(prefix[1])
        return prefix, width, bool(prompt.choices)

    def _is_lone(self, group: Sequence[Job]) -> bool:
        return len(group) == 1 and self.model.pads and self._executor.prefix_key(group[0].payload) not in self.prefixes

    def _within_limits(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """As many of the first jobs as may join what is under way; at least one where nothing is."""
        running = list(self._jobs.values())
        free = free_bytes(self.model.device)
        limit: float = BATCH_LIMIT_BYTES
        if free is not None:
            limit = min(limit, FREE_SHARE * (free + (self._bytes(running, free=free) if running else 0)))
        least = 0 if running else 1
        n = min(len(jobs), max(least, MAX_BATCH - len(running)))
        while n > least and (
            len(running) + n > min(job.company for job in [*running, *jobs[:n]])
            or self._bytes([*running, *jobs[:n]], free=free) > limit
        ):
            n -= 1 if n < 8 else n // 8
        return jobs[:n]

    def _bytes(self, jobs: Sequence[Job], *, free: int | None) -> int:
        """Upper estimate of what a batch of these jobs needs, where so many bytes are free."""
        prompts, footprint = [job.payload for job in jobs], self.model.footprint
        keys = {self._executor.prefix_key(prompt) for prompt in prompts}
        kept_once = 0 if len(keys) == len(prompts) else sum(len(key[1]) for key in keys)
        longest = max(len(p.tokens.ids) for p in prompts)
        shortest_prefix = min((len(key[1]) for key in keys), default=0) if kept_once and self.cascades else 0
        limits = footprint.limits(free)
        scores = bool(prompts[0].choices)
        needed = footprint.batch_bytes(
            n_rows=len(prompts) if self.cascades or not scores else 1,
            n_shared=kept_once,
            n_own=longest - shortest_prefix,
            n_new=min(FIRST_ROOM_TOKENS, max(prompt.rules.max_tokens for prompt in prompts)),
            limits=limits if self.cascades else None,
        )
        if scores:
            n_most = max(len(prompt.choices) for prompt in prompts)
            needed += footprint.scoring_bytes(
                limits=limits,
                n_longest=max(len(choice) for prompt in prompts for choice in prompt.choices),
                n_branches=max(n_most, limits.scored) if n_most > SHORT_LIST else 0,
            )
        return needed

    # -- running them

    def _run(self, jobs: Sequence[Job]) -> None:
        """Start jobs of one kind: those of the cascade join their run, all others are answered at once."""
        import torch

        try:
            with self.model.lock, torch.inference_mode():
                if len(jobs) == 1 and not self._jobs:
                    self._check_memory(jobs[0])
                if self.cascades and not jobs[0].payload.choices:
                    self._join(jobs)
                else:
                    answers = self._score(jobs) if jobs[0].payload.choices else self._generate(jobs)
                    self._count(len(jobs))
                    for job, answer in zip(jobs, answers, strict=True):
                        self._resolve(job, answer)
            self.n_batches += 1
        except Exception as error:  # noqa: BLE001 - told to the callers whose rows cause it
            self._try_again(jobs, error)

    def _join(self, jobs: Sequence[Job]) -> None:
        prompts = [job.payload for job in jobs]
        family = self._executor.family(prompts[0])
        rows = self._executor.rows(prompts, is_cancelled=lambda i: jobs[i].cancelled)
        fresh = self._executor.new_run(prompts[0])
        fresh.add(rows, room=min(max(prompt.rules.max_tokens for prompt in prompts), FIRST_ROOM_TOKENS))
        if family not in self._runs:
            self._runs[family] = fresh
        else:
            try:
                self._runs[family].join(fresh)
            except Exception as error:
                self._break_up(family, error)
                raise
        self._jobs.update(zip(rows, jobs, strict=True))

    def _step(self) -> bool:
        """One step of every run; with none left, one row that hung on a tie. Returns whether there is more to do."""
        import torch

        with self.model.lock, torch.inference_mode():
            for family, run in list(self._runs.items()):
                self._count(len(run.rows))
                try:
                    gone = run.step(lambda row: self._executor.look_again(self._jobs[row].payload, row))
                except Exception as error:  # noqa: BLE001 - told to the callers whose rows cause it
                    self._break_up(family, error)
                    continue
                for row in gone:
                    self._release(self._jobs.pop(row), row)
                if not run.rows:
                    del self._runs[family]
            if not self._runs and self._ties:
                self._answer_alone(self._ties.pop(0))
        return bool(self._runs or self._ties)

    def _release(self, job: Job, row: Row) -> None:
        """A row has left its run."""
        self.n_near_ties += row.n_ties
        if row.state.near_tie:
            self._ties.append(job)
            return
        try:
            if row.failure is not None:
                raise row.failure
            self._resolve(job, _to_answer(job.payload, row.state))
        except Exception as error:  # noqa: BLE001 - told to its caller
            self._fail(job, error)

    def _answer_alone(self, job: Job) -> None:
        """Answer a prompt by the library's own `generate`, from its first token on."""
        if job.cancelled:
            return
        try:
            (row,) = self._executor.by_generate([job.payload], is_cancelled=job.is_cancelled, plain=True)
            self._resolve(job, _to_answer(job.payload, row))
        except Exception as error:  # noqa: BLE001 - told to its caller
            self._fail(job, error)

    def _count(self, n_rows: int) -> None:
        self.n_steps += 1
        self.n_row_steps += n_rows

    def _resolve(self, job: Job, answer: Answer) -> None:
        self.n_rows += 1
        job.future.set_result(answer)

    # -- what goes wrong

    def _break_up(self, family: str, error: Exception) -> None:
        """A run has failed in the middle: its rows are answered again from their first tokens on."""
        rows = self._runs.pop(family).rows
        self._try_again([self._jobs.pop(row) for row in rows], error)

    def _try_again(self, jobs: Sequence[Job], error: Exception) -> None:
        """Queue jobs whose batch has failed again, in batches half as large; a single one has failed for good."""
        if len(jobs) == 1:
            self._fail(jobs[0], error)
            return
        logger.warning("%s on %s with %d requests; trying halves", _said(error), self.model.device, len(jobs))
        for job in jobs:
            job.company = min(job.company, len(jobs) // 2)
        self._batcher.put_back(jobs)

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, (RuntimeError, MemoryError)):
            job.future.set_exception(error)
            return
        prompt, device = job.payload, self.model.device
        failure: Exception = ProviderError(f"generation failed on {device}: {type(error).__name__}: {error}")
        if is_out_of_memory(error):
            failure = OutOfMemoryError(
                f"memory on {device} does not suffice for one prompt of {len(prompt.tokens.ids)} tokens alone, with "
                f"max_tokens={prompt.rules.max_tokens} ({oom_message(error)}); {REMEDY}"
            )
        failure.__cause__ = error
        job.future.set_exception(failure)

    def _check_memory(self, job: Job) -> None:
        free = free_bytes(self.model.device)
        needed = self._bytes([job], free=free)
        if free is not None and needed > FREE_SHARE * free:
            prompt = job.payload
            raise OutOfMemoryError(
                f"one prompt of {len(prompt.tokens.ids)} tokens with max_tokens={prompt.rules.max_tokens} needs about "
                f"{size(needed, rough=True)} on {self.model.device}, where {size(free, rough=True)} are free; {REMEDY}"
            )

    # -- at once

    def _generate(self, jobs: Sequence[Job]) -> list[Answer]:
        """Answers of a batch by the library; a row that hangs on a near-tie is answered again, alone."""
        rows = self._executor.by_generate([job.payload for job in jobs], is_cancelled=lambda i: jobs[i].cancelled)
        answers = []
        for job, row in zip(jobs, rows, strict=True):
            if row.near_tie:
                self.n_near_ties += 1
                row = self._executor.by_generate([job.payload], is_cancelled=job.is_cancelled, plain=True)[0]
            answers.append(_to_answer(job.payload, row))
        return answers

    def _score(self, jobs: Sequence[Job]) -> list[Answer]:
        """Log-probabilities of each prompt's choices; those that nearly tie for the best are scored again, alone."""
        prompts = [job.payload for job in jobs]
        together = self._executor.score(prompts) if self.cascades else list(map(self._executor.score_alone, prompts))
        for prompt, row in zip(prompts, together, strict=True):
            near = [k for k, score in enumerate(row) if score > max(row) - NEAR_CHOICE]
            if self.cascades and len(near) > 1:
                self.n_near_ties += 1
                alone = self._executor.score_alone(replace(prompt, choices=tuple(prompt.choices[k] for k in near)))
                for k, score in zip(near, alone, strict=True):
                    row[k] = score
        return [Answer((), "", "stop", choice_scores=tuple(row)) for row in together]


def _said(error: Exception) -> str:
    return "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {oom_message(error)}"


def _to_answer(prompt: Prompt, row: RowState) -> Answer:
    ids = row.ids[:-1] if row.ids and row.ids[-1] in prompt.eos_ids else row.ids
    text = row.text if row.text is not None else prompt.chat.decode(ids)
    reason: Literal["stop", "length"] = "stop" if row.reason == "stop" else "length"
    return Answer(tuple(row.ids), text, reason, logprobs=tuple(row.logprobs))
