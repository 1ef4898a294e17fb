"""The study: an Optuna search over one space, opened with a tournament and continued by racing the incumbent.

A trial is one point of the space, scored on blocks of validation examples in one fixed order. The opening looks at many
points at once and halves them after every block (see `opening`); from then on the sampler proposes one point at a
time, and it is dropped as soon as `RacingPruner` finds it hopeless. A trial that was not completed is told to the
sampler with its paired estimate (the incumbent's full score plus the mean difference on the examples both have seen),
which uses what it did show. Only fully scored trials become the incumbent. A point that was scored before, in this
study or an earlier one, costs nothing. Knows nothing of where the options come from.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.trial import Trial, TrialState

from copa_harness.errors import BudgetExhausted
from copa_harness.optimize.allowance import Allowance, OutOfCalls
from copa_harness.optimize.candidate import Candidate
from copa_harness.optimize.headroom import has_headroom
from copa_harness.optimize.opening import balanced_points, n_opening_points, survivors
from copa_harness.optimize.racing import RacingPruner
from copa_harness.optimize.samplers import build_sampler, quiet_optuna
from copa_harness.optimize.scoring import Validation
from copa_harness.optimize.space import Point, Space
from copa_harness.optimize.trials import (
    PERFECT,
    Outcome,
    SearchOutcome,
    SearchSettings,
    Stopped,
    TrialRecord,
    Watchers,
)
from copa_harness.results import Phase

logger = logging.getLogger("copa_harness")

__all__ = ["SearchOutcome", "SearchSettings", "TrialRecord", "Watchers", "search"]


def search(
    space: Space,
    *,
    validation: Validation,
    allowance: Allowance,
    settings: SearchSettings,
    phase: Phase,
    starts: Sequence[Point] = (),
    name: str = "search",
    watchers: Watchers | None = None,
) -> SearchOutcome:
    """Search a space, starting from its incumbent.

    Args:
        space: What may be combined. Its incumbent must be fully scored on `validation`.
        validation: Where candidates are scored.
        allowance: Calls the study may use.
        settings: Sampler, seed and stopping rules.
        phase: Stamped on the calls.
        starts: Points tried first, after the incumbent; dimensions left out keep the incumbent's setting.
        name: The study's name, for log lines.
        watchers: Progress, journal and constraints.

    Returns:
        The incumbent at the end, which is never worse on validation than the one the space was built around.
    """
    n_looks = max(1, math.ceil(validation.n / validation.block_size) - 1)
    pruner = RacingPruner(p_threshold=settings.p_threshold, n_looks=n_looks)
    with quiet_optuna():
        study = optuna.create_study(
            direction="maximize", sampler=build_sampler(settings.sampler, seed=settings.seed), pruner=pruner
        )
        race = _Race(space, study, pruner, validation, allowance, settings, phase, name, watchers or Watchers())
        return race.run(starts)


@dataclass(slots=True)
class _Running:
    """A trial on its way from ask to tell."""

    trial: Trial
    point: Point
    candidate: Candidate
    n_known: int
    reported: int = 0


class _Race:
    """The state of one running study."""

    def __init__(
        self,
        space: Space,
        study: optuna.Study,
        pruner: RacingPruner,
        validation: Validation,
        allowance: Allowance,
        settings: SearchSettings,
        phase: Phase,
        name: str,
        watchers: Watchers,
    ) -> None:
        self.space, self.study, self.pruner, self.validation = space, study, pruner, validation
        self.allowance, self.settings, self.phase, self.name = allowance, settings, phase, name
        self.watchers = watchers
        self.incumbent = space.incumbent
        self.trials: list[TrialRecord] = []
        self.seen: set[tuple[str, ...]] = set()
        self.generator = np.random.default_rng([settings.seed, 303])

    def run(self, starts: Sequence[Point]) -> SearchOutcome:
        if not self.space.dimensions:
            return SearchOutcome(self.incumbent, (), "search space exhausted")
        try:
            stopped = "perfect score" if self._is_perfect() else self._open(starts) or self._continue()
        except (OutOfCalls, BudgetExhausted):
            stopped = "budget"
        logger.info(
            "%s: stopped (%s) after %d trials at %.3f on %d validation examples",
            self.name, stopped, len(self.trials), self.validation.mean(self.incumbent), self.validation.n,
        )  # fmt: skip
        return SearchOutcome(self.incumbent, tuple(self.trials), stopped)

    # -- the two parts of a study

    def _open(self, starts: Sequence[Point]) -> Stopped | None:
        """The tournament over the starting points and a balanced set; why the study is over, or None."""
        own = self.space.point_of_incumbent()
        first: list[Point] = []
        for start in ({}, *starts):
            # Options of equal content are kept once, so a start may name one that is gone.
            known = {name: option for name, option in start.items() if option in self.space.dimensions.get(name, ())}
            if {**own, **known} not in first:
                first.append({**own, **known})
        per_example = self.validation.calls_per_example(self.incumbent)
        n = n_opening_points(
            self.settings.opening_share * self.allowance.remaining / per_example,
            block_size=self.validation.block_size,
            n_options=max(len(options) for options in self.space.dimensions.values()),
        )
        n = min(n, self.settings.max_trials, self.space.size)
        if n == 0 or len(first) > self.settings.max_trials:
            for point in first:
                self.study.enqueue_trial(point, skip_if_exists=True)
            return None
        first = first[: max(2, n - n // 3)]  # a third of the tournament is for what nobody thought of
        taken = {self.space.signature(point) for point in first}
        points = [*first, *balanced_points(self.space, n - len(first), self.generator, taken=taken)]
        for point in points:
            self.study.enqueue_trial(point)
        self._tournament([self._begin() for _ in points])
        if self._is_perfect():
            return "perfect score"
        sheets = [self.validation.scores(self.space.candidate(record.point)) for record in self.trials]
        if self.settings.stop_without_headroom and not has_headroom(self.validation.scores(self.incumbent), sheets):
            return "no head-room"
        return None

    def _tournament(self, running: list[_Running]) -> None:
        """Score all of them block by block, halving after every block; end those that fall out as dropped."""
        alive = list(running)
        out: list[tuple[_Running, Outcome]] = []
        try:
            while alive:
                going: list[_Running] = []
                for one in alive:
                    outcome = self._block(one)
                    if outcome is None:
                        going.append(one)
                    else:
                        out.append((one, outcome))
                        self._consider(one, outcome)
                kept = survivors([self.validation.mean(one.candidate) for one in going])
                out.extend((one, "dropped") for i, one in enumerate(going) if i not in kept)
                alive = [] if self._is_perfect() else [going[i] for i in kept]
        except (OutOfCalls, BudgetExhausted):
            self._end_all(running, out)
            raise
        self._end_all(running, out)

    def _end_all(self, running: list[_Running], out: list[tuple[_Running, Outcome]]) -> None:
        """Told in the order they were asked for, so that the sampler's view does not depend on who fell out first."""
        ended = {id(one): outcome for one, outcome in out}
        for one in running:
            self._end(one, ended.get(id(one), "dropped"))

    def _continue(self) -> Stopped:
        """Race what the sampler proposes, one by one."""
        since_better = 0
        while len(self.trials) < self.settings.max_trials:
            if self._is_perfect():
                return "perfect score"
            before = self.incumbent
            if self.trials and not self._queue_waits():
                point = self.space.unseen(self.seen, self.generator)
                if point is None:
                    return "search space exhausted"
                if self.trials[-1].n_new == 0:
                    self.study.enqueue_trial(point)  # the sampler repeats itself: show it something new
            self._one()
            since_better = 0 if self.incumbent is not before else since_better + 1
            if self.settings.patience is not None and since_better >= self.settings.patience:
                return "no improvement"
        return "trials"

    def _is_perfect(self) -> bool:
        return self.validation.mean(self.incumbent) >= PERFECT

    def _queue_waits(self) -> bool:
        return bool(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    # -- one trial

    def _one(self) -> TrialRecord:
        """One trial from ask to tell."""
        one = self._begin()
        outcome: Outcome | None = None
        try:
            if one.n_known == 0 and not self.allowance.can_afford(self.validation.cost_to_complete(one.candidate)):
                raise OutOfCalls
            while outcome is None:
                outcome = self._block(one)
        except (OutOfCalls, BudgetExhausted):
            self.study.tell(one.trial, state=TrialState.FAIL)
            raise
        self._consider(one, outcome)
        return self._end(one, outcome)

    def _begin(self) -> _Running:
        trial = self.study.ask()
        point = {name: trial.suggest_categorical(name, options) for name, options in self.space.dimensions.items()}
        self.seen.add(self.space.signature(point))
        candidate = self.space.candidate(point)
        return _Running(trial, point, candidate, len(self.validation.scores(candidate)))

    def _block(self, one: _Running) -> Outcome | None:
        """Score the next block and report it; how the trial ended, or None while it goes on.

        Raises:
            OutOfCalls: The allowance does not suffice for the block; nothing was run.
        """
        candidate = one.candidate
        if self.watchers.forbids(candidate) is not None:
            return "forbidden"
        if not self.validation.is_complete(candidate):
            self.validation.advance(candidate, allowance=self.allowance, phase=self.phase)
        scores = self.validation.scores(candidate)
        for step in range(one.reported, len(scores)):
            score = scores[step]
            if score is not None:
                one.trial.report(score, step)
        one.reported = len(scores)
        if math.isnan(self.validation.mean(candidate)):
            return "failed"
        if self.watchers.forbids(candidate) is not None:
            return "forbidden"
        if self.validation.is_complete(candidate):
            return "complete"
        known = enumerate(self.validation.scores(self.incumbent))
        self.pruner.incumbent = {step: score for step, score in known if score is not None}
        return "dropped" if one.trial.should_prune() else None

    def _consider(self, one: _Running, outcome: Outcome) -> None:
        """Make a complete trial the incumbent if it is better."""
        if outcome == "complete" and self.validation.is_better(one.candidate, self.incumbent):
            self.incumbent = one.candidate

    def _end(self, one: _Running, outcome: Outcome) -> TrialRecord:
        """Tell the sampler, and everybody who watches."""
        scores, mean = self.validation.scores(one.candidate), self.validation.mean(one.candidate)
        record = TrialRecord(
            number=len(self.trials),
            point=one.point,
            n_scored=len(scores),
            score=None if math.isnan(mean) else mean,
            outcome="failed" if math.isnan(mean) and outcome == "dropped" else outcome,
            n_new=len(scores) - one.n_known,
        )
        value: float | None = None
        if record.outcome == "complete":
            value = mean
        elif record.outcome == "dropped":
            # Told as complete: Optuna would take the last example's score for a pruned trial's value.
            value = self.validation.mean(self.incumbent) + self.validation.difference(one.candidate, self.incumbent)
        attributes: dict[str, Any] = {"n_scored": record.n_scored, "outcome": record.outcome, "score": record.score}
        for key, attribute in attributes.items():
            one.trial.set_user_attr(key, attribute)
        if value is None:
            self.study.tell(one.trial, state=TrialState.FAIL)
        else:
            self.study.tell(one.trial, value)
        self.trials.append(record)
        self._show(record, value, scores, attributes)
        return record

    def _show(
        self, record: TrialRecord, value: float | None, scores: Sequence[float | None], attributes: dict[str, Any]
    ) -> None:
        if self.watchers.journal is not None:
            self.watchers.journal.add(
                record.number, params=record.point, options=self.space.dimensions, value=value, scores=scores,
                attributes={**attributes, "calls": self.allowance.scope.charged_calls},
            )  # fmt: skip
        if self.watchers.progress is not None:
            self.watchers.progress.trial(
                self.name, len(self.trials), scores=self.validation.scores(self.incumbent),
                ceiling=self.allowance.ceiling,
            )  # fmt: skip
        logger.debug(
            "%s: trial %d %s, %s on %d of %d; incumbent %.3f; calls %d",
            self.name, record.number, record.outcome, "no score" if record.score is None else f"{record.score:.3f}",
            record.n_scored, self.validation.n, self.validation.mean(self.incumbent),
            self.allowance.scope.charged_calls,
        )  # fmt: skip
