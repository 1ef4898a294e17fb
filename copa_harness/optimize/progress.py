"""Progress of an optimization in one line now and then: phase, trial, incumbent with interval, calls, time to go.

    p: trial 14, best 0.880 [0.70, 0.96] on 25 rows, 231 of 400 calls, 12 s, at most about 9 s to go

Lines are limited by time, so a log of a long run stays readable; there are no control characters, so a CI log shows
what a terminal shows. Knows numbers and a place to write; knows nothing of studies, programs or pytest.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

from copa_harness.judge.intervals import mean_interval
from copa_harness.lm.scope import Scope

logger = logging.getLogger("copa_harness")

EVERY_S = 15.0
"""Seconds between two lines, unless something begins or ends."""


class Progress:
    """Says how far a run is.

    Args:
        scope: Whose calls are counted.
        write: Takes one finished line, besides the log; None writes to the log alone.
        every_s: Seconds between two lines.
        clock: Monotonic seconds; a parameter for tests.
    """

    def __init__(
        self,
        scope: Scope,
        *,
        write: Callable[[str], None] | None = None,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scope, self._write, self._every_s, self._clock = scope, write, every_s, clock
        self._started = self._last = clock()

    def trial(self, phase: str, number: int, *, scores: Sequence[float | None], ceiling: float = math.inf) -> None:
        """A trial has ended; says so when the last line is long enough ago.

        Args:
            phase: What is running.
            number: Trials of the phase so far.
            scores: The incumbent's, one per validation example seen.
            ceiling: Calls at which the phase ends, counted from the beginning of the run.
        """
        now = self._clock()
        if now - self._last < self._every_s:
            return
        self._last = now
        self.say(f"{phase}: trial {number}, {incumbent_text(scores)}, {self._calls(min(ceiling, self._budget), now)}")

    def say(self, text: str) -> None:
        """One line, at once."""
        line = " ".join(text.split())
        logger.info("%s", line)
        if self._write is not None:
            self._write(line)

    @property
    def _budget(self) -> float:
        return self._scope.budget.calls

    def _calls(self, ceiling: float, now: float) -> str:
        used, spent_s = self._scope.charged_calls, now - self._started
        if math.isinf(ceiling):
            return f"{used:,} calls, {duration_text(spent_s)}"
        to_go = spent_s * max(0.0, ceiling - used) / used if used else math.nan
        eta = "" if math.isnan(to_go) else f", at most about {duration_text(to_go)} to go"
        return f"{used:,} of {ceiling:,.0f} calls, {duration_text(spent_s)}{eta}"


def incumbent_text(scores: Sequence[float | None]) -> str:
    """`best 0.880 [0.70, 0.96] on 25 rows`, or that there is none yet."""
    known = [score for score in scores if score is not None]
    if not known:
        return "no score yet"
    interval = mean_interval(known)
    return f"best {sum(known) / len(known):.3f} [{interval.low:.2f}, {interval.high:.2f}] on {len(known)} rows"


def duration_text(seconds: float) -> str:
    """`48 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
