"""Progress of an optimization in one line now and then: phase, trial, incumbent with interval, calls, time to go.

    p: trial 14, best 0.880 [0.70, 0.96] on 25 rows, 231 of 400 calls, 12 s, at most about 9 s to go

Lines are limited by time, so a log of a long run stays readable; there are no control characters, so a CI log shows
what a terminal shows. Where no trial ends for a while (an opening, a training, another optimizer) a line comes all the
same: a CI job that says nothing is taken for dead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from copa_harness.evaluate.progress import ENOUGH_FOR_AN_ESTIMATE, Lines
from copa_harness.formatting import counted, duration
from copa_harness.judge.intervals import mean_interval
from copa_harness.lm.budget.scope import Scope


def titled(title: str, write: Callable[[str], None] | None) -> Callable[[str], None] | None:
    """Where to write lines so that each begins with `title: `; None where nobody listens."""
    return None if write is None else lambda line: write(type(line)(f"{title}: {line}"))


class Progress(Lines):
    """Says how far a run is. Arguments as for `Lines`."""

    def __init__(self, scope: Scope, **more: Any) -> None:
        super().__init__(scope, **more)
        self._phase, self._number, self._ceiling = "baseline", 0, math.inf
        self._scores: tuple[float | None, ...] = ()
        self._rows: tuple[int, int] | None = None
        self._doing, self._doing_since, self._elsewhere_s = "", 0.0, 0.0

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
        self._rows = None

    def scoring(self, n: int) -> Callable[[object], None]:
        """What is running scores so many rows; the function returned is to be called for each that is done."""
        self._rows = (0, n)

        def done(_: object) -> None:
            with self._lock:
                if self._rows is not None:
                    self._rows = (self._rows[0] + 1, self._rows[1])

        return done

    def _line(self, now: float) -> str:
        trial = f"trial {self._number}, " if self._number else ""
        state = incumbent_text(self._scores)
        if self._rows is not None:
            state = f"{self._rows[0]:,} of {counted(self._rows[1], 'row')}"
        return f"{self._phase}: {trial}{state}, {self._calls(now)}"

    def doing(self, what: str) -> None:
        """Something other than calls takes the time now, a training for instance; "" when it is over."""
        now = self._clock()
        with self._lock:
            if self._doing:
                self._elsewhere_s += now - self._doing_since
            self._doing, self._doing_since = what, now

    def _calls(self, now: float) -> str:
        """Calls, time and what is known of the time to go: of a training its own, of a study what its calls may take.

        A step that is no study (weights, another optimizer's) need not use up its calls, so of it nothing is known.
        Replayed calls take no time, the first paid ones say little, and what takes long beside calls is no measure of
        them.
        """
        used, spent_s = self._scope.charged_calls, now - self._started
        # What comes after the studies may use more than their share, but never more than the budget.
        is_study = used <= self._ceiling < math.inf
        ceiling = min(self._ceiling, self._scope.budget.calls) if is_study else self._scope.budget.calls
        of = "" if math.isinf(ceiling) else f" of {ceiling:,.0f}"
        said = f"{used:,}{of} calls, {duration(spent_s, rough=True)}"
        if self._doing:
            return f"{said}, {self._doing}"
        paid = self._scope.usage().paid_calls
        if not is_study or paid < min(ENOUGH_FOR_AN_ESTIMATE, ceiling / 4):
            return said
        to_go = (spent_s - self._elsewhere_s) * max(0.0, ceiling - used) / paid
        return f"{said}, at most about {duration(to_go, rough=True)} to go"


def incumbent_text(scores: Sequence[float | None]) -> str:
    """`best 0.880 [0.70, 0.96] on 25 rows`, or that there is none yet."""
    known = [score for score in scores if score is not None]
    if not known:
        return "no score yet"
    interval, rows = mean_interval(known), counted(len(known), "row")
    return f"best {sum(known) / len(known):.3f} [{interval.low:.2f}, {interval.high:.2f}] on {rows}"
