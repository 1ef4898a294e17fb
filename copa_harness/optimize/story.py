"""What a run tells of itself: sentences, headlines, and what every phase spent and did to the score.

Knows scopes and text; knows nothing of candidates, steps or reports.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from copa_harness.evaluate.runner import usage_since
from copa_harness.lm.scope import Scope
from copa_harness.results import PhaseRecord

logger = logging.getLogger("copa_harness")


class Story:
    """Collected while the run goes on.

    Attributes:
        scope: What is spent is booked there.
        phases: In order.
        notes: Sentences, in order.
        headlines: Those of them that are printed in the terminal as well.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.phases: list[PhaseRecord] = []
        self.notes: list[str] = []
        self.headlines: list[str] = []

    @property
    def score(self) -> float:
        """The mean validation score so far; nan when there is none."""
        return math.nan

    @contextmanager
    def recorded(self, name: str, first_note: int) -> Iterator[None]:
        """Record the block as a phase: what it spent, and what it did to the score."""
        before, score_before, started = self.scope.usage(), self.score, time.perf_counter()
        try:
            yield
        finally:
            self.phases.append(
                PhaseRecord(
                    phase=name,
                    usage=usage_since(before, self.scope.usage(), wall_s=time.perf_counter() - started),
                    score_before=None if math.isnan(score_before) else score_before,
                    score_after=None if math.isnan(self.score) else self.score,
                    note="; ".join(self.notes[first_note:]),
                )
            )

    def note(self, text: str, *, headline: bool = False) -> None:
        """Keep a sentence for the record, and log it; a headline is printed in the terminal as well."""
        self.notes.append(text)
        if headline:
            self.headlines.append(text)
        logger.info("%s", text)
