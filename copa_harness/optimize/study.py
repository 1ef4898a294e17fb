"""The study: an Optuna search over one space, opened with a balanced set of points, every trial raced.

A trial is one point of the space, scored on blocks of validation examples, first those that the incumbent gets wrong;
it is dropped as soon as `RacingPruner` finds it hopeless. The opening shows the sampler every option (see `opening`);
from then on it proposes. A point that was scored before, in this study or an earlier one, costs nothing. Knows nothing
of where the options come from.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import optuna
from optuna.trial import TrialState

from copa_harness.errors import BudgetExhausted
from copa_harness.optimize.allowance import Allowance, OutOfCalls
from copa_harness.optimize.candidate import Candidate
from copa_harness.optimize.headroom import gained_examples, has_headroom
from copa_harness.optimize.opening import balanced_points, n_opening_points
from copa_harness.optimize.race import Race, Running
from copa_harness.optimize.racing import RacingPruner
from copa_harness.optimize.samplers import build_sampler, quiet_optuna
from copa_harness.optimize.scoring import Validation
from copa_harness.optimize.space import Point, Space
from copa_harness.optimize.trials import Outcome, SearchOutcome, SearchSettings, Stopped, TrialRecord, Watchers
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
            direction="maximize",
            sampler=build_sampler(settings.sampler, seed=settings.seed, at_once=settings.trials_at_once),
            pruner=pruner,
        )
        race = _Study(space, study, pruner, validation, allowance, settings, phase, name, watchers or Watchers())
        return race.run(starts)


class _Study(Race):
    """A race with an opening, a middle and an end."""

    def run(self, starts: Sequence[Point]) -> SearchOutcome:
        if not self.space.dimensions:
            return SearchOutcome(self.incumbent, (), "search space exhausted")
        try:
            self._open(starts)
            stopped = self._continue()
        except (OutOfCalls, BudgetExhausted):
            stopped = "budget"
        logger.info(
            "%s: stopped (%s) after %d trials at %.3f on %d validation examples",
            self.name, stopped, len(self.trials), self.validation.mean(self.incumbent), self.validation.n,
        )  # fmt: skip
        return SearchOutcome(self.incumbent, tuple(self.trials), stopped)

    # -- the two parts of a study

    def _open(self, starts: Sequence[Point]) -> None:
        """Queue the starting points, then a balanced set: every option is seen before the sampler chooses."""
        own = self.space.point_of_incumbent()
        points: list[Point] = []
        for start in ({}, *starts):
            # Options of equal content are kept once, so a start may name one that is gone.
            known = {name: option for name, option in start.items() if option in self.space.dimensions.get(name, ())}
            if {**own, **known} not in points:
                points.append({**own, **known})
        n = n_opening_points(max(len(options) for options in self.space.dimensions.values())) - len(points)
        taken = self.seen | {self.space.signature(point) for point in points}
        for point in (*points, *balanced_points(self.space, n, self.generator, taken=taken)):
            self.study.enqueue_trial(point)

    def _continue(self) -> Stopped:
        """Race what waits and then what the sampler proposes, one by one or several at once."""
        since_better = 0
        while len(self.trials) < self.settings.max_trials:
            if self.is_perfect:
                return "perfect score"
            before, n_before = self.incumbent, len(self.trials)
            if self.settings.trials_at_once > 1:
                self._several()
            elif self.trials and not self._queue_waits():
                point = self.space.unseen(self.seen, self.generator)
                if point is None:
                    return "search space exhausted"
                if self.trials[-1].n_new == 0:
                    self.study.enqueue_trial(point)  # the sampler repeats itself: show it something new
                self.one()
            else:
                self.one()
            if len(self.trials) == n_before:
                return "search space exhausted"
            since_better = 0 if self.incumbent is not before else since_better + len(self.trials) - n_before
            if self._is_headless():
                return "no head-room"
            if self.settings.patience is not None and since_better >= self.settings.patience:
                return "no improvement"
        return "trials"

    def _several(self) -> None:
        """Race as many new points as the settings say and the allowance pays for, all proposed before any is told.

        Raises:
            OutOfCalls: The allowance does not suffice for one.
        """
        affordable = self.allowance.remaining / (self.validation.n * self.validation.calls_per_example(self.incumbent))
        if affordable < 1:
            raise OutOfCalls
        n = min(self.settings.trials_at_once, affordable, self.settings.max_trials - len(self.trials))
        batch: list[Running] = []
        while len(batch) + 1 <= n and (point := self.space.unseen(self.seen, self.generator)) is not None:
            seen = set(self.seen)
            one = self.begin()
            if self.space.signature(one.point) in seen:  # a point twice is nothing to share: something new instead
                self.study.tell(one.trial, state=TrialState.FAIL)
                self.study.enqueue_trial(point)
                one = self.begin()
            batch.append(one)
        if batch:
            self._together(batch)

    def _together(self, running: Sequence[Running]) -> None:
        """Score all of them block by block against the incumbent they start with.

        They are told in the order in which they were asked for, so that the sampler's view does not depend on who fell
        out first.
        """
        alive, bar = list(running), self.incumbent
        ended: dict[int, Outcome] = {}
        try:
            while alive:
                self._ahead(alive, bar)
                for one in alive:
                    outcome = self.block(one, against=bar)
                    if outcome is not None:
                        ended[id(one)] = outcome
                        self.consider(one, outcome)
                alive = [] if self.is_perfect else [one for one in alive if id(one) not in ended]
        finally:
            for one in running:
                self.end(one, ended.get(id(one), "dropped"))

    def _ahead(self, running: Sequence[Running], bar: Candidate) -> None:
        """Tell whoever can help which candidates are scored next."""
        candidates = [
            one.candidate
            for one in running
            if self.watchers.forbids(one.candidate) is None and not self.validation.is_complete(one.candidate)
        ]
        self.watchers.ahead(candidates, bar=bar, allowance=self.allowance, phase=self.phase)

    def _is_headless(self) -> bool:
        """Whether nothing looked at so far gets an example right that the incumbent gets wrong, after enough looks."""
        if not self.settings.stop_without_headroom or self.is_forbidden:
            return False
        if self.beaten_somewhere is self.incumbent:
            return False  # an example won from it once stays won
        mine, sheets = self.validation.scores(self.incumbent), [self.validation.scores(one) for one in self.tried]
        if gained_examples(mine, sheets):
            self.beaten_somewhere = self.incumbent
        return not has_headroom(mine, sheets)

    def _queue_waits(self) -> bool:
        return bool(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
