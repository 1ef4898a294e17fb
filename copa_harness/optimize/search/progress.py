"""Progress of an optimization in one line now and then: phase, trial, incumbent with interval, calls, time to go.

    p: trial 14, best 0.880 [0.70, 0.96] on 25 rows, 231 of 400 calls, 12 s, at most about 9 s to go

Lines are limited by time, so a log of a long run stays readable; there are no control characters, so a CI log shows
what a terminal shows. Where no trial ends for a while (an opening, a training, another optimizer) a line comes all the
same: a CI job that says nothing is taken for dead.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from copa_harness.formatting import counted, duration
from copa_harness.judge.intervals import mean_interval
from copa_harness.lm.budget.scope import Scope

logger = logging.getLogger("copa_harness")

EVERY_S = 15.0
"""Seconds between two lines, unless something begins or ends."""


def titled(title: str, write: Callable[[str], None] | None) -> Callable[[str], None] | None:
    """Where to write lines so that each begins with `title: `; None where nobody listens."""
    return None if write is None else lambda line: write(f"{title}: {line}")


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
        self._lock = threading.Lock()
        self._phase, self._number, self._ceiling = "baseline", 0, math.inf
        self._scores: tuple[float | None, ...] = ()
        self._doing = ""

    def trial(self, phase: str, number: int, *, scores: Sequence[float | None], ceiling: float = math.inf) -> None:
        """A trial has ended; says so when the last line is long enough ago.

        Args:
            phase: What is running.
            number: Trials of the phase so far.
            scores: The incumbent's, one per validation example seen.
            ceiling: Calls at which the phase ends, counted from the beginning of the run.
        """
        self.at(phase, scores=scores, number=number, ceiling=ceiling)
        self.tick()

    def at(self, phase: str, *, scores: Sequence[float | None], number: int = 0, ceiling: float = math.inf) -> None:
        """What is running now, for the lines that follow; as `trial`, and no trial for the number 0."""
        self._phase, self._number, self._scores, self._ceiling = phase, number, tuple(scores), ceiling

    def tick(self) -> None:
        """A line on what is running, if the last one is long enough ago."""
        now = self._clock()
        with self._lock:
            if now - self._last < self._every_s:
                return
            self._last = now
        trial = f"trial {self._number}, " if self._number else ""
        calls = self._calls(min(self._ceiling, self._budget), now)
        if self._doing:  # what takes the time is no call: their number says nothing of the time to go
            calls = f"{calls.split(', at most')[0]}, {self._doing}"
        self.say(f"{self._phase}: {trial}{incumbent_text(self._scores)}, {calls}")

    def doing(self, what: str) -> None:
        """Something other than calls takes the time now, a training for instance; "" when it is over."""
        self._doing = what

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """While the block runs, lines come also when nothing ends."""
        over = threading.Event()

        def tick() -> None:
            while not over.wait(min(1.0, self._every_s)):
                self.tick()

        thread = threading.Thread(target=tick, name="copa-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

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
            return f"{used:,} calls, {duration(spent_s, rough=True)}"
        to_go = spent_s * max(0.0, ceiling - used) / used if used else math.nan
        eta = "" if math.isnan(to_go) else f", at most about {duration(to_go, rough=True)} to go"
        return f"{used:,} of {ceiling:,.0f} calls, {duration(spent_s, rough=True)}{eta}"


def incumbent_text(scores: Sequence[float | None]) -> str:
    """`best 0.880 [0.70, 0.96] on 25 rows`, or that there is none yet."""
    known = [score for score in scores if score is not None]
    if not known:
        return "no score yet"
    interval, rows = mean_interval(known), counted(len(known), "row")
    return f"best {sum(known) / len(known):.3f} [{interval.low:.2f}, {interval.high:.2f}] on {rows}"
