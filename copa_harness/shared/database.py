"""The database that machines share: statements that outlast a lost connection, who lives, and rows made by one of many.

Every statement can be repeated without harm, so one whose connection was lost is simply sent again, until the database
has been away for `WAIT_S` seconds. Every process that claims something is an *owner* and renews its beat in the
database every `BEAT_S` seconds. Who waits for an owner watches its beat, on a clock of its own: one that stays the same
for `LEASE_S` seconds without any statement of the watcher failing meanwhile belongs to a dead process. So neither
clocks that differ nor an outage of the database make anybody seem dead. Its claims then lapse, and what it had reserved
counts as spent; all in one statement.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from copa_harness.credentials import mask_known
from copa_harness.errors import CacheError, ConfigurationError
from copa_harness.lm.budget.cost import COST_FIELDS
from copa_harness.lm.cache.locks import fork_count
from copa_harness.lm.gateway import SingleFlight

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine

WAIT_S = 60.0
"""Seconds a lost database is waited for."""

LEASE_S = 20.0
"""Seconds without a beat after which an owner is dead."""

BEAT_S = 4.0

_POLL_S = (0.005, 0.2)

_NEVER_MENDS = ("authentication failed", "does not exist", "no password supplied", "could not translate host name")
"""In the message of a connection that is refused for good, if it is the first."""

_CONNECTION = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds; a partition is noticed within a lease
    "prepare_threshold": None,  # works behind a pooler too
    "application_name": "copa-harness",
}

_SUMMED = [f"{kind}_{name}" for kind in ("spent", "reserved") for name in COST_FIELDS]
_SPENT = ", ".join(f"{name} bigint NOT NULL DEFAULT 0" for name in _SUMMED)
_AMOUNTS = ", ".join(f"{name} bigint NOT NULL" for name in COST_FIELDS)

_TABLES = f"""DO $$ BEGIN
PERFORM pg_advisory_xact_lock(20261129);
CREATE TABLE IF NOT EXISTS copa_owners (owner text PRIMARY KEY, beat bigint NOT NULL,
    beaten timestamptz NOT NULL DEFAULT now());
DELETE FROM copa_owners WHERE beaten < now() - interval '1 day';
CREATE TABLE IF NOT EXISTS copa_rows (kind text, key text, value bytea, owner text,
    stored timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (kind, key));
CREATE INDEX IF NOT EXISTS copa_rows_owner ON copa_rows (owner) WHERE owner IS NOT NULL;
CREATE TABLE IF NOT EXISTS copa_runs (run text PRIMARY KEY, began timestamptz NOT NULL DEFAULT now(),
    ceilings text NOT NULL, {_SPENT});
CREATE TABLE IF NOT EXISTS copa_reservations (number bigint PRIMARY KEY, run text NOT NULL, owner text NOT NULL,
    {_AMOUNTS});
END $$"""

_BEAT = """INSERT INTO copa_owners (owner, beat) VALUES (%(owner)s, %(beat)s)
ON CONFLICT (owner) DO UPDATE SET beat = excluded.beat, beaten = now()"""

_SUMS = ", ".join(f"sum({name}) AS {name}" for name in COST_FIELDS)
_MOVED = ", ".join(f"spent_{n} = spent_{n} + sums.{n}, reserved_{n} = reserved_{n} - sums.{n}" for n in COST_FIELDS)

_BURY = f"""WITH stopped AS (DELETE FROM copa_owners WHERE owner = %(owner)s AND beat = %(beat)s RETURNING owner),
dead AS (SELECT owner FROM stopped UNION ALL
    SELECT %(owner)s::text WHERE NOT EXISTS (SELECT FROM copa_owners WHERE owner = %(owner)s)),
unmade AS (DELETE FROM copa_rows USING dead WHERE copa_rows.owner = dead.owner AND value IS NULL),
lost AS (DELETE FROM copa_reservations USING dead WHERE copa_reservations.owner = dead.owner
    RETURNING copa_reservations.*),
sums AS (SELECT run, {_SUMS} FROM lost GROUP BY run)
UPDATE copa_runs SET {_MOVED} FROM sums WHERE copa_runs.run = sums.run"""

_CLAIM = """INSERT INTO copa_rows (kind, key, owner) VALUES (%(kind)s, %(key)s, %(owner)s)
ON CONFLICT DO NOTHING RETURNING true"""

_CLAIMED = """SELECT value IS NULL, copa_rows.owner, beat FROM copa_rows LEFT JOIN copa_owners USING (owner)
WHERE kind = %(kind)s AND key = %(key)s"""

_OFFER = """INSERT INTO copa_rows (kind, key, value) VALUES (%(kind)s, %(key)s, %(value)s)
ON CONFLICT (kind, key) DO UPDATE SET value = coalesce(copa_rows.value, excluded.value), owner = NULL RETURNING value"""

_PUT = """INSERT INTO copa_rows (kind, key, value) VALUES (%(kind)s, %(key)s, %(value)s)
ON CONFLICT (kind, key) DO UPDATE SET value = excluded.value, owner = NULL, stored = now()"""

_ROW = "kind = %(kind)s AND key = %(key)s"


def checked_url(text: str) -> URL:
    """The address of a database with its driver; `ConfigurationError` if it is none, or the extra not installed."""
    try:
        import psycopg  # noqa: F401 - whether it is there
        from sqlalchemy import make_url
        from sqlalchemy.exc import ArgumentError

        return make_url(text).set(drivername="postgresql+psycopg")
    except ImportError as error:
        told = f"--copa-shared needs {error.name}, which is not installed; pip install 'copa-harness[shared]'"
        raise ConfigurationError(told) from error
    except (ArgumentError, ValueError):  # a port that is no number; the message would have the password
        told = "--copa-shared: got no address; expected postgresql://user@host:port/database"
        raise ConfigurationError(told) from None


class SharedDatabase:
    """A connection to the database, by as many threads as like. It notices a fork: the child is an owner of its own.

    Args:
        url: `postgresql://...`.

    Raises:
        ConfigurationError: See `checked_url`.
        CacheError: The database cannot be reached, or used.
    """

    _engine: Engine
    _owner: str
    _beating: threading.Event | None  # ends it
    _beater: threading.Thread
    _lost_s: float | None  # since when the database is away

    def __init__(self, url: str) -> None:
        self.url = checked_url(url)
        self._forks, self._was_there = -1, False
        self.execute(_TABLES)

    def __str__(self) -> str:
        return str(self.url.render_as_string(hide_password=True))

    @property
    def owner(self) -> str:
        """Who this process is: its beat goes on from the first time this is asked."""
        self._connected()
        with self._lock:
            if self._beating is None:
                self.execute(_BEAT, owner=self._owner, beat=secrets.randbits(60))
                self._beating = threading.Event()
                args = (self._owner, self._beating)
                self._beater = threading.Thread(target=self._keep_beating, args=args, daemon=True)
                self._beater.start()
            return self._owner

    def close(self) -> None:
        """Give back what this process holds: claims lapse, reservations count as spent. It may be used again."""
        self._connected()
        if self._beating is not None:
            self._beating.set()
            self._beater.join()  # its last beat must not come after what follows
            self._beating = None
            try:
                self.execute("DELETE FROM copa_owners WHERE owner = %(owner)s", owner=self._owner)
                self.execute(_BURY, owner=self._owner, beat=None)
            except CacheError:
                pass  # the others find out, a lease later
        self._engine.dispose()

    # -- statements

    def execute(self, statement: str, **values: Any) -> list[Any]:
        """The rows a statement gives. It may be sent more than once, so sending it again must do no harm.

        Raises:
            CacheError: The database was not there for `WAIT_S` seconds, or cannot do it.
            IntegrityError: A key is there already.
        """
        from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError, SQLAlchemyError
        from sqlalchemy.exc import TimeoutError as NoConnectionError

        pause_s = _POLL_S[0]
        while True:
            try:
                with self._connected().connect() as sql:
                    result = sql.exec_driver_sql(statement, values or None)
                    rows = list(result.fetchall()) if result.returns_rows else []
                    self._lost_s, self._was_there = None, True
                    return rows
            except IntegrityError:
                raise
            except (OperationalError, InterfaceError, NoConnectionError) as error:
                self._n_lost += 1
                lost_s = self._lost_s = self._lost_s or time.monotonic()
                text = mask_known(str(error.__cause__ or error).strip(), [str(self.url.password or "")])
                if not self._was_there and any(sign in text for sign in _NEVER_MENDS):
                    raise CacheError(f"the shared database {self} cannot be used: {text}") from None
                if time.monotonic() - lost_s > WAIT_S:
                    raise CacheError(
                        f"the shared database {self} has not answered for {WAIT_S:g} s ({text}). Nothing is lost: what "
                        "was paid is kept there or in this machine's cache directory; run again when it is back"
                    ) from None
            except SQLAlchemyError as error:
                raise CacheError(f"the shared database {self} cannot be used: {error.__cause__ or error}") from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)

    def _connected(self) -> Engine:
        if self._forks != fork_count():
            self._begin()
        return self._engine

    def _begin(self) -> None:
        from sqlalchemy import create_engine

        if self._forks >= 0:
            self._engine.dispose(close=False)  # the parent's
        self._engine = create_engine(
            self.url,
            isolation_level="AUTOCOMMIT",
            pool_size=2,
            max_overflow=6,
            pool_timeout=WAIT_S,
            connect_args=_CONNECTION,
        )
        self._owner, self._lock = secrets.token_hex(12), threading.Lock()
        self._beating = None
        self._seen: dict[str, tuple[int | None, int, float]] = {}
        self._n_lost, self._lost_s = 0, None
        self._claims: set[tuple[str, str]] = set()
        self._alone = SingleFlight()
        self._forks = fork_count()

    # -- who lives

    def _keep_beating(self, owner: str, ended: threading.Event) -> None:
        while not ended.wait(BEAT_S):
            try:
                self.execute(_BEAT, owner=owner, beat=secrets.randbits(60))
            except CacheError:
                continue  # whoever needs the database says so

    def is_dead(self, owner: str, beat: int | None) -> bool:
        """Whether an owner whose beat is seen to be `beat` now has died; if so, what it held is given back.

        To be asked again and again while one waits for it.
        """
        known = self._seen.get(owner)
        if known is None or known[:2] != (beat, self._n_lost):
            self._seen[owner] = (beat, self._n_lost, time.monotonic())
            return False
        if time.monotonic() - known[2] <= LEASE_S:
            return False
        self.execute(_BURY, owner=owner, beat=beat)
        self._seen.pop(owner, None)
        return True

    # -- rows

    def get(self, kind: str, key: str) -> bytes | None:
        """The value of a row, None if it has none (yet)."""
        if (kind, key) in self._claims:
            return None  # ours to make
        found = self.execute(f"SELECT value FROM copa_rows WHERE {_ROW}", kind=kind, key=key)
        return bytes(found[0][0]) if found and found[0][0] is not None else None

    def offer(self, kind: str, key: str, value: bytes) -> bytes:
        """Give a row this value unless it has one; what it has then. A claim on it ends."""
        ((standing,),) = self.execute(_OFFER, kind=kind, key=key, value=value)
        self._claims.discard((kind, key))
        return bytes(standing)

    def put(self, kind: str, key: str, value: bytes) -> None:
        """Give a row this value, in place of an earlier one."""
        self.execute(_PUT, kind=kind, key=key, value=value)

    def get_all(self, kind: str, *, since: str = "") -> list[bytes]:
        """The values of the rows of a kind, in the order of their keys, from a key on."""
        statement = "SELECT value FROM copa_rows WHERE kind = %(kind)s AND key >= %(since)s ORDER BY key"
        return [bytes(value) for (value,) in self.execute(statement, kind=kind, since=since)]

    def drop(self, kind: str, key: str, value: bytes) -> None:
        """Remove a row that has this value."""
        self.execute(f"DELETE FROM copa_rows WHERE {_ROW} AND value = %(value)s", kind=kind, key=key, value=value)

    @contextmanager
    def claimed(self, kind: str, key: str) -> Iterator[None]:
        """While the block runs, no thread of any process is in one for this row, unless the row has a value.

        A killed process's claim lapses; see the module.
        """
        row = {"kind": kind, "key": key, "owner": self.owner}
        with self._alone.alone(f"{kind} {key}"):
            self._wait_for(row)
            try:
                yield
            finally:
                if (kind, key) in self._claims:
                    self._claims.discard((kind, key))
                    self.execute(f"DELETE FROM copa_rows WHERE {_ROW} AND owner = %(owner)s AND value IS NULL", **row)

    def _wait_for(self, row: Mapping[str, str]) -> None:
        pause_s = _POLL_S[0]
        while True:
            if self.execute(_CLAIM, **row):
                break
            found = self.execute(_CLAIMED, **row)
            if found:
                is_claim, owner, beat = found[0]
                if not is_claim:
                    return
                if owner == row["owner"]:
                    break  # the claim arrived before its connection was lost
                if not self.is_dead(owner, beat):
                    time.sleep(pause_s)
                    pause_s = min(1.5 * pause_s, _POLL_S[1])
        self._claims.add((row["kind"], row["key"]))
