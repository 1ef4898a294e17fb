"""The journal of an optimization: every finished trial as one line of JSON, in the format of Optuna's journal storage.

    optuna-dashboard .copa_cache/studies/iris-p-0f3a.jsonl

What a search decides depends on its seed and on the answers alone, and every answer is on disk; so a killed
optimization that is started again *replays*: it takes the same trials in the same order, pays only for answers it does
not have yet, and ends with the same numbers as one that was never interrupted. The journal follows: a trial that stands
in it already is compared and not written twice, new ones are appended, and one that differs (somebody edited the file)
begins a new study beside the old one. A trial is written when it has ended, as one line, so a killed process leaves no
half-run trial behind; half a line, which a full disk can leave, is cut off when the journal is opened. It is a
by-product, so a damaged one ends no run: it is moved aside (`....jsonl.damaged`) and a new one is begun. One process
at a time writes it.

No pickle: Optuna pickles snapshots only for backends that are `BaseJournalSnapshot`, which the file backend is not
(checked when a journal is opened).
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.storages.journal._base import BaseJournalSnapshot
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from copa_harness.errors import CacheError, ConfigurationError
from copa_harness.lm.cache.store import CacheWarning
from copa_harness.optimize.search.samplers import quiet_optuna
from copa_harness.shared.database import SharedDatabase

logger = logging.getLogger("copa_harness")

ENTER_S = 10.0
"""Seconds to wait for another process to be done with a journal before that is an error."""

_BEGINNING = b'{"op_code":'
"""Of every line as Optuna writes it."""

_UNREADABLE = (ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError)
"""What Optuna raises on a journal that it cannot replay."""


@contextmanager
def exclusive_journal(path: Path | SharedJournal | None, *, attributes: Mapping[str, Any]) -> Iterator[Journal | None]:
    """The journal at `path`, which no other process writes while the block runs; None for no path.

    The lock lapses with the process that holds it. For a shared one, who may make the optimization is decided already.

    Raises:
        ConfigurationError: Another process is writing it.
        CacheError: It cannot be used.
    """
    if path is None or isinstance(path, SharedJournal):
        if path is not None:
            path.attributes = dict(attributes)
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(path.name + ".owner"))
    try:
        lock.acquire(timeout=ENTER_S, poll_interval=0.01)
    except Timeout:
        raise ConfigurationError(
            f"got {path} as the journal, which another process is writing at this moment; wait for it, or name another "
            "file"
        ) from None
    try:
        yield Journal(path, attributes=attributes)
    finally:
        lock.release()


class Journal:
    """The journal of one optimization.

    Args:
        path: The file.
        attributes: About the optimization; shown with every study.
    """

    def __init__(self, path: Path, *, attributes: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.attributes = dict(attributes or {})
        self._storage = self._open()
        self._names: Counter[str] = Counter()

    def _open(self) -> JournalStorage:
        return open_journal(self.path)

    def study(self, name: str, *, attributes: Mapping[str, Any] | None = None) -> StudyJournal:
        """The record of one study; studies of equal names within one run are numbered."""
        self._names[name] += 1
        numbered = name if self._names[name] == 1 else f"{name} ({self._names[name]})"
        attributes = {**self.attributes, **(attributes or {})}
        with _told(self.path):
            return StudyJournal(self._storage, numbered, attributes, path=self.path)


class SharedJournal(Journal):
    """The journal of one optimization in the database of several machines: a row for each line of the file.

    Args:
        database: Which.
        name: Of the optimization.
    """

    def __init__(self, database: SharedDatabase, name: str) -> None:
        self._database = database
        super().__init__(Path(f"study {name}"))

    def _open(self) -> JournalStorage:
        kind = str(self.path)
        try:
            return JournalStorage(_SharedBackend(self._database, kind))
        except _UNREADABLE as error:
            warnings.warn(f"the journal of {kind} is damaged ({error}); a new one is begun", CacheWarning, stacklevel=2)
            self._database.execute("DELETE FROM copa_rows WHERE kind = %(kind)s", kind=kind)
            return JournalStorage(_SharedBackend(self._database, kind))


class _SharedBackend(BaseJournalBackend):
    """One process at a time writes it."""

    def __init__(self, database: SharedDatabase, kind: str) -> None:
        self._database, self._kind, self._n_lines = database, kind, 0

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        rows = self._database.get_all(self._kind, since=f"{log_number_from:08}")
        self._n_lines = log_number_from + len(rows)
        return [json.loads(row) for row in rows]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        for log in logs:
            line = json.dumps(log, separators=(",", ":")).encode()
            self._database.put(self._kind, f"{self._n_lines:08}", line)
            self._n_lines += 1


class StudyJournal:
    """Appends the trials of one study that are not in the journal yet."""

    def __init__(self, storage: JournalStorage, name: str, attributes: Mapping[str, Any], *, path: Path) -> None:
        self._storage, self._name, self._attributes, self._path = storage, name, attributes, path
        self._taken: list[FrozenTrial] = []
        self._open(name)

    def _open(self, name: str) -> None:
        with quiet_optuna():
            # Not load_if_exists: it writes a line on every start, and a repeated run is to leave the journal as it is.
            if name in optuna.get_all_study_names(self._storage):
                self._study = optuna.load_study(study_name=name, storage=self._storage)
            else:
                self._study = optuna.create_study(study_name=name, storage=self._storage, direction="maximize")
        known = self._study.user_attrs
        for key, value in self._attributes.items():
            if known.get(key) != value:
                self._study.set_user_attr(key, value)
        self._known = self._study.get_trials(deepcopy=False)

    def add(
        self,
        number: int,
        *,
        params: Mapping[str, str],
        options: Mapping[str, Sequence[str]],
        value: float | None,
        scores: Sequence[float | None],
        attributes: Mapping[str, Any],
    ) -> None:
        """Record that trial `number` (from 0, in the order they ended) has ended.

        Args:
            number: Of the trial.
            params: Option by dimension.
            options: All options by dimension.
            value: What the sampler was told, None for a failed trial.
            scores: One per validation example seen, in their fixed order; None where there is none. Kept as the mean so
                far after every example, which a chart of intermediate values can show.
            attributes: Numbers and words shown beside it.
        """
        trial = create_trial(
            state=TrialState.FAIL if value is None else TrialState.COMPLETE,
            value=value,
            params=dict(params),
            distributions={name: CategoricalDistribution(tuple(options[name])) for name in params},
            user_attrs={key: round(v, 4) if isinstance(v, float) else v for key, v in attributes.items()},
            intermediate_values=_means(scores),
        )
        self._taken.append(trial)
        with _told(self._path):
            while number < len(self._known) and not _same(self._known[number], trial):
                self._turn_to_next(number)
            if number >= len(self._known):
                self._study.add_trial(trial)

    def _turn_to_next(self, number: int) -> None:
        """Go on in the next study of this name that agrees with all trials so far; made when there is none."""
        for i in itertools.count(2):
            name = f"{self._name}, again {i}"
            self._open(name)
            pairs = zip(self._known, self._taken, strict=False)
            if all(_same(known, taken) for known, taken in pairs):
                break
        logger.warning(
            "journal: trial %d of %r is not the one that was taken now; this run's trials are in %r",
            number,
            self._name,
            name,
        )
        for trial in self._taken[len(self._known) : -1]:
            self._study.add_trial(trial)


def _means(scores: Sequence[float | None]) -> dict[int, float]:
    """Mean so far by example, from 0; examples without a score are left out."""
    known: dict[int, float] = {}
    total = 0.0
    for step, score in enumerate(scores):
        if score is not None:
            total += score
            known[step] = round(total / (len(known) + 1), 4)
    return known


def _same(known: FrozenTrial, trial: FrozenTrial) -> bool:
    if known.params != trial.params or known.state != trial.state:
        return False
    if known.value is None or trial.value is None:
        return known.value is trial.value
    return math.isclose(known.value, trial.value, abs_tol=1e-9)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Damage done to the file while it is in use, in our words instead of Optuna's."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise CacheError(
            f"the journal {path} was damaged while it was being written ({error}); run again: it is then moved aside, "
            "a new one is begun, and every answer comes from the cache"
        ) from error


def open_journal(path: Path) -> JournalStorage:
    """Optuna storage in one file of JSON lines; made when it is not there, mended when its last line is half a line.

    A journal with a damaged line is moved aside, with a `CacheWarning`, and a new one takes its place.

    Raises:
        CacheError: The file is no journal and never was, or cannot be written.
    """
    lock = _ProcessLock(path.with_name(path.name + ".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _held(lock):
            _mend(path)
            _check(path)
        backend = JournalFileBackend(str(path), lock_obj=lock)
        if isinstance(backend, BaseJournalSnapshot):
            raise CacheError("this version of Optuna pickles snapshots of journal files; expected one that does not")
        try:
            return JournalStorage(backend)
        except _UNREADABLE as error:  # lines that are whole and tell of studies or trials that are not there
            with _held(lock):
                _move_aside(path, f"{type(error).__name__}: {error}")
            return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except (OSError, *_UNREADABLE) as error:
        raise CacheError(
            f"got {path} as the journal, which cannot be used ({type(error).__name__}: {error}); delete it, or name "
            "another file"
        ) from error


def _mend(path: Path) -> None:
    """Cut off what follows the last line end."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logger.warning("%s: the last line was only half written; it is cut off", path)
            file.truncate(whole)


def _check(path: Path) -> None:
    """Move the file aside if one of its lines is damaged: Optuna itself stumbles over it only some writes later.

    Raises:
        ValueError: Not one line is, or was, a journal's: it is somebody's file, and stays where it is.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    damaged = [i for i, line in enumerate(lines, start=1) if not _is_entry(line)]
    if not damaged:
        return
    if not any(line.startswith(_BEGINNING) or not line.strip(b"\0") for line in lines):
        raise ValueError("no line of it is one of Optuna's journal")
    _move_aside(path, f"line {damaged[0]} of {len(lines)} is not JSON as Optuna writes it")


def _is_entry(line: bytes) -> bool:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(entry, dict) and isinstance(entry.get("op_code"), int) and "worker_id" in entry


def _move_aside(path: Path, why: str) -> None:
    numbers = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    target = next(one for n in numbers if not (one := path.with_name(f"{path.name}.damaged{n}")).exists())
    path.replace(target)
    message = (
        f"the journal {path} is damaged ({why}); it was moved to {target.name} and a new one is begun: nothing is lost "
        "but the record of earlier trials, answers come from the cache"
    )
    try:
        warnings.warn(message, CacheWarning, stacklevel=2)
    except CacheWarning:  # warnings are errors here; a by-product still ends no run
        logger.warning("%s", message)


@contextmanager
def _held(lock: _ProcessLock) -> Iterator[None]:
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _ProcessLock(BaseJournalFileLock):
    """A lock that lapses with the process that holds it; Optuna's own keep a killed one's for half a minute."""

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(path)

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()
