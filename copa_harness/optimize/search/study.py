"""The study: an Optuna search over one space, opened with a balanced set of points, every trial raced.

A trial is one point of the space, scored on blocks of validation examples, first those that the incumbent gets wrong;
it is dropped as soon as `RacingPruner` finds it hopeless. The opening shows the sampler every option (see `opening`);
from then on it proposes. A point that was scored before, in this study or an earlier one, costs nothing.

A trial's life in a study: asked for, scored block by block, raced against the incumbent, told, shown.

Only a fully scored trial becomes the incumbent. A trial sees first what the incumbent gets wrong: there it must gain
something, and one that gains nothing is over after these few examples. One that was dropped is told to the sampler with
its paired estimate (see `sheets.estimated_difference`), which uses what it did show.

The words of a study: its settings, its trials, its outcome, and who watches it. Records only.

The opening of a study: which points are looked at before the sampler chooses by itself.

A surrogate model knows nothing before it has seen every option at least once. After the starting points, which others
thought of, comes a *balanced* set of points, in which every option of every dimension occurs about equally often. They
race the incumbent one by one like any other: since a trial sees first what the incumbent gets wrong, a look costs few
examples, and a point that shows nothing there is over.

A tournament over all of them (successive halving; Karnin et al. 2013, Jamieson & Talwalkar 2016) was tried and is not
used: beside a good incumbent it spends whole blocks on points that a few examples rule out for certain.

Head-room: whether what a study can choose from could improve on the incumbent at all, judged from a few looks.

No combination of the options looked at is better on an example than the best of them. So if none of a fair number of
candidates gets a single example right that the incumbent gets wrong, there is nothing in sight to be gained: more calls
would buy more ties. One example won is head-room; the study then goes on, since who wins one may win others.

Only looks at examples the incumbent does not already get fully right can show a gain, and a candidate dropped after an
easy block gave none. By the rule of three, no gain in 60 such looks says with 95 % confidence that fewer than one look
in twenty would have shown one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import optuna
from optuna.trial import Trial, TrialState

from copa_harness.errors import BudgetExhausted
from copa_harness.optimize.budget import Allowance, OutOfCalls
from copa_harness.optimize.options import SearchOptions
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.journal import StudyJournal
from copa_harness.optimize.search.progress import Progress
from copa_harness.optimize.search.racing import RacingPruner, Sheet
from copa_harness.optimize.search.samplers import build_sampler, quiet_optuna
from copa_harness.optimize.search.scoring import Validation
from copa_harness.optimize.search.space import Point, Space
from copa_harness.results import Phase
from copa_harness.wording import counted

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
    """

    progress: Progress | None = None
    journal: StudyJournal | None = None
    forbids: Callable[[Candidate], str | None] = lambda candidate: None


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
        settings: SearchOptions,
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

    def block(self, one: Running) -> Outcome | None:
        """Score the next block, the incumbent's mistakes first, and report it; how the trial ended, None if it goes on.

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
                against=None if self.is_forbidden else self.incumbent,
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

    def _show(self, record: TrialRecord, scores: Sequence[float | None], attributes: dict[str, Any]) -> None:
        if self.watchers.journal is not None:
            self.watchers.journal.add(
                record.number,
                params=record.point,
                options=self.space.dimensions,
                value=record.value,
                scores=scores,
                attributes={**attributes, "calls": self.allowance.scope.charged_calls},
            )
        if self.watchers.progress is not None:
            self.watchers.progress.trial(
                self.name,
                len(self.trials),
                scores=self.validation.scores(self.incumbent),
                ceiling=self.allowance.ceiling,
            )
        logger.debug(
            "%s: trial %d %s, %s on %d of %d; incumbent %.3f; calls %d",
            self.name,
            record.number,
            record.outcome,
            "no score" if record.score is None else f"{record.score:.3f}",
            record.n_scored,
            self.validation.n,
            self.validation.mean(self.incumbent),
            self.allowance.scope.charged_calls,
        )


MAX_POINTS = 48
"""Points of an opening at most: more only delay the surrogate, which learns from every one of them."""

MIN_POINTS = 16
"""Points of an opening at least."""


def n_opening_points(n_options: int) -> int:
    """How many points the sampler is to see before it chooses by itself.

    Args:
        n_options: Options of the largest dimension; twice as many points show each of them twice.
    """
    return min(MAX_POINTS, max(2 * n_options, MIN_POINTS))


def balanced_points(
    space: Space, n: int, generator: np.random.Generator, *, taken: Collection[tuple[str, ...]] = ()
) -> tuple[Point, ...]:
    """Up to `n` points in which every option of every dimension occurs about equally often.

    Each dimension goes through its options in a random order, again and again; points seen already are left out.

    Args:
        space: Where the points lie.
        n: How many are wanted.
        generator: Source of randomness.
        taken: Signatures (see `Space.signature`) that are not to come again.
    """
    seen = set(taken)
    points: list[Point] = []
    orders: dict[str, list[str]] = {name: [] for name in space.dimensions}
    for _ in range(4 * n):
        if len(points) == n or len(seen) >= space.size:
            break
        point: Point = {}
        for name, options in space.dimensions.items():
            if not orders[name]:
                orders[name] = [options[int(i)] for i in generator.permutation(len(options))]
            point[name] = orders[name].pop()
        signature = space.signature(point)
        if signature not in seen:
            seen.add(signature)
            points.append(point)
    return tuple(points)


MIN_CANDIDATES = 8
"""Fewer candidates say too little about the options."""

MIN_LOOKS = 60
"""Scores of other candidates on examples that could be gained; fewer prove nothing."""


def gained_examples(incumbent: Sheet, others: Sequence[Sheet]) -> int:
    """On how many examples at least one of the others scores higher than the incumbent."""
    gained = 0
    for i, mine in enumerate(incumbent):
        theirs = [score for sheet in others if i < len(sheet) and (score := sheet[i]) is not None]
        gained += mine is not None and max(theirs, default=0.0) > mine
    return gained


def looks(incumbent: Sheet, others: Sequence[Sheet]) -> int:
    """How many scores of the others could have shown a gain: those on examples the incumbent lacks full marks on."""
    return sum(
        mine is not None and mine < 1.0 and theirs is not None
        for sheet in others
        for mine, theirs in zip(incumbent, sheet, strict=False)
    )


def has_headroom(incumbent: Sheet, others: Sequence[Sheet]) -> bool:
    """Whether going on can pay: too few candidates or looks to tell, or some example on which one of them does better.

    Args:
        incumbent: The incumbent's full scores, the incumbent being the best found so far.
        others: What the candidates scored, the incumbent's own sheet among them or not.
    """
    tried = sum(any(score is not None for score in sheet) for sheet in others)
    if tried < MIN_CANDIDATES or looks(incumbent, others) < MIN_LOOKS:
        return True
    return gained_examples(incumbent, others) > 0


def search(
    space: Space,
    *,
    validation: Validation,
    allowance: Allowance,
    settings: SearchOptions,
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
            sampler=build_sampler(settings.sampler, seed=settings.seed),
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
            self.name,
            stopped,
            len(self.trials),
            self.validation.mean(self.incumbent),
            self.validation.n,
        )
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
        """Race what waits and then what the sampler proposes, one by one."""
        since_better = 0
        while len(self.trials) < self.settings.max_trials:
            if self.is_perfect:
                return "perfect score"
            before = self.incumbent
            if self.trials and not self._queue_waits():
                point = self.space.unseen(self.seen, self.generator)
                if point is None:
                    return "search space exhausted"
                if self.trials[-1].n_new == 0:
                    self.study.enqueue_trial(point)  # the sampler repeats itself: show it something new
            self.one()
            since_better = 0 if self.incumbent is not before else since_better + 1
            if self._is_headless():
                return "no head-room"
            if self.settings.patience is not None and since_better >= self.settings.patience:
                return "no improvement"
        return "trials"

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
