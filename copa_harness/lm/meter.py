"""The meter of one run: what was spent and what failed, phase by phase.

The phase belongs to the meter, not to a thread: DSPy's worker threads do not inherit context variables. Knows nothing
of budgets, requests or engines.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

from copa_harness.results import Phase, Usage

_booked_as: ContextVar[Phase | None] = ContextVar("copa_booked_as", default=None)


@contextmanager
def booked_as(phase: Phase) -> Iterator[None]:
    """Stamp every call of this thread (and task) inside the block with `phase`, whatever phase the scope is in.

    For calls that hide in something else: what a metric asks a judge model is booked as `Phase.METRIC`.
    """
    token = _booked_as.set(phase)
    try:
        yield
    finally:
        _booked_as.reset(token)


class Meter:
    """Usage per phase and failures per kind. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._phases: list[Phase] = []
        self._segment_start_s = 0.0
        self._usages: dict[Phase, Usage] = {}
        self._failures: dict[str, int] = {}
        self._first_failures: dict[str, str] = {}

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Stamp every call made inside the block, from whatever thread, with `phase`.

        The previous phase is restored afterwards. Wall time is charged to the innermost phase only, so the
        phases of a scope never count a second twice. Phases nest; two threads must not open phases of one
        scope side by side.
        """
        with self._lock:
            self._close_segment()
            self._phases.append(phase)
            self._add(phase, Usage())
        try:
            yield
        finally:
            with self._lock:
                self._close_segment()
                self._phases.pop()

    @property
    def current_phase(self) -> Phase:
        """The phase calls are stamped with now; `Phase.EVALUATE` outside every `phase` block."""
        if (override := _booked_as.get()) is not None:
            return override
        with self._lock:
            return self._phases[-1] if self._phases else Phase.EVALUATE

    def usage(self) -> Usage:
        """Everything spent so far, all phases together, the running one included."""
        return sum(self.phase_usages().values(), Usage())

    def phase_usages(self) -> dict[str, Usage]:
        """What each phase spent, in the order the phases were first used."""
        with self._lock:
            self._close_segment()
            return {phase.value: usage for phase, usage in self._usages.items()}

    def add_train_steps(self, n: int, wall_s: float) -> None:
        """Book `n` optimizer steps of training that took `wall_s` seconds in the current phase.

        Inside a `phase` block the seconds are already measured by the block and are not added again.
        """
        with self._lock:
            self._add(self.current_phase, Usage(train_steps=n, wall_s=0.0 if self._phases else wall_s))

    def add_payments(self, other: Meter) -> None:
        """Book what another meter paid, its replays left out: it bought for this one, in the same phases."""
        for phase, usage in other.phase_usages().items():
            with self._lock:
                self._add(Phase(phase), replace(usage, cached_calls=0, wall_s=0.0))

    def _close_segment(self) -> None:
        now_s = time.monotonic()
        if self._phases:
            self._add(self._phases[-1], Usage(wall_s=now_s - self._segment_start_s))
        self._segment_start_s = now_s

    def _add(self, phase: Phase, usage: Usage) -> None:
        self._usages[phase] = self._usages.get(phase, Usage()) + usage

    @property
    def failures(self) -> dict[str, int]:
        """How many attempts failed, by kind (`rate limit`, `timeout`, ...), those that a retry mended included."""
        with self._lock:
            return dict(self._failures)

    @property
    def first_failures(self) -> dict[str, str]:
        """The traceback of the first failure of each kind."""
        with self._lock:
            return dict(self._first_failures)

    def note_failure(self, kind: str, traceback: str) -> None:
        """Count a failed attempt, keeping the first traceback of its kind."""
        with self._lock:
            self._failures[kind] = self._failures.get(kind, 0) + 1
            self._first_failures.setdefault(kind, traceback)
