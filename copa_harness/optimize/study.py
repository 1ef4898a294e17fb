"""The study: an Optuna search over one space, with every trial raced against the incumbent block by block.

A trial is one point of the space. It is dropped as soon as `RacingPruner` finds it hopeless, and told to the sampler
with its paired estimate (the incumbent's full score plus the mean difference on the examples both have seen), which
uses what the dropped trial did show. Only fully scored trials become the incumbent. A point that was scored before,
in this study or an earlier one, costs nothing. Knows nothing of where the options come from.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import optuna
from optuna.storages import BaseStorage
from optuna.trial import Trial, TrialState

from copa_harness.errors import BudgetExhausted
from copa_harness.optimize.allowance import Allowance, OutOfCalls
from copa_harness.optimize.candidate import Candidate
from copa_harness.optimize.racing import RacingPruner
from copa_harness.optimize.samplers import build_sampler
from copa_harness.optimize.scoring import Validation
from copa_harness.optimize.space import Point, Space
from copa_harness.results import Phase

logger = logging.getLogger("copa_harness")

Stopped = Literal["budget", "perfect score", "no improvement", "search space exhausted", "trials"]


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One trial: its point, how many validation examples it was scored on, its mean on them, and how it ended."""

    number: int
    point: Point
    n_scored: int
    score: float | None
    outcome: Literal["complete", "dropped", "failed"]
    n_new: int


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How a study searches.

    Attributes:
        sampler: Optuna sampler by name, see `samplers`.
        seed: Of the sampler.
        max_trials: Trials at most, free ones included.
        patience: Trials in a row without a new incumbent that end the study; None never does.
        p_threshold: Level of one look of the racing rule, 0..1; 0 turns the statistical part off.
    """

    sampler: str = "tpe"
    seed: int = 0
    max_trials: int = 2000
    patience: int | None = 40
    p_threshold: float = 0.1


@dataclass(frozen=True, slots=True)
class SearchOutcome:
    """The best fully scored candidate, every trial, and why the study stopped."""

    best: Candidate
    trials: tuple[TrialRecord, ...] = field(repr=False)
    stopped: Stopped


def search(
    space: Space,
    *,
    validation: Validation,
    allowance: Allowance,
    settings: SearchSettings,
    phase: Phase,
    starts: Sequence[Point] = (),
    storage: BaseStorage | None = None,
    name: str = "search",
) -> SearchOutcome:
    """Search a space, starting from its incumbent.

    Args:
        space: What may be combined. Its incumbent must be fully scored on `validation`.
        validation: Where candidates are scored.
        allowance: Calls the study may use.
        settings: Sampler, seed and stopping rules.
        phase: Stamped on the calls.
        starts: Points tried first, after the incumbent; dimensions left out keep the incumbent's setting.
        storage: Optuna storage, in memory by default.
        name: The study's name, for log lines and the storage.

    Returns:
        The incumbent at the end, which is never worse on validation than the one the space was built around.
    """
    with _quiet_optuna():
        study = optuna.create_study(
            direction="maximize",
            sampler=build_sampler(settings.sampler, seed=settings.seed),
            pruner=RacingPruner(p_threshold=settings.p_threshold),
            storage=storage,
            study_name=name if storage is not None else None,
        )
        return _Race(space, study, validation, allowance, settings, phase, name).run(starts)


class _Race:
    """The state of one running study."""

    def __init__(
        self,
        space: Space,
        study: optuna.Study,
        validation: Validation,
        allowance: Allowance,
        settings: SearchSettings,
        phase: Phase,
        name: str,
    ) -> None:
        self.space, self.study, self.validation = space, study, validation
        self.allowance, self.settings, self.phase, self.name = allowance, settings, phase, name
        self.incumbent = space.incumbent
        self.trials: list[TrialRecord] = []
        self.seen: set[tuple[str, ...]] = set()
        self.generator = np.random.default_rng([settings.seed, 303])

    def run(self, starts: Sequence[Point]) -> SearchOutcome:
        if not self.space.dimensions:
            return SearchOutcome(self.incumbent, (), "search space exhausted")
        own = self.space.point_of_incumbent()
        for start in ({}, *starts):
            # Options of equal content are kept once, so a start may name one that is gone.
            known = {name: option for name, option in start.items() if option in self.space.dimensions.get(name, ())}
            self.study.enqueue_trial({**own, **known}, skip_if_exists=True)
        since_better = 0
        stopped: Stopped = "trials"
        try:
            while len(self.trials) < self.settings.max_trials:
                if self.validation.mean(self.incumbent) >= 1.0 - 1e-9:
                    stopped = "perfect score"
                    break
                before = self.incumbent
                record = self._one()
                since_better = 0 if self.incumbent is not before else since_better + 1
                if self.settings.patience is not None and since_better >= self.settings.patience:
                    stopped = "no improvement"
                    break
                point = self.space.unseen(self.seen, self.generator)
                if point is None:
                    stopped = "search space exhausted"
                    break
                if record.n_new == 0 and not self._queue_waits():
                    self.study.enqueue_trial(point)  # the sampler repeats itself: show it something new
        except (OutOfCalls, BudgetExhausted):
            stopped = "budget"
        logger.info(
            "%s: stopped (%s) after %d trials at %.3f on %d validation examples",
            self.name, stopped, len(self.trials), self.validation.mean(self.incumbent), self.validation.n,
        )  # fmt: skip
        return SearchOutcome(self.incumbent, tuple(self.trials), stopped)

    def _queue_waits(self) -> bool:
        return bool(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _one(self) -> TrialRecord:
        """One trial from ask to tell."""
        trial = self.study.ask()
        point = {name: trial.suggest_categorical(name, options) for name, options in self.space.dimensions.items()}
        self.seen.add(self.space.signature(point))
        candidate = self.space.candidate(point)
        n_known = len(self.validation.scores(candidate))
        try:
            dropped = self._scored_or_dropped(trial, candidate)
        except (OutOfCalls, BudgetExhausted):
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        scores = self.validation.scores(candidate)
        score = self.validation.mean(candidate)
        record = TrialRecord(
            number=len(self.trials),
            point=point,
            n_scored=len(scores),
            score=None if math.isnan(score) else score,
            outcome="failed" if math.isnan(score) else "dropped" if dropped else "complete",
            n_new=len(scores) - n_known,
        )
        self._tell(trial, candidate, record)
        self.trials.append(record)
        self._log(record)
        return record

    def _scored_or_dropped(self, trial: Trial, candidate: Candidate) -> bool:
        """Score block by block; True when the race was lost before the end.

        Raises:
            OutOfCalls: A full pass does not fit the allowance; nothing was run.
        """
        reported = 0
        while True:
            scores = self.validation.scores(candidate)
            for step in range(reported, len(scores)):
                score = scores[step]
                if score is not None:
                    trial.report(score, step)
            reported = len(scores)
            if self.validation.is_complete(candidate):
                return False
            if reported and (math.isnan(self.validation.mean(candidate)) or trial.should_prune()):
                return True
            if not reported and not self.allowance.can_afford(self.validation.cost_to_complete(candidate)):
                raise OutOfCalls
            self.validation.advance(candidate, allowance=self.allowance, phase=self.phase)

    def _tell(self, trial: Trial, candidate: Candidate, record: TrialRecord) -> None:
        trial.set_user_attr("n_scored", record.n_scored)
        trial.set_user_attr("outcome", record.outcome)
        if record.outcome == "failed":
            self.study.tell(trial, state=TrialState.FAIL)
            return
        if record.outcome == "dropped":
            # Told as complete: Optuna would take the last example's score for a pruned trial's value.
            difference = self.validation.difference(candidate, self.incumbent)
            self.study.tell(trial, self.validation.mean(self.incumbent) + difference)
            return
        self.study.tell(trial, self.validation.mean(candidate))
        if self.validation.is_better(candidate, self.incumbent):
            self.incumbent = candidate

    def _log(self, record: TrialRecord) -> None:
        scope = self.allowance.scope
        logger.info(
            "%s: trial %d %s, %s on %d of %d; incumbent %.3f; calls %d of %s",
            self.name, record.number, record.outcome, "no score" if record.score is None else f"{record.score:.3f}",
            record.n_scored, self.validation.n, self.validation.mean(self.incumbent), scope.charged_calls,
            "any number" if math.isinf(scope.budget.calls) else int(scope.budget.calls),
        )  # fmt: skip


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Optuna logs to stderr through its own handler; its warnings about experimental parts are known here."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
