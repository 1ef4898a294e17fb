"""The study: an Optuna search over one space, opened with a tournament and continued by racing the incumbent.

A trial is one point of the space, scored on blocks of validation examples in one fixed order. The opening looks at many
points at once and halves them after every block (see `opening`); from then on the sampler proposes one point at a
time, which is dropped as soon as `RacingPruner` finds it hopeless. A point that was scored before, in this study or an
earlier one, costs nothing. Knows nothing of where the options come from.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import optuna
from optuna.trial import TrialState

from copa_harness.errors import BudgetExhausted
from copa_harness.optimize.allowance import Allowance, OutOfCalls
from copa_harness.optimize.headroom import has_headroom
from copa_harness.optimize.opening import SCOUTS, balanced_points, n_opening_points, survivors
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
            stopped = "perfect score" if self.is_perfect else self._open(starts) or self._continue()
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
        rest = first
        if self._n_opening() and len(first) <= self.settings.max_trials:
            # A weak incumbent drops nobody; beside a good one the hopeless are known after a block.
            for point in first[: 1 + SCOUTS]:
                self.study.enqueue_trial(point)
                self.one()
                if self.is_perfect:
                    return "perfect score"
            rest = first[1 + SCOUTS :]
        n = self._n_opening() if rest is not first else 0
        if n == 0:
            for point in rest:
                self.study.enqueue_trial(point, skip_if_exists=True)
            return None
        first = rest[: max(2, n - n // 3)]  # a third of the tournament is for what nobody thought of
        taken = self.seen | {self.space.signature(point) for point in first}
        points = [*first, *balanced_points(self.space, n - len(first), self.generator, taken=taken)]
        for point in points:
            self.study.enqueue_trial(point)
        self._tournament([self.begin() for _ in points])
        if self.is_perfect:
            return "perfect score"
        sheets = [self.validation.scores(self.space.candidate(record.point)) for record in self.trials]
        can_stop = self.settings.stop_without_headroom and not self.is_forbidden
        if can_stop and not has_headroom(self.validation.scores(self.incumbent), sheets):
            return "no head-room"
        return None

    def _n_opening(self) -> int:
        """How many points a tournament could have now; 0 for none."""
        n = n_opening_points(
            self.settings.opening_share * self.allowance.remaining / self.validation.calls_per_example(self.incumbent),
            block_size=self.validation.block_size,
            n_options=max(len(options) for options in self.space.dimensions.values()),
        )
        return max(0, min(n, self.settings.max_trials - len(self.trials), self.space.size - len(self.seen)))

    def _tournament(self, running: list[Running], *, halving: bool = True) -> None:
        """Score all of them block by block, halving after every block; end those that fall out as dropped."""
        alive = list(running)
        out: list[tuple[Running, Outcome]] = []
        try:
            while alive:
                self._ahead(alive)
                going: list[Running] = []
                for one in alive:
                    outcome = self.block(one)
                    if outcome is None:
                        going.append(one)
                    else:
                        out.append((one, outcome))
                        self.consider(one, outcome)
                kept = tuple(range(len(going)))
                if halving:
                    kept = survivors([self.validation.mean(one.candidate) for one in going], self.generator)
                out.extend((one, "dropped") for i, one in enumerate(going) if i not in kept)
                alive = [] if self.is_perfect else [going[i] for i in kept]
        except (OutOfCalls, BudgetExhausted):
            self._end_all(running, out)
            raise
        self._end_all(running, out)

    def _end_all(self, running: list[Running], out: list[tuple[Running, Outcome]]) -> None:
        """Told in the order they were asked for, so that the sampler's view does not depend on who fell out first."""
        ended = {id(one): outcome for one, outcome in out}
        for one in running:
            self.end(one, ended.get(id(one), "dropped"))

    def _continue(self) -> Stopped:
        """Race what the sampler proposes, one by one."""
        since_better = 0
        while len(self.trials) < self.settings.max_trials:
            if self.is_perfect:
                return "perfect score"
            before = self.incumbent
            if self.settings.trials_at_once > 1:
                n = self._several()
                if n == 0:
                    return "search space exhausted"
                since_better = 0 if self.incumbent is not before else since_better + n
                if self.settings.patience is not None and since_better >= self.settings.patience:
                    return "no improvement"
                continue
            if self.trials and not self._queue_waits():
                point = self.space.unseen(self.seen, self.generator)
                if point is None:
                    return "search space exhausted"
                if self.trials[-1].n_new == 0:
                    self.study.enqueue_trial(point)  # the sampler repeats itself: show it something new
            self.one()
            since_better = 0 if self.incumbent is not before else since_better + 1
            if self.settings.patience is not None and since_better >= self.settings.patience:
                return "no improvement"
        return "trials"

    def _several(self) -> int:
        """Race as many new points as the settings say and the allowance pays for, all proposed before any is told.

        Returns:
            How many were raced; 0 when all points were seen.

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
            self._tournament(batch, halving=False)
        return len(batch)

    def _ahead(self, running: Sequence[Running]) -> None:
        """Tell whoever can help which candidates are scored next."""
        candidates = [
            one.candidate
            for one in running
            if self.watchers.forbids(one.candidate) is None and not self.validation.is_complete(one.candidate)
        ]
        self.watchers.ahead(candidates, allowance=self.allowance, phase=self.phase)

    def _queue_waits(self) -> bool:
        return bool(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
