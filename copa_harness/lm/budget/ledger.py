"""The ledger of a whole run: one account shared by every process of it.

It counts real payments, not distinct requests: what is bought by any pytest-xdist worker is reserved here before it is
paid, in one transaction that no other process can interleave with. The reservations of a process that died count as
spent, since the provider may have billed them. On one machine every run has a SQLite file of its own (`runs/<run
id>.sqlite`), so a run that is started again begins at zero and pays for what is missing only; several machines keep
theirs in a database (`shared/ledger.py`).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sqlite3
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

from copa_harness.errors import CacheError, ConfigurationError
from copa_harness.lm.budget.cost import COST_FIELDS, Ceilings, Cost, OverBudget
from copa_harness.results import Budget

RUNS_FOLDER = "runs"
"""Folder of the ledgers inside the cache directory."""

KEPT_S = 7 * 24 * 3600.0
"""Ledgers of runs that began longer ago are removed when a new run begins."""

_POLL_S = (0.005, 0.1)
_BUSY_TIMEOUT_S = 60.0
_AMOUNTS = ", ".join(f"{name} INTEGER NOT NULL" for name in COST_FIELDS)
_SUMS = ", ".join(f"COALESCE(SUM({name}), 0)" for name in COST_FIELDS)
_CHECKS = "COALESCE(SUM(number + owner), 0), COALESCE(SUM(total), 0)"
_MARKS = ", ".join("?" * len(COST_FIELDS))

T = TypeVar("T")


class Ledger(ABC):
    """The account of one run. Threads and processes that open the same run id share it.

    Args:
        run_id: Names the run: letters, digits, `.`, `_` and `-`.
        budget: The ceilings, on real payments. The first process that opens the run writes them down; the others must
            bring the same.

    Attributes:
        began_s: When the run began, by this machine's monotonic clock, which all its processes share and nobody sets.
        n_refused: How often this process was refused something.

    Raises:
        ConfigurationError: The run id is no file name, or the run was opened with other ceilings.
        CacheError: The ledger cannot be written. Nothing may be spent without it.
    """

    began_s: float

    def __init__(self, run_id: str, *, budget: Budget) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", run_id) or run_id.startswith("."):
            raise ConfigurationError(f"got the run id {run_id!r}, expected up to 100 letters, digits, '.', '_' or '-'")
        self.run_id = run_id
        self.budget = budget
        self.ceilings = Ceilings.of(budget, calls=True)
        self.n_refused = 0

    def __deepcopy__(self, memo: dict[int, object]) -> Ledger:
        return self

    @property
    @abstractmethod
    def spent(self) -> Cost:
        """What is settled, by all processes together."""

    @property
    @abstractmethod
    def reserved(self) -> Cost:
        """What is reserved for calls in flight, by all processes together."""

    @property
    def remaining_s(self) -> float:
        """Seconds until nothing more may be bought."""
        return self.budget.seconds - (time.monotonic() - self.began_s)

    def reserve(self, cost: Cost) -> int:
        """As `Account.reserve`, also against the other processes of the run."""
        pause_s = _POLL_S[0]
        try:
            while True:
                if self.remaining_s <= 0:
                    elapsed_s = time.monotonic() - self.began_s
                    raise OverBudget("seconds", spent=elapsed_s, asked=0, ceiling=self.budget.seconds)
                number = self._try_reserve(cost)
                if number is not None:
                    return number
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _POLL_S[1])
        except OverBudget:
            self.n_refused += 1
            raise

    @abstractmethod
    def settle(self, number: int, cost: Cost) -> None:
        """As `Account.settle`."""

    def release(self, number: int) -> None:
        """As `Account.release`."""
        self.settle(number, Cost())

    @abstractmethod
    def close(self) -> None:
        """Let go of what it is kept in; it may be used again afterwards."""

    @abstractmethod
    def _try_reserve(self, cost: Cost) -> int | None:
        """The reservation's number; None while calls in flight stand in the way.

        Raises:
            OverBudget: It cannot fit.
        """

    def _check_ceilings(self, opened_with: str) -> None:
        if opened_with != (ours := json.dumps(self.budget.ceilings, sort_keys=True)):
            raise ConfigurationError(
                f"run {self.run_id!r} was opened with the ceilings {opened_with} and now with {ours}; expected the "
                "same --copa-total-budget in every process of a run"
            )


class RunLedger(Ledger):
    """The account of a run on one machine, in the folder `runs` of its cache directory. Arguments as for `Ledger`."""

    def __init__(self, directory: Path, run_id: str, *, budget: Budget) -> None:
        super().__init__(run_id, budget=budget)
        self.path = Path(directory) / RUNS_FOLDER / f"{run_id}.sqlite"
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        _remove_old(self.path.parent, but=self.path)
        self.began_s = self._transaction(self._begin)

    # -- the account

    @property
    def spent(self) -> Cost:
        """What is settled, by all processes together."""
        return self._transaction(lambda sql: self._sum(sql, "spent"))

    @property
    def reserved(self) -> Cost:
        """What is reserved for calls in flight, by all processes together."""
        return self._transaction(lambda sql: self._sum(sql, "reservations"))

    def settle(self, number: int, cost: Cost) -> None:
        """As `Account.settle`."""

        def settle(sql: sqlite3.Connection) -> None:
            sql.execute("DELETE FROM reservations WHERE number = ?", (number,))
            self._spend(sql, cost)

        self._transaction(settle)

    def close(self) -> None:
        """Close the database; it may be used again afterwards."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    # -- inside a transaction

    def _begin(self, sql: sqlite3.Connection) -> float:
        if (verdict := sql.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {verdict}")
        # SQLite does not see a number that changed on the disk: every row holds the sum of its numbers as well.
        sql.execute(
            "CREATE TABLE IF NOT EXISTS reservations "
            f"(number INTEGER PRIMARY KEY, owner INTEGER NOT NULL, {_AMOUNTS}, total INTEGER NOT NULL)"
        )
        sql.execute(f"CREATE TABLE IF NOT EXISTS spent (number INTEGER, owner INTEGER, {_AMOUNTS}, total INTEGER)")
        sql.execute("CREATE TABLE IF NOT EXISTS run (began_s REAL, ceilings TEXT, again TEXT)")
        ceilings = json.dumps(self.budget.ceilings, sort_keys=True)
        found = sql.execute("SELECT began_s, ceilings, again FROM run").fetchone()
        if found is None:
            began_s = time.monotonic()
            sql.execute("INSERT INTO run VALUES (?, ?, ?)", (began_s, ceilings, f"{began_s!r} {ceilings}"))
            self._insert(sql, "spent", number=0, owner=0, cost=Cost())
            return began_s
        if found[2] != f"{found[0]!r} {found[1]}":
            raise sqlite3.DatabaseError("it is damaged: what it says of the run does not agree")
        self._check_ceilings(found[1])
        return float(found[0])

    def _try_reserve(self, cost: Cost) -> int | None:
        return self._transaction(lambda sql: self._reserve(sql, cost))

    def _reserve(self, sql: sqlite3.Connection, cost: Cost) -> int | None:
        spent, reserved = self._sum(sql, "spent"), self._sum(sql, "reservations")
        self.ceilings.check(spent + cost, spent=spent, asked=cost)
        try:
            self.ceilings.check(spent + reserved + cost, spent=spent, asked=cost)
        except OverBudget:
            self._drop_dead_processes(sql)
            return None
        number = secrets.randbits(48)
        self._insert(sql, "reservations", number=number, owner=os.getpid(), cost=cost)
        return number

    def _insert(self, sql: sqlite3.Connection, table: str, *, number: int, owner: int, cost: Cost) -> None:
        row = (number, owner, *(getattr(cost, name) for name in COST_FIELDS))
        sql.execute(f"INSERT INTO {table} VALUES (?, ?, {_MARKS}, ?)", (*row, sum(row)))

    def _drop_dead_processes(self, sql: sqlite3.Connection) -> None:
        """Count the reservations of dead processes as spent: what they paid for may have been billed."""
        for (owner,) in sql.execute("SELECT DISTINCT owner FROM reservations").fetchall():
            if not _is_alive(owner):
                row = sql.execute(f"SELECT {_SUMS} FROM reservations WHERE owner = ?", (owner,)).fetchone()
                sql.execute("DELETE FROM reservations WHERE owner = ?", (owner,))
                self._spend(sql, Cost(*row))

    def _spend(self, sql: sqlite3.Connection, cost: Cost) -> None:
        changes = ", ".join(f"{name} = {name} + ?" for name in (*COST_FIELDS, "total"))
        amounts = [getattr(cost, name) for name in COST_FIELDS]
        sql.execute(f"UPDATE spent SET {changes}", (*amounts, sum(amounts)))

    def _sum(self, sql: sqlite3.Connection, table: str) -> Cost:
        n, others, total, *amounts = sql.execute(f"SELECT COUNT(*), {_CHECKS}, {_SUMS} FROM {table}").fetchone()
        if others + sum(amounts) != total or (table == "spent" and n != 1):
            raise sqlite3.DatabaseError("it is damaged: its amounts do not add up")
        return Cost(*amounts)

    # -- the database

    def _transaction(self, action: Callable[[sqlite3.Connection], T]) -> T:
        with self._lock:
            try:
                sql = self._connected()
                sql.execute("BEGIN IMMEDIATE")
                try:
                    result = action(sql)
                except BaseException:
                    sql.execute("ROLLBACK")
                    raise
                sql.execute("COMMIT")
                return result
            except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # the last, where a table has no name left
                raise self._unusable(error) from error

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None or self._pid != os.getpid():  # a forked child must not use its parent's
            self._connection = sqlite3.connect(
                self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._pid = os.getpid()
            # Survives the death of the process; only the loss of power could undo it, and that ends the run.
            self._connection.execute("PRAGMA synchronous = OFF")
            self._connection.execute("PRAGMA journal_mode = WAL")
            # A log in which a byte changed is dropped without a word: what it holds is always in the file as well.
            self._connection.execute("PRAGMA wal_autocheckpoint = 1")
        return self._connection

    def _unusable(self, error: Exception) -> CacheError:
        return CacheError(
            f"cannot keep the ledger of this run in {self.path}: {error}; a budget for the whole run is only kept on a "
            "disk that can be written: choose a folder with --copa-cache-dir, or drop the run's budget"
        )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


_current: Ledger | None = None


def current_ledger() -> Ledger | None:
    """The ledger of the run this process belongs to, or None outside `paid_by`."""
    return _current


@contextmanager
def whole_run(budget: Budget, *, directory: Path, run_id: str) -> Iterator[RunLedger]:
    """While the block runs, every payment of this process is held to the run's ceilings, in every scope.

    Args:
        budget: The ceilings on what all processes of the run pay together.
        directory: The cache directory.
        run_id: The same in every process of the run, another for every run (pytest-xdist: `testrunuid`).

    Errors as `paid_by` and `Ledger` have.
    """
    ledger = RunLedger(directory, run_id, budget=budget)
    with paid_by(ledger):
        yield ledger


@contextmanager
def paid_by(ledger: Ledger) -> Iterator[None]:
    """While the block runs, every payment of this process is held to the ledger's ceilings; it is closed at the end.

    Raises:
        ConfigurationError: A whole run is open in this process already.
    """
    global _current
    with closing(ledger):
        if _current is not None:
            raise ConfigurationError(f"a run is open already: {_current.run_id!r}; expected one at a time per process")
        _current = ledger
        try:
            yield
        finally:
            _current = None


def _remove_old(folder: Path, *, but: Path) -> None:
    """Remove ledgers of runs that are long over. Whatever else lies there stays, and what is in use: clocks jump."""
    try:
        for path in folder.glob("*.sqlite"):
            if path != but and time.time() - path.stat().st_mtime > KEPT_S and not _is_open(path):
                for file in folder.glob(f"{path.name}*"):
                    file.unlink()
    except OSError:
        return  # housekeeping only: the ledger itself says what is wrong with the folder


def _is_open(path: Path) -> bool:
    """Whether somebody has the database open: only without others may one leave its write-ahead log."""
    try:
        with closing(sqlite3.connect(path, timeout=0)) as sql:
            sql.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.Error as error:
        return "locked" in str(error)
    return False
