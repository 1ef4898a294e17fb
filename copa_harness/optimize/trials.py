"""The words of a study: its settings, its trials, its outcome, and who watches it. Records only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from copa_harness.judge.messages import counted
from copa_harness.optimize.allowance import Allowance
from copa_harness.optimize.candidate import Candidate
from copa_harness.optimize.journal import StudyJournal
from copa_harness.optimize.progress import Progress
from copa_harness.optimize.space import Point
from copa_harness.results import Phase


class Ahead(Protocol):
    """Whoever can do something about candidates that are about to be scored."""

    def __call__(
        self, candidates: Sequence[Candidate], *, bar: Candidate, allowance: Allowance, phase: Phase
    ) -> None:
        """See `Colleagues.ahead`."""
        ...


def nobody_ahead(candidates: Sequence[Candidate], *, bar: Candidate, allowance: Allowance, phase: Phase) -> None:
    """What a process that works alone does about them: nothing."""


Stopped = Literal["budget", "perfect score", "no improvement", "no head-room", "search space exhausted", "trials"]
Outcome = Literal["complete", "dropped", "failed", "forbidden"]

PERFECT = 1.0 - 1e-9
"""A mean score from here on is perfect; sums of floats are not exact."""


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One trial.

    Attributes:
        number: 0 for the first of the study.
        point: What was tried.
        n_scored: On how many validation examples it was run.
        score: Its mean on those with a score, None without any. Of a dropped trial: on its hardest examples.
        outcome: How it ended.
        n_new: Examples it was run on in this study.
        value: What the sampler was told: the mean over all examples, estimated when the trial was dropped.
    """

    number: int
    point: Point
    n_scored: int
    score: float | None
    outcome: Outcome
    n_new: int
    value: float | None = None


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How a study searches.

    Attributes:
        sampler: Optuna sampler by name, see `samplers`.
        seed: Of the sampler.
        max_trials: Trials at most, free ones included.
        patience: Trials in a row without a new incumbent that end the study; None never does.
        p_threshold: Level of the racing rule, 0..1; 0 turns its statistical part off.
        trials_at_once: Trials that race the incumbent together. What is found depends on it, not on how many processes
            share the racing.
        stop_without_headroom: Whether a study ends when enough looks have shown nothing to gain.
    """

    sampler: str = "tpe"
    seed: int = 0
    max_trials: int = 2000
    patience: int | None = 40
    p_threshold: float = 0.1
    trials_at_once: int = 1
    stop_without_headroom: bool = True


@dataclass(frozen=True, slots=True)
class SearchOutcome:
    """The best fully scored candidate, every trial, and why the study stopped."""

    best: Candidate
    trials: tuple[TrialRecord, ...] = field(repr=False)
    stopped: Stopped

    def sentences(self, name: str, *, size: int, n: int, calls: int) -> list[str]:
        """What is worth telling.

        Args:
            name: The study's.
            size: Points of its space.
            n: Validation examples.
            calls: Calls used by now.
        """
        n_trials = len(self.trials)
        saved = sum(n - trial.n_scored for trial in self.trials if trial.outcome == "dropped")
        told = [
            f"{name}: {counted(n_trials, 'candidate')} of {size}, stopped: {self.stopped}; racing left out {saved} of "
            f"{n_trials * n} example evaluations"
        ]
        if self.stopped == "no head-room":
            told.append(
                f"{name}: no head-room: none of {counted(n_trials, 'candidate')} got an example right that the "
                f"incumbent gets wrong; stopped with {calls:,} calls used"
            )
        return told


@dataclass(frozen=True, slots=True)
class Watchers:
    """Who is told of every trial, and who may forbid one.

    Attributes:
        progress: Says how far it is.
        journal: Keeps every trial on disk.
        forbids: Says why a candidate must not be returned, or None; asked before it is scored and after every block.
        ahead: Told which candidates will be scored on their next block, before the first of them is.
    """

    progress: Progress | None = None
    journal: StudyJournal | None = None
    forbids: Callable[[Candidate], str | None] = lambda candidate: None
    ahead: Ahead = nobody_ahead
