"""A trial's life in a study: asked for, scored block by block, raced against the incumbent, told, shown.

Only a fully scored trial becomes the incumbent. A trial sees first what the incumbent gets wrong: there it must gain
something, and one that gains nothing is over after these few examples. One that was dropped is told to the sampler with
its paired estimate (see `sheets.estimated_difference`), which uses what it did show.
Knows nothing of the order in which trials are taken or of when a study ends.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.trial import Trial, TrialState

from copa_harness.errors import BudgetExhausted
from copa_harness.optimize.allowance import Allowance, OutOfCalls
from copa_harness.optimize.candidate import Candidate
from copa_harness.optimize.racing import RacingPruner
from copa_harness.optimize.scoring import Validation
from copa_harness.optimize.space import Point, Space
from copa_harness.optimize.trials import PERFECT, Outcome, SearchSettings, TrialRecord, Watchers
from copa_harness.results import Phase

logger = logging.getLogger("copa_harness")


@dataclass(slots=True)
class Running:
    """A trial on its way from ask to tell."""

    trial: Trial
    point: Point
    candidate: Candidate
    n_known: int
    reported: set[int] = field(default_factory=set)


class Race:
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
        self.tried: list[Candidate] = []
        self.beaten_somewhere: Candidate | None = None  # the incumbent of whom this is known
        self.seen: set[tuple[str, ...]] = set()
        self.generator = np.random.default_rng([settings.seed, 303])

    @property
    def is_perfect(self) -> bool:
        """Whether the incumbent cannot be improved upon."""
        return not self.is_forbidden and self.validation.mean(self.incumbent) >= PERFECT

    @property
    def is_forbidden(self) -> bool:
        """Whether the incumbent breaks a limit: then any trial that does not is better, and none is hopeless."""
        return self.watchers.forbids(self.incumbent) is not None

    def one(self) -> TrialRecord:
        """One trial from ask to tell."""
        one = self.begin()
        outcome: Outcome | None = None
        try:
            if one.n_known == 0 and not self.allowance.can_afford(self.validation.cost_to_complete(one.candidate)):
                raise OutOfCalls
            while outcome is None:
                outcome = self.block(one)
        except (OutOfCalls, BudgetExhausted):
            self.study.tell(one.trial, state=TrialState.FAIL)
            raise
        self.consider(one, outcome)
        return self.end(one, outcome)

    def begin(self) -> Running:
        """Ask the sampler, or the queue, for the next point."""
        trial = self.study.ask()
        point = {name: trial.suggest_categorical(name, options) for name, options in self.space.dimensions.items()}
        self.seen.add(self.space.signature(point))
        candidate = self.space.candidate(point)
        return Running(trial, point, candidate, self.validation.n_seen(candidate))

    def block(self, one: Running, *, against: Candidate | None = None) -> Outcome | None:
        """Score the next block and report it; how the trial ended, or None while it goes on.

        Args:
            one: The trial.
            against: Whose mistakes come first; by default the incumbent's.

        Raises:
            OutOfCalls: The allowance does not suffice for the block; nothing was run.
        """
        candidate = one.candidate
        if self.watchers.forbids(candidate) is not None:
            return "forbidden"
        if not self.validation.is_complete(candidate):
            self.validation.advance(
                candidate,
                allowance=self.allowance,
                phase=self.phase,
                against=None if self.is_forbidden else against or self.incumbent,
            )
        for step, score in enumerate(self.validation.scores(candidate)):
            if score is not None and step not in one.reported:
                one.trial.report(score, step)
                one.reported.add(step)
        if math.isnan(self.validation.mean(candidate)):
            return "failed"
        if self.watchers.forbids(candidate) is not None:
            return "forbidden"
        if self.validation.is_complete(candidate):
            return "complete"
        known = () if self.is_forbidden else enumerate(self.validation.scores(self.incumbent))
        self.pruner.incumbent = {step: score for step, score in known if score is not None}
        self.pruner.ties_lose = candidate.size >= self.incumbent.size  # see Validation.is_better
        return "dropped" if one.trial.should_prune() else None

    def consider(self, one: Running, outcome: Outcome) -> None:
        """Make a complete trial the incumbent if it is better."""
        if outcome != "complete":
            return
        if self.is_forbidden or self.validation.is_better(one.candidate, self.incumbent):
            self.incumbent = one.candidate

    def end(self, one: Running, outcome: Outcome) -> TrialRecord:
        """Tell the sampler, and everybody who watches."""
        scores, mean = self.validation.scores(one.candidate), self.validation.mean(one.candidate)
        if outcome == "dropped" and math.isnan(mean):
            outcome = "failed"
        value: float | None = None
        if outcome == "complete":
            value = mean
        elif outcome == "dropped":
            # Told as complete: Optuna would take the last example's score for a pruned trial's value.
            value = self.validation.mean(self.incumbent) + self.validation.estimate(one.candidate, self.incumbent)
        record = TrialRecord(
            number=len(self.trials),
            point=one.point,
            n_scored=self.validation.n_seen(one.candidate),
            score=None if math.isnan(mean) else mean,
            outcome=outcome,
            n_new=self.validation.n_seen(one.candidate) - one.n_known,
            value=value,
        )
        attributes: dict[str, Any] = {"n_scored": record.n_scored, "outcome": record.outcome, "score": record.score}
        for key, attribute in attributes.items():
            one.trial.set_user_attr(key, attribute)
        if value is None:
            self.study.tell(one.trial, state=TrialState.FAIL)
        else:
            self.study.tell(one.trial, value)
        self.trials.append(record)
        self.tried.append(one.candidate)
        self._show(record, scores, attributes)
        return record

    def _show(
        self, record: TrialRecord, scores: Sequence[float | None], attributes: dict[str, Any]
    ) -> None:
        if self.watchers.journal is not None:
            self.watchers.journal.add(
                record.number, params=record.point, options=self.space.dimensions, value=record.value, scores=scores,
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
