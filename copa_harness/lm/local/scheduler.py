"""Requests from many threads become batches on one worker thread, and batches become answers.

`Batcher` collects: a batch is closed a few milliseconds after its oldest job came. A lone caller never waits, since
that deadline counts only while others are on their way or the last batch had company.

`BatchGenerator`, one per model in memory whatever the number of engines, decides: which prompts go together, whether
they fit into memory, which way they take. That is the cascade loop where the model fits it, else the library's
`generate` behind [shared prefix | padding | own suffix]. A row whose answer hangs on a near-tie is answered again,
alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

from copa_harness.errors import OutOfMemoryError, ProviderError
from copa_harness.formatting import size
from copa_harness.lm.local.decoding import FIRST_ROOM_TOKENS, RowState
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

NEAR_CHOICE = 1e-3
"""Two continuations whose log-probabilities differ by less are scored again, alone."""

REMEDY = (
    "remedy: fewer or shorter demonstrations, a smaller max_tokens, a smaller model or --copa-dtype=bfloat16, another "
    "--copa-device, or less else in that memory; then the same command again, which goes on where this run ended"
)
"""Against too little memory for one prompt; batches have been split by then."""


@dataclass(eq=False, slots=True)
class BatchJob(Generic[Payload, AnswerT]):
    """One request on its way; `cancelled` is set when its caller has gone."""

    payload: Payload
    arrived_s: float = field(default_factory=time.monotonic)
    future: Future[AnswerT] = field(default_factory=Future)
    cancelled: bool = False

    def is_cancelled(self, row: int = 0) -> bool:
        """Whether its caller has gone."""
        return self.cancelled


class Batcher(Generic[Payload, AnswerT]):
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
        choose: Callable[[Sequence[BatchJob[Payload, AnswerT]]], Sequence[BatchJob[Payload, AnswerT]]],
        run: Callable[[Sequence[BatchJob[Payload, AnswerT]]], None],
        *,
        prepare: Callable[[Sequence[BatchJob[Payload, AnswerT]]], None] = lambda waiting: None,
        window_s: float = DEFAULT_WINDOW_S,
    ) -> None:
        self._choose = choose
        self._run = run
        self._prepare = prepare
        self._window_s = window_s
        self._condition = threading.Condition()
        self._waiting: list[BatchJob[Payload, AnswerT]] = []
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
                self._run_one_batch(waiting)
            del waiting  # an idle worker must not keep answers alive

    def _run_one_batch(self, waiting: list[BatchJob[Payload, AnswerT]]) -> None:
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
        n_batches, n_rows, n_near_ties: counters since loading.
    """

    def __init__(self, model: LocalModel) -> None:
        self.model = model
        self.cascades = model.cascades
        self.prefixes = PrefixCache()
        self._executor = BatchExecutor(model, self.prefixes)
        self.n_batches = self.n_rows = self.n_near_ties = 0
        self._batcher: Batcher[Prompt, Answer] = Batcher(self._choose, self._run, prepare=self._read_prefix)

    def describe(self) -> str:
        """One line on the model, the path its batches take, and what was answered since loading."""
        path = "cascade" if self.cascades else "transformers generate"
        batches = f"{self.n_rows} answers in {self.n_batches} batches" if self.n_batches else "no answer yet"
        ties = f", {self.n_near_ties} near-ties answered alone" if self.n_near_ties else ""
        return f"{self.model.describe()}, {path}; {batches}{ties}"

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

    def _group_key(self, prompt: Prompt) -> tuple[PrefixKey, int, bool]:
        prefix = self._executor.prefix_key(prompt)
        width = 0 if self.model.pads else len(prompt.tokens.ids) - len(prefix[1])
        return prefix, width, bool(prompt.choices)

    def _choose(self, waiting: Sequence[Job]) -> Sequence[Job]:
        """The oldest job's group, and others that fit beside it, those of one adapter side by side.

        Jobs of one adapter and prefix are a group. Lone new prefixes are padded together without sharing. In the
        cascade, groups of several prefixes share a batch, and of several adapters where the decoder mixes them.
        """
        oldest = waiting[0].payload
        family = self._family(oldest)
        groups: dict[tuple[PrefixKey, int, bool], list[Job]] = {}
        for job in waiting:
            if self._family(job.payload) == family and bool(job.payload.choices) == bool(oldest.choices):
                groups.setdefault(self._group_key(job.payload), []).append(job)
        first = next(iter(groups.values()))
        if self._is_lone(first):
            picked = [group for group in groups.values() if self._is_lone(group)]
        elif self.cascades:
            width = self._own_width(first)
            picked = [g for g in groups.values() if not self._is_lone(g) and self._own_width(g) <= 2 * width]
        else:
            picked = [first]
        places = {lora: place for place, lora in enumerate(dict.fromkeys(lora_key(g[0].payload) for g in picked))}
        picked.sort(key=lambda group: places[lora_key(group[0].payload)])
        return self._within_limits([job for group in picked for job in group])

    def _family(self, prompt: Prompt) -> str:
        return self._executor.family(prompt) if self.cascades else f"one {lora_key(prompt)}"

    def _is_lone(self, group: Sequence[Job]) -> bool:
        return len(group) == 1 and self.model.pads and self._executor.prefix_key(group[0].payload) not in self.prefixes

    def _own_width(self, group: Sequence[Job]) -> int:
        n_prefix = len(self._executor.prefix_key(group[0].payload)[1])
        return max(len(job.payload.tokens.ids) for job in group) - n_prefix

    def _within_limits(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """As many of the first jobs as a batch may hold, at least one."""
        free = free_bytes(self.model.device)
        limit = BATCH_LIMIT_BYTES if free is None else min(BATCH_LIMIT_BYTES, FREE_SHARE * free)
        n = min(len(jobs), MAX_BATCH)
        while n > 1 and (needed := self._bytes(jobs[:n])) > limit:
            n = max(1, min(n - 1, int(n * limit / needed)))
        return jobs[:n]

    def _bytes(self, jobs: Sequence[Job]) -> int:
        """Upper estimate of what a batch of these jobs needs."""
        prompts = [job.payload for job in jobs]
        keys = {self._executor.prefix_key(prompt) for prompt in prompts}
        kept_once = 0 if len(keys) == len(prompts) else sum(len(key[1]) for key in keys)
        longest = max(len(p.tokens.ids) for p in prompts)
        shortest_prefix = min((len(key[1]) for key in keys), default=0) if kept_once and self.cascades else 0
        return self.model.footprint.batch_bytes(
            n_rows=sum(max(1, len(prompt.choices)) for prompt in prompts),
            n_shared=kept_once,
            n_own=longest - shortest_prefix,
            n_new=min(FIRST_ROOM_TOKENS, max(prompt.rules.max_tokens for prompt in prompts)),
        )

    # -- running a batch

    def _read_prefix(self, waiting: Sequence[Job]) -> None:
        """Read the oldest job's prefix if it is to be shared, before its batch is closed.

        It takes as long as many rows do: the rows of a batch that begins with one caller come while it is read.
        """
        import torch

        oldest = waiting[0].payload
        key = self._executor.prefix_key(oldest)
        if not self.cascades or not key[1] or key in self.prefixes:
            return
        if len(waiting) > 1 and sum(self._executor.prefix_key(job.payload) == key for job in waiting) < 2:
            return  # a lone prefix among others: they are padded together
        with self.model.lock, torch.inference_mode(), suppress(RuntimeError, MemoryError):
            # What fails here, for want of memory, fails again with the batch, and is reported there.
            self._executor.read_prefix(oldest)

    def _run(self, batch: Sequence[Job]) -> None:
        import torch

        with self.model.lock, torch.inference_mode():
            self._answer(batch)

    def _answer(self, batch: Sequence[Job]) -> None:
        try:
            if len(batch) == 1:
                self._check_memory(batch[0])
            answers = self._score(batch) if batch[0].payload.choices else self._generate(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise ProviderError(
                    f"generation failed on {self.model.device}: {type(error).__name__}: {error}"
                ) from error
            if len(batch) == 1:
                raise OutOfMemoryError(
                    f"memory on {self.model.device} does not suffice for one prompt of "
                    f"{len(batch[0].payload.tokens.ids)} tokens alone, with max_tokens="
                    f"{batch[0].payload.rules.max_tokens} ({oom_message(error)}); {REMEDY}"
                ) from error
            logger.warning("out of memory on %s with %d requests; trying halves", self.model.device, len(batch))
            middle = len(batch) // 2
        else:
            self.n_batches += 1
            self.n_rows += len(batch)
            for job, answer in zip(batch, answers, strict=True):
                self.n_near_ties += answer.near_tie
                job.future.set_result(answer)
            return
        self._answer(batch[:middle])
        self._answer(batch[middle:])

    def _check_memory(self, job: Job) -> None:
        needed, free = self._bytes([job]), free_bytes(self.model.device)
        if free is not None and needed > FREE_SHARE * free:
            prompt = job.payload
            raise OutOfMemoryError(
                f"one prompt of {len(prompt.tokens.ids)} tokens with max_tokens={prompt.rules.max_tokens} needs about "
                f"{size(needed, rough=True)} on {self.model.device}, where {size(free, rough=True)} are free; {REMEDY}"
            )

    def _generate(self, batch: Sequence[Job]) -> list[Answer]:
        """Answers of a batch; a row that hangs on a near-tie is answered again, alone and by the library."""
        prompts = [job.payload for job in batch]
        path = self._executor.by_cascade if self.cascades else self._executor.by_generate
        rows = path(prompts, is_cancelled=lambda i: batch[i].cancelled)
        answers = []
        for job, row in zip(batch, rows, strict=True):
            near_tie = row.near_tie
            if near_tie:
                row = self._executor.by_generate([job.payload], is_cancelled=job.is_cancelled, plain=True)[0]
            answers.append(_to_answer(job.payload, row, near_tie=near_tie))
        return answers

    def _score(self, batch: Sequence[Job]) -> list[Answer]:
        """Log-probabilities of each prompt's choices; where the best two nearly tie, each is scored alone."""
        prompts = [job.payload for job in batch]
        if not self.cascades:
            alone = [self._executor.score_alone(prompt) for prompt in prompts]
            return [Answer((), "", "stop", False, choice_scores=tuple(row)) for row in alone]
        answers = []
        for prompt, row in zip(prompts, self._executor.score(prompts), strict=True):
            best = sorted(row, reverse=True)[:2]
            near_tie = len(best) == 2 and best[0] - best[1] < NEAR_CHOICE
            scores = self._executor.score_alone(prompt) if near_tie else row
            answers.append(Answer((), "", "stop", near_tie, choice_scores=tuple(scores)))
        return answers


def _to_answer(prompt: Prompt, row: RowState, *, near_tie: bool) -> Answer:
    ids = row.ids[:-1] if row.ids and row.ids[-1] in prompt.eos_ids else row.ids
    text = row.text if row.text is not None else prompt.chat.decode(ids)
    reason: Literal["stop", "length"] = "stop" if row.reason == "stop" else "length"
    return Answer(tuple(row.ids), text, reason, near_tie, logprobs=tuple(row.logprobs))
