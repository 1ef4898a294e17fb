"""Gateway, cache and ledger against a small model of what they promise, with a fault before any step.

The provider answers the same question differently each time, so whoever pays twice is seen. Promised:

* an answer that arrived is replayed, word for word, for as long as the disk took it and nobody damaged it;
* the provider sees exactly the requests that are booked, and never more than the ceiling;
* a failure is an error of ours, never an answer; what may have been billed is booked, the rest is given back;
* whatever happens to the files, the next call answers, or the run ends with one clear error.

    FUZZ=1 pytest tests/fuzz     two thousand walks of up to fifty steps instead of a few
"""

import os
import shutil
import sqlite3
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import diskcache
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from copa_harness.errors import BudgetExhausted, ProviderError, ProviderTimeoutError, ServerFailureError
from copa_harness.lm.budget.ledger import whole_run
from copa_harness.lm.cache.store import CacheWarning, ResponseCache
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.results import Budget

CEILING = 30

QUESTIONS = st.sampled_from([f"question {number}" for number in range(6)])


class GatewayMachine(RuleBasedStateMachine):
    """Sessions of one run, one after the other, over one folder."""

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp(prefix="copa-fuzz-"))
        self.n_asked = self.n_booked = 0
        self.stored, self.doubtful = {}, set()  # the answer that was given last; whether a fault may have eaten it
        self.failure, self.disk_is_full, self.clock = None, False, patch("time.time", time.time)
        self.clock.start()
        self.open()

    def open(self):
        self.run = whole_run(Budget(calls=CEILING), directory=self.folder, run_id="r")
        self.ledger = self.run.__enter__()
        self.session = open_scope("t")
        self.scope = self.session.__enter__()
        self.cache = ResponseCache(self.folder / "responses")
        self.lm = ScriptedLM(self.answer, gateway=Gateway(cache=self.cache), fingerprint="w")

    def close(self):
        self.cache.close()
        self.session.__exit__(None, None, None)
        self.run.__exit__(None, None, None)

    def teardown(self):
        if hasattr(self, "run"):
            self.close()
            self.clock.stop()
            shutil.rmtree(self.folder)

    def answer(self, messages):
        self.n_asked += 1
        if self.failure is not None:
            raise self.failure
        return f"{messages[-1]['content']}: answer {self.n_asked}"

    # -- steps

    @rule(question=QUESTIONS)
    def ask(self, question):
        before, full = self.n_asked, self.n_booked >= CEILING
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CacheWarning)
                with patch.object(diskcache.Cache, "set", self.refuse if self.disk_is_full else diskcache.Cache.set):
                    (text,) = self.lm(question)
        except BudgetExhausted:
            assert full
            assert self.n_asked == before
            assert question not in self.stored or question in self.doubtful
            return
        except ProviderError as error:
            assert self.n_asked == before + 1
            assert question not in self.stored or question in self.doubtful
            self.n_booked += error.billed is not False
            return
        assert text.startswith(question + ":")
        if self.n_asked == before:
            assert text == self.stored[question]
            return
        assert self.n_asked == before + 1
        assert self.failure is None
        assert question not in self.stored or question in self.doubtful
        self.n_booked += 1
        self.stored[question] = text
        self.doubtful.discard(question)
        if self.disk_is_full:
            self.doubtful.add(question)  # kept by this process only

    @rule(
        failure=st.sampled_from([None, ServerFailureError("boom"), ProviderTimeoutError("late"), ConnectionError("no")])
    )
    def the_provider_fails_or_recovers(self, failure):
        self.failure = failure

    @rule(full=st.booleans())
    def the_disk_fills_or_empties(self, full):
        self.disk_is_full = full

    @rule(years=st.sampled_from([-30, -1, 1, 30]))
    def the_clock_jumps(self, years):
        real = time.monotonic
        self.clock.stop()
        self.clock = patch("time.time", lambda: 1.7e9 + real() + years * 3.15e7)
        self.clock.start()

    @rule()
    def a_new_session_begins(self):
        self.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheWarning)
            self.open()

    @precondition(lambda self: self.stored)
    @rule(data=st.data(), junk=st.one_of(st.none(), st.binary(max_size=40), st.text(max_size=9), st.integers(-9, 9)))
    def a_row_is_damaged(self, data, junk):
        self.close()
        database = self.folder / "responses" / "answers" / "cache.db"
        # It may be damaged already; what sqlite3 says of a damaged schema may be no text.
        with suppress(sqlite3.DatabaseError, UnicodeDecodeError), sqlite3.connect(database) as sql:
            rows = [row for (row,) in sql.execute("SELECT rowid FROM Cache")]
            if rows:
                column = data.draw(st.sampled_from(["value", "key", "mode", "filename"]))
                row = data.draw(st.sampled_from(rows))
                sql.execute(f"UPDATE OR IGNORE Cache SET {column} = ? WHERE rowid = ?", (junk, row))
        sql.close()
        self.doubtful |= set(self.stored)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheWarning)
            self.open()

    @rule(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
    def the_database_is_damaged(self, place, flip, cut):
        self.close()
        path = self.folder / "responses" / "answers" / "cache.db"
        data = bytearray(path.read_bytes())
        at = int(place * len(data))
        data[at] ^= flip
        path.write_bytes(data[:at] if cut else data)
        self.doubtful |= set(self.stored)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheWarning)
            self.open()

    @rule()
    def another_process_dies_while_it_asks(self):
        if self.n_booked < CEILING:
            with patch("copa_harness.lm.budget.ledger.os.getpid", lambda: 2**22 + 7):  # nobody's
                other = type(self.ledger)(self.folder, "r", budget=Budget(calls=CEILING))
                other.reserve(self.lm.engine.worst_case(None, self.scope.bounds))
                other.close()
            self.n_booked += 1  # it may have been billed

    def refuse(self, *_, **__):
        raise sqlite3.OperationalError("database or disk is full")

    # -- what holds always

    @invariant()
    def the_books_hold_what_was_asked(self):
        if hasattr(self, "run"):
            assert self.ledger.spent.calls + self.ledger.reserved.calls == self.n_booked <= CEILING


GatewayMachine.TestCase.settings = settings(
    max_examples=2000 if os.environ.get("FUZZ") else 15,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
test_any_walk_keeps_the_promises = GatewayMachine.TestCase
