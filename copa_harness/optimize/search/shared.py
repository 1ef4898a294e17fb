"""Several processes at work on one optimization: who is there, what each does first, and one budget for all.

Every process runs the same search from the same seed. What a search decides depends on answers alone, every answer is
on disk, and nobody pays for one that is there or on its way (`lm.gateway`); so all processes take the same trials and end
with the same program, and one that comes later, or is killed, changes nothing but the time it takes. Work is shared
where several candidates wait for a block of examples: each process begins at a place of its own in that list, buys what
it finds unanswered, and then goes through the list in the common order, paying nothing for what the others bought.

A process is there while it holds the lock on its file beside the journal; the lock lapses with the process. Distinct
requests are also counted for all processes together, so that not even processes that disagree (a metric that rolls
dice) can pass the budget between them.

Which optimizations several processes may share, how they recognize each other, and the journal they write.

Shared is what any process would do in exactly the same way. Everything else is made by one process at a time, and
others that want the same journal are refused. Knows strategies, models and files; the sharing itself is in `sharing`.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
from filelock import FileLock, Timeout

from copa_harness.errors import BudgetExhausted, CacheError, ConfigurationError
from copa_harness.evaluate.metrics import Metric
from copa_harness.evaluate.runner import run_examples
from copa_harness.lm.budget.scope import SETTING, Scope
from copa_harness.optimize.budget import Allowance
from copa_harness.optimize.options import RunSettings
from copa_harness.optimize.search.candidate import Candidate, model_name
from copa_harness.optimize.search.journal import Journal
from copa_harness.optimize.search.scoring import Validation
from copa_harness.results import Budget, Phase
from copa_harness.store.fingerprints import hash_examples, hash_json, hash_source
from copa_harness.strategy import Step, StepKind

logger = logging.getLogger("copa_harness")

ENTER_S = 10.0
"""Seconds to wait for others who come and go, which takes milliseconds, before the journal is taken for occupied."""

_BUSY_S = 60.0

_numbers = itertools.count()


class SharedCalls:
    """The distinct requests of all processes of one optimization, in a table on disk.

    Args:
        path: The SQLite file.
        ceiling: Requests at most.
    """

    def __init__(self, path: Path, *, ceiling: float) -> None:
        self._ceiling, self._path = ceiling, path
        self._lock = threading.Lock()
        self._known: set[str] = set()
        try:
            self._sql = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            self._sql.execute("PRAGMA synchronous = OFF")  # survives a killed process; a power cut ends them all
            self._sql.execute("PRAGMA journal_mode = WAL")
            self._sql.execute("CREATE TABLE IF NOT EXISTS calls (key TEXT PRIMARY KEY)")
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def __deepcopy__(self, memo: dict[int, object]) -> SharedCalls:
        return self

    def admit(self, key: str) -> bool:
        """Count a request once for all processes; False when that would pass the ceiling."""
        with self._lock:
            if key in self._known:
                return True
            try:
                self._sql.execute("BEGIN IMMEDIATE")
                is_new = self._sql.execute("INSERT OR IGNORE INTO calls VALUES (?)", (key,)).rowcount > 0
                admitted = not is_new or self._count() <= self._ceiling
                self._sql.execute("COMMIT" if admitted else "ROLLBACK")
            except sqlite3.Error as error:
                raise self._unusable(error) from error
            if admitted:
                self._known.add(key)
            return admitted

    @property
    def n(self) -> int:
        """Requests counted so far."""
        with self._lock:
            return self._count()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._sql.close()

    def _count(self) -> int:
        return int(self._sql.execute("SELECT COUNT(*) FROM calls").fetchone()[0])

    def _unusable(self, error: Exception) -> CacheError:
        return CacheError(
            f"cannot count the calls of the processes that share an optimization in {self._path}: {error}; choose a "
            "cache directory on a disk that can be written, or let one process work on it"
        )


class Colleagues:
    """One process's view of those that make the same optimization now. Made by `colleagues_at`."""

    def __init__(self, folder: Path, name: str, *, calls: SharedCalls) -> None:
        self._folder, self._name, self.calls = folder, name, calls
        self.most = 1

    def present(self) -> list[str]:
        """The names of all that are at work, this process included, in one order for everybody."""
        return sorted({self._name, *_alive(self._folder)})

    def ahead(
        self,
        candidates: Sequence[Candidate],
        *,
        bar: Candidate,
        validation: Validation,
        allowance: Allowance,
        phase: Phase,
    ) -> None:
        """Buy the next block of candidates that all will be scored now, each process from a place of its own.

        Only what the allowance pays for in the common order is bought, and nothing is recorded but the payments: the
        scores are taken afterwards, in that order, from the answers. Alone, it does nothing.
        """
        names = self.present()
        self.most = max(self.most, len(names))
        if len(names) < 2:
            return
        left = allowance.remaining
        waiting: list[tuple[Candidate, list[int]]] = []
        for candidate in {one.key: one for one in candidates}.values():
            rows = validation.next_block(candidate, against=bar)
            left -= len(rows) * validation.calls_per_example(candidate)
            if left < 0:
                break
            waiting.append((candidate, rows))
        first = names.index(self._name) * len(waiting) // len(names)
        run = allowance.scope
        scope = Scope(f"{run.name}: ahead", budget=Budget(allowance.remaining), parent=run, shared=self.calls.admit)
        try:
            with dspy.context(**{SETTING: scope}):
                for candidate, rows in (*waiting[first:], *waiting[:first]):
                    run_examples(
                        candidate.program(),
                        [validation.examples[row] for row in rows],
                        metric=validation.metric,
                        split="validation",
                        phase=phase,
                        threads=validation.threads,
                        ids=tuple(validation.ids[row] for row in rows),
                        raise_if_nothing_works=False,
                    )
        except BudgetExhausted as error:
            logger.debug("working ahead ended early: %s", error)  # the common order meets the same end, and says so
        finally:
            scope.close()
            run.add_payments(scope)


@contextmanager
def colleagues_at(journal: Path, *, identity: str, budget: Budget) -> Iterator[Colleagues]:
    """Join those that work on the optimization of this journal, for the time of the block.

    Args:
        journal: The journal file.
        identity: Hash of everything the search depends on; all must bring the same.
        budget: Whose calls all share.

    Raises:
        ConfigurationError: Another optimization is writing the journal.
        CacheError: The calls cannot be counted.
    """
    folder = _folder(journal)
    name = f"{identity[:16]}.{os.getpid()}.{next(_numbers)}"
    own = FileLock(folder / f"{name}.lock")
    with owner_of(journal):
        others = _alive(folder)
        if any(not other.startswith(identity[:16]) for other in others):
            raise in_use(journal)
        if not others:
            shutil.rmtree(folder, ignore_errors=True)  # a dead one's requests count anew, as they are replayed
        folder.mkdir(parents=True, exist_ok=True)
        own.acquire()
        calls = SharedCalls(folder / "calls.sqlite", ceiling=budget.calls)
    try:
        yield Colleagues(folder, name, calls=calls)
    finally:
        calls.close()
        with owner_of(journal, timeout_s=_BUSY_S):
            own.release()
            with suppress(FileNotFoundError):
                (folder / f"{name}.lock").unlink()
            if not _alive(folder):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def owner_of(journal: Path, *, timeout_s: float | None = None) -> Iterator[None]:
    """While the block runs nobody else comes or goes.

    Raises:
        ConfigurationError: Somebody who works alone has the journal.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(journal.with_name(journal.name + ".owner"))
    try:
        lock.acquire(timeout=ENTER_S if timeout_s is None else timeout_s, poll_interval=0.01)
    except Timeout:
        raise in_use(journal) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def alone_at(journal: Path) -> Iterator[None]:
    """Work on the journal alone, for the time of the block.

    Raises:
        ConfigurationError: Others are at work on it.
    """
    with owner_of(journal):
        if _alive(_folder(journal)):
            raise in_use(journal)
        yield


def in_use(journal: Path) -> ConfigurationError:
    """What is said to whoever wants a journal that another optimization has."""
    return ConfigurationError(
        f"got {journal} as the journal, which another process is writing at this moment, for an optimization that "
        "cannot be shared or is not the same; wait for it, or name another file"
    )


def _folder(journal: Path) -> Path:
    return journal.with_name(journal.name + ".at-work")


def _alive(folder: Path) -> list[str]:
    """Names whose lock is held."""
    found = []
    for path in sorted(folder.glob("*.lock")):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
            lock.release()
        except Timeout:
            found.append(path.name.removesuffix(".lock"))
    return found


def why_not_shared(steps: Sequence[Step], lms: Sequence[Any], budget: Budget) -> str | None:
    """Why an optimization is made by one process at a time, or None when several may share it.

    Args:
        steps: Of the strategy, `auto` resolved.
        lms: All models it asks.
        budget: Its ceilings.
    """
    foreign = [str(step) for step in steps if step.kind in (StepKind.OPTIMIZER, StepKind.AUTO)]
    if foreign:
        return f"{foreign[0]!r} decides for itself what it asks, in an order that depends on threads"
    timed = sorted(set(budget.ceilings) - {"calls", "train_steps"})
    if timed:
        return f"where a ceiling on {timed[0]} refuses depends on threads and time"
    trains = any(step.kind in (StepKind.WEIGHTS, StepKind.JOINT) for step in steps)
    if trains and not all(hasattr(getattr(lm, "engine", None), "add_lora") for lm in lms):
        return "a provider's fine-tuning job would be started by each"
    if any(getattr(getattr(lm, "gateway", None), "cache", None) is None for lm in lms):
        return "its answers are kept in memory, where another process does not find them"
    return None


def identity_of(
    student: Candidate,
    steps: Sequence[Step],
    *,
    lms: Sequence[Any],
    settings: RunSettings,
    budget: Budget,
    metric: Metric,
    splits: Sequence[Sequence[dspy.Example]],
    further: Sequence[Any] = (),
) -> str | None:
    """Hash of everything a search depends on; processes with equal ones take the same trials. None: not to be shared.

    Args:
        student: The program as given.
        steps: What is done.
        lms: All models it asks.
        settings: Of the run; how many threads it has does not count.
        budget: Its ceilings.
        metric: By its source.
        splits: Training and validation examples.
        further: Whatever else it depends on, with a telling `repr`.
    """
    if why_not_shared(steps, lms, budget) is not None:
        return None
    return hash_json(
        [
            [student.key, hash_source(type(student.template)), [str(step) for step in steps]],
            [[model_name(lm), str(getattr(lm, "fingerprint", "")), _lasting(sorted(lm.kwargs.items()))] for lm in lms],
            [_lasting(replace(settings, threads=1)), budget.ceilings, hash_source(metric)],
            [[hash_examples(split) for split in splits], _lasting(further)],
        ]
    )


def _lasting(value: Any) -> str:
    """A `repr` without addresses in memory, which are others in every process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def admission(colleagues: Colleagues | None) -> Callable[[str], bool] | None:
    """What counts a request for all processes; None for one that works alone."""
    return None if colleagues is None else colleagues.calls.admit


@contextmanager
def at_work(
    path: Path | None, *, identity: str | None, budget: Budget, attributes: Mapping[str, Any]
) -> Iterator[tuple[Journal | None, Colleagues | None]]:
    """The journal at `path`, and who else writes it, for the time of the block.

    Args:
        path: The journal file; None keeps none, and then nobody can join.
        identity: Of an optimization that may be shared; None works alone.
        budget: Its ceilings.
        attributes: Shown with every study of the journal.

    Raises:
        ConfigurationError: Another optimization is writing the journal, or one that cannot be shared.
        CacheError: It cannot be used.
    """
    if path is None:
        yield None, None
    elif identity is None:
        with alone_at(path):
            yield Journal(path, attributes=attributes), None
    else:
        with colleagues_at(path, identity=identity, budget=budget) as colleagues:
            yield Journal(path, attributes=attributes), colleagues
