"""What a session keeps on this machine, or, with `--copa-shared`, in the database that several machines share."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from copa_harness.session.options import Settings
from copa_harness.shared_files import SharedFiles

if TYPE_CHECKING:
    from copa_harness.lm.budget.ledger import Ledger
    from copa_harness.shared.database import SharedDatabase


def opened_database(settings: Settings) -> SharedDatabase | None:
    """The database of several machines, None where everything stays on this one; errors as `SharedDatabase` has."""
    if settings.shared is None:
        return None
    from copa_harness.shared.database import SharedDatabase

    return SharedDatabase(settings.shared)


def opened_files(settings: Settings, database: SharedDatabase | None) -> SharedFiles | None:
    """Where machines share folders, None where they share none; errors as `SharedFiles` has.

    With a database only one of them at a time makes what it would share.
    """
    if settings.shared_files is None:
        return None
    alone = None if database is None else partial(database.claimed, "training")
    return SharedFiles(settings.shared_files, alone=alone)


def ledger_of(settings: Settings, database: SharedDatabase | None) -> Ledger:
    """The ledger of the run, for which there must be a ceiling; errors as `Ledger` has."""
    assert settings.total_budget is not None
    if database is None:
        from copa_harness.lm.budget.ledger import RunLedger

        return RunLedger(settings.cache_dir, settings.run_id, budget=settings.total_budget)
    from copa_harness.shared.ledger import SharedLedger

    return SharedLedger(database, settings.run_id, budget=settings.total_budget)
