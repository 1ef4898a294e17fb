"""The ledger of a run that several machines pay for: a row of sums in the shared database, and one per reservation.

Reserving is one statement: it raises the sums if they stay under the ceilings and notes whose reservation it is. Under
its row's lock PostgreSQL looks at the ceilings again, so no two can both take the last of it. Seconds are counted from
when the run was opened by the database's clock.
"""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from copa_harness.lm.budget.cost import COST_FIELDS, Ceilings, Cost, amount_of
from copa_harness.lm.budget.ledger import Ledger
from copa_harness.results import Budget
from copa_harness.shared.database import SharedDatabase

_OPEN = """WITH made AS (INSERT INTO copa_runs (run, ceilings) VALUES (%(run)s, %(ceilings)s)
ON CONFLICT DO NOTHING RETURNING ceilings, began)
SELECT ceilings, extract(epoch FROM clock_timestamp() - began)::float FROM (
    SELECT * FROM made UNION ALL SELECT ceilings, began FROM copa_runs WHERE run = %(run)s) AS known"""

_COLUMNS = ", ".join(COST_FIELDS)
_VALUES = ", ".join(f"%({name})s" for name in COST_FIELDS)
_RAISED = ", ".join(f"reserved_{name} = reserved_{name} + %({name})s" for name in COST_FIELDS)
_SETTLED = ", ".join(
    f"reserved_{name} = reserved_{name} - mine.{name}, spent_{name} = spent_{name} + %({name})s" for name in COST_FIELDS
)

_SETTLE = f"""WITH mine AS (DELETE FROM copa_reservations WHERE number = %(number)s RETURNING *)
UPDATE copa_runs SET {_SETTLED} FROM mine WHERE copa_runs.run = mine.run"""


def _reserve(ceilings: Ceilings, cost: Cost) -> str:
    """The statement that reserves `cost` if it fits."""
    limits = ""
    for name in ("calls", "tokens", "input_tokens", "output_tokens", "picodollars", "train_steps"):
        ceiling, amount = getattr(ceilings, name), amount_of(cost, name)
        if ceiling is not None and amount:
            parts = ("input_tokens", "output_tokens") if name == "tokens" else (name,)
            total = " + ".join(f"spent_{part} + reserved_{part}" for part in parts)
            limits += f" AND {total} <= {ceiling - amount}"
    return f"""WITH fits AS (UPDATE copa_runs SET {_RAISED} WHERE run = %(run)s{limits} RETURNING run)
INSERT INTO copa_reservations (number, run, owner, {_COLUMNS})
SELECT %(number)s, run, %(owner)s, {_VALUES} FROM fits RETURNING number"""


class SharedLedger(Ledger):
    """The account of a run in a database. Arguments as for `Ledger`, and the database."""

    def __init__(self, database: SharedDatabase, run_id: str, *, budget: Budget) -> None:
        super().__init__(run_id, budget=budget)
        self._database = database
        ceilings = json.dumps(budget.ceilings, sort_keys=True)
        while not (found := database.execute(_OPEN, run=run_id, ceilings=ceilings)):
            pass  # another process opened it between the statement's two looks
        self._check_ceilings(found[0][0])
        self.began_s = time.monotonic() - found[0][1]

    @property
    def spent(self) -> Cost:
        """What is settled, by all processes together."""
        return self._sums("spent")

    @property
    def reserved(self) -> Cost:
        """What is reserved for calls in flight, by all processes together."""
        return self._sums("reserved")

    def settle(self, number: int, cost: Cost) -> None:
        """As `Account.settle`. A reservation of a process that was taken for dead is settled at its worst case."""
        self._database.execute(_SETTLE, number=number, **_amounts(cost))

    def close(self) -> None:
        """Nothing to do: the database belongs to whoever opened it."""

    def _try_reserve(self, cost: Cost) -> int | None:
        from sqlalchemy.exc import IntegrityError

        number = secrets.randbits(63)
        values = {"number": number, "run": self.run_id, "owner": self._database.owner, **_amounts(cost)}
        try:
            if self._database.execute(_reserve(self.ceilings, cost), **values):
                return number
        except IntegrityError:
            return number  # it had arrived before its connection was lost
        spent = self.spent
        self.ceilings.check(spent + cost, spent=spent, asked=cost)
        owners = f"SELECT DISTINCT owner, beat FROM copa_reservations LEFT JOIN copa_owners USING (owner) {_OF_THE_RUN}"
        for owner, beat in self._database.execute(owners, run=self.run_id):
            if owner != self._database.owner:
                self._database.is_dead(owner, beat)
        return None

    def _sums(self, kind: str) -> Cost:
        columns = ", ".join(f"{kind}_{name}" for name in COST_FIELDS)
        return Cost(*self._database.execute(f"SELECT {columns} FROM copa_runs {_OF_THE_RUN}", run=self.run_id)[0])


_OF_THE_RUN = "WHERE run = %(run)s"


def _amounts(cost: Cost) -> dict[str, Any]:
    return {name: getattr(cost, name) for name in COST_FIELDS}
