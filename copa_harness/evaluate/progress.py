"""How far an evaluation is, in a line now and then, and an early word when its answers do not parse.

    iris, none: 31 of 75 test examples, 0.419 so far, 2 unparsed, 61 s, about 87 s to go

`run_examples` tells whoever listens (`telling`) of every example that is done. A line comes every `EVERY_S` seconds
also while nothing ends: the first answers of a batch come together, and a job that says nothing is taken for dead.
When most of the first answers do not parse that is said at once, with what they look like and what helps: nobody should
wait for the end of a run to learn it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from copa_harness.formatting import counted, duration, number
from copa_harness.results import ExampleResult

if TYPE_CHECKING:
    from copa_harness.lm.budget.scope import Scope

logger = logging.getLogger("copa_harness")

EVERY_S = 15.0
"""Seconds between two lines, unless something begins or ends."""

FIRST_ANSWERS = 10
"""Answers after which it is said if most of them do not parse."""

ENOUGH_FOR_AN_ESTIMATE = 32
"""Answers, or a quarter of all, before the time to go is told: of those under way at once the first say little."""

Listener = Callable[[ExampleResult], None]


class Urgent(str):
    """A line that whoever thins out lines of progress must not leave out."""

    __slots__ = ()


_listener: ContextVar[Listener | None] = ContextVar("copa_example_listener", default=None)

_lines: ContextVar[Callable[[str], None] | None] = ContextVar("copa_lines", default=None)


@contextmanager
def telling(listener: Listener | None) -> Iterator[None]:
    """Call `listener` for every example that is done in the block, from whatever thread ran it; None calls nobody."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def current_listener() -> Listener | None:
    """Who is told of examples that are done."""
    return _listener.get()


@contextmanager
def lines_to(write: Callable[[str], None] | None) -> Iterator[None]:
    """Have evaluations in the block write their lines of progress there, besides the log; None keeps to the log."""
    token = _lines.set(write)
    try:
        yield
    finally:
        _lines.reset(token)


class Lines:
    """Lines of progress, limited by time, to the log and to whoever takes them.

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
        self._lock = threading.Lock()
        self._started = self._last = clock()

    def tick(self) -> None:
        """A line on what is running, if the last one is long enough ago and there is something to say."""
        now = self._clock()
        with self._lock:
            if now - self._last < self._every_s or not (line := self._line(now)):
                return
            self._last = now
        self.say(line)

    def _line(self, now: float) -> str:
        raise NotImplementedError

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """While the block runs, lines come also when nothing ends."""
        over = threading.Event()

        def run() -> None:
            while not over.wait(min(1.0, self._every_s)):
                self.tick()

        thread = threading.Thread(target=run, name="copa-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def say(self, text: str, *, urgent: bool = False) -> None:
        """One line, at once; an urgent one also where others are left out for coming too often."""
        line = " ".join(text.split())
        (logger.warning if urgent else logger.info)("%s", line)
        if self._write is not None:
            self._write(Urgent(line) if urgent else line)


class EvaluationProgress(Lines):
    """Says how far an evaluation is: `following` is the block during which it is told of every example.

    Args:
        title: What is evaluated: `iris, none`.
        n: Examples there are.
        split: Of which split.
        scope: Who pays for it, and counts the answers that are cut off.
        warns: Whether to say so when most of the first answers do not parse.
        **more: `every_s` and `clock` of `Lines`.
    """

    def __init__(self, title: str, n: int, *, split: str, scope: Scope, warns: bool = True, **more: Any) -> None:
        super().__init__(scope, write=_lines.get(), **more)
        self._title, self._n, self._split, self._is_watching = title, n, split, warns
        self._results: list[ExampleResult] = []

    @contextmanager
    def following(self) -> Iterator[None]:
        """Listen to the examples of the block, and write lines while it runs."""
        with telling(self.done), self.ticking():
            yield

    def done(self, result: ExampleResult) -> None:
        """An example is done."""
        with self._lock:
            self._results.append(result)
            unparsed = self._first_unparsed()
        if unparsed:
            n_truncated = self._scope.usage().truncated_calls
            self.say(f"{self._title}: {first_answers_text(unparsed, n_truncated=n_truncated)}", urgent=True)

    def _first_unparsed(self) -> list[ExampleResult]:
        """The first answers, once, if most of them do not parse; nothing otherwise."""
        if not self._is_watching:
            return []
        answered = [one for one in self._results if one.outcome != "provider_error"]
        if len(answered) < FIRST_ANSWERS and len(self._results) < self._n:
            return []
        self._is_watching = False
        return answered if 2 * sum(one.outcome == "unparsed" for one in answered) > len(answered) else []

    def _line(self, now: float) -> str:
        results, spent_s = self._results, now - self._started
        if len(results) >= self._n:
            return ""
        scores = [one.score for one in results if one.score is not None]
        n_unparsed = sum(one.outcome == "unparsed" for one in results)
        parts = [f"{len(results):,} of {counted(self._n, f'{self._split} example')}"]
        if scores:
            parts.append(f"{number(math.fsum(scores) / len(scores))} so far")
        if n_unparsed:
            parts.append(f"{n_unparsed:,} unparsed")
        parts.append(duration(spent_s, rough=True))
        usage = self._scope.usage()
        n_calls = usage.paid_calls + usage.cached_calls
        # What is replayed takes no time.
        n_paid = len(results) * (usage.paid_calls / n_calls if n_calls else 1.0)
        if n_paid >= min(ENOUGH_FOR_AN_ESTIMATE, self._n / 4):
            parts.append(f"about {duration(spent_s / n_paid * (self._n - len(results)), rough=True)} to go")
        return f"{self._title}: {', '.join(parts)}"


def first_answers_text(results: list[ExampleResult], *, n_truncated: int) -> str:
    """That most of the first answers do not parse, what they look like and what helps.

    Args:
        results: Those that were answered.
        n_truncated: Answers that were cut off so far.
    """
    from copa_harness.judge.explanations import unparsed_text, what_makes_answers_parse

    n_unparsed = sum(one.outcome == "unparsed" for one in results)
    return (
        f"{n_unparsed} of the first {counted(len(results), 'answer')} do not parse; they look like "
        f"{unparsed_text(results)}. What helps: {what_makes_answers_parse(n_truncated)}"
    )
