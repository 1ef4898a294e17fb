"""The study: an Optuna search over one space, in which every trial races the incumbent.

A trial is one point of the space. Its candidate is scored block by block, first on the validation examples that the
incumbent gets wrong: there it must gain something, and one that gains nothing is over after these few (`RacingPruner`).
Only a fully scored trial becomes the incumbent. One that was dropped is told to the sampler with its paired estimate
(`racing.estimated_difference`), which uses what it did show. A point that was scored before, in this study or an
earlier one, costs nothing.

**Startup trials** are what is looked at before the sampler chooses. A surrogate model knows nothing before it has seen
every option at least once. So after the starting points, which others thought of, comes a *balanced* set of points, in
which every option of every dimension occurs about equally often. They race like any other trial. A tournament over all
of them (successive halving; Karnin et al. 2013, Jamieson & Talwalkar 2016) was tried and is not used: beside a good
incumbent it spends whole blocks on points that a few examples rule out for certain.

**Early stopping** ends a study that has no head-room: nothing it can choose from could improve on the incumbent. No
combination of the options looked at is better on an example than the best of them, so if none of a fair number of
candidates gets a single example right that the incumbent gets wrong, more calls would buy more ties. One example won is
head-room; the study then goes on, since who wins one may win others. Only looks at examples the incumbent does not get
fully right already can show a gain. By the rule of three, no gain in 60 such looks says with 95 % confidence that fewer
than one look in twenty would have shown one.

Nor is there anything to gain where **no answer parses**: neither the incumbent's nor, of the candidates that could cure
it (they show demonstrations or have other weights, where the space has any), a single one. By the same rule 30 such
answers say that fewer than one in ten would parse; they are of three candidates at least, 10 of each.
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
from copa_harness.formatting import counted
from copa_harness.optimize.options import SearchOptions
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.journal import StudyJournal
from copa_harness.optimize.search.progress import Progress
from copa_harness.optimize.search.racing import RacingPruner, Scores
from copa_harness.optimize.search.samplers import build_sampler, quiet_optuna
from copa_harness.optimize.search.scoring import Validation
from copa_harness.optimize.search.space import WEIGHTS, Point, Space
from copa_harness.optimize.step_budget import CallBudget, OutOfCalls
from copa_harness.results import Phase

logger = logging.getLogger("copa_harness")

PERFECT = 1.0 - 1e-9
"""A mean score from here on is perfect; sums of floats are not exact."""

MIN_STARTUP_TRIALS, MAX_STARTUP_TRIALS = 16, 48
"""More only delay the surrogate, which learns from every one of them."""

MIN_CANDIDATES = 8
"""Candidates before a study may stop early; fewer say too little about the options."""

MIN_LOOKS = 60
"""Scores of other candidates on examples that could be gained, before a study may stop early."""

MIN_UNPARSED_CANDIDATES, MIN_UNPARSED_ANSWERS = 3, 10
"""Candidates, and answers of each that do not parse, before a study in which nothing parses stops."""

Stopped = Literal[
    "budget",
    "perfect score",
    "no improvement",
    "no head-room",
    "no answer parses",
    "search space exhausted",
    "trials",
]

Outcome = Literal["complete", "dropped", "failed", "forbidden"]


def search(
    space: Space,
    *,
    validation: Validation,
    allowance: CallBudget,
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
    with quiet_optuna():
        race = Race(space, validation, allowance, settings, phase=phase, name=name, watchers=watchers or Watchers())
        return race.run(starts)


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
        if self.stopped == "no answer parses":
            told.append(
                f"{name}: no answer of {counted(n_trials, 'candidate')} parses; stopped with {calls:,} calls used"
            )
        return told


@dataclass(slots=True)
class _Running:
    """A trial on its way from ask to tell."""

    trial: Trial
    point: Point
    candidate: Candidate
    n_known: int
    reported: set[int] = field(default_factory=set)


class Race:
    """One study as it runs: who is the incumbent, and what was tried.

        run ── _queue_startup_trials        the incumbent's point, the starts, a balanced set
          └── _race_on ── _trial, again and again until there is a reason to stop
                            ask ── _score_block, _score_block, ... ── tell
                                     └── complete, dropped, failed or forbidden; of these only
                                         "complete" can make the trial the incumbent

    The budget ends it between two blocks; the trial that could not be finished counts as failed for Optuna and is no
    trial of the study.

    Attributes:
        incumbent: The best fully scored candidate so far.
        trials: Finished ones, in order.
    """

    def __init__(
        self,
        space: Space,
        validation: Validation,
        allowance: CallBudget,
        settings: SearchOptions,
        *,
        phase: Phase,
        name: str,
        watchers: Watchers,
    ) -> None:
        self._space, self._validation, self._allowance, self._settings = space, validation, allowance, settings
        self._phase, self._name, self._watchers = phase, name, watchers
        n_looks = max(1, math.ceil(validation.n / validation.block_size) - 1)
        self._pruner = RacingPruner(p_threshold=settings.p_threshold, n_looks=n_looks)
        sampler = build_sampler(settings.sampler, seed=settings.seed)
        self._study = optuna.create_study(direction="maximize", sampler=sampler, pruner=self._pruner)
        self._generator = np.random.default_rng([settings.seed, 303])
        self.incumbent = space.incumbent
        self.trials: list[TrialRecord] = []
        self._tried: list[Candidate] = []
        self._seen: set[tuple[str, ...]] = set()
        self._beaten_somewhere: Candidate | None = None  # the incumbent of whom this is known

    def run(self, starts: Sequence[Point]) -> SearchOutcome:
        """The whole study."""
        if not self._space.dimensions:
            return SearchOutcome(self.incumbent, (), "search space exhausted")
        try:
            self._queue_startup_trials(starts)
            stopped = self._race_on()
        except (OutOfCalls, BudgetExhausted):
            stopped = "budget"
        logger.info(
            "%s: stopped (%s) after %d trials at %.3f on %d validation examples",
            self._name,
            stopped,
            len(self.trials),
            self._validation.mean(self.incumbent),
            self._validation.n,
        )
        return SearchOutcome(self.incumbent, tuple(self.trials), stopped)

    def _queue_startup_trials(self, starts: Sequence[Point]) -> None:
        own = self._space.point_of_incumbent()
        points: list[Point] = []
        for start in ({}, *starts):
            # Options of equal content are kept once, so a start may name one that is gone.
            known = {name: option for name, option in start.items() if option in self._space.dimensions.get(name, ())}
            if {**own, **known} not in points:
                points.append({**own, **known})
        n = n_startup_trials(max(len(options) for options in self._space.dimensions.values())) - len(points)
        taken = {self._space.signature(point) for point in points}
        for point in (*points, *balanced_points(self._space, n, self._generator, taken=taken)):
            self._study.enqueue_trial(point)

    def _race_on(self) -> Stopped:
        """Race what is queued and then what the sampler proposes."""
        since_better = 0
        while len(self.trials) < self._settings.max_trials:
            if self._is_perfect:
                return "perfect score"
            before = self.incumbent
            if self.trials and not self._queue_waits:
                point = self._space.unseen(self._seen, self._generator)
                if point is None:
                    return "search space exhausted"
                if self.trials[-1].n_new == 0:
                    self._study.enqueue_trial(point)  # the sampler repeats itself: show it something new
            self._trial()
            since_better = 0 if self.incumbent is not before else since_better + 1
            if self._nothing_parses():
                return "no answer parses"
            if self._has_no_headroom():
                return "no head-room"
            if self._settings.patience is not None and since_better >= self._settings.patience:
                return "no improvement"
        return "trials"

    def _trial(self) -> None:
        """One trial from ask to tell.

        Raises:
            OutOfCalls: The allowance does not suffice for it.
        """
        trial = self._study.ask()
        point = {name: trial.suggest_categorical(name, options) for name, options in self._space.dimensions.items()}
        self._seen.add(self._space.signature(point))
        candidate = self._space.candidate(point)
        running = _Running(trial, point, candidate, self._validation.n_seen(candidate))
        outcome: Outcome | None = None
        try:
            if running.n_known == 0 and not self._allowance.can_afford(self._validation.cost_to_complete(candidate)):
                raise OutOfCalls
            while outcome is None:
                outcome = self._score_block(running)
        except (OutOfCalls, BudgetExhausted):
            self._study.tell(trial, state=TrialState.FAIL)
            raise
        if outcome == "complete" and (self._is_forbidden or self._validation.is_better(candidate, self.incumbent)):
            self.incumbent = candidate
        self._tell(running, outcome)

    def _score_block(self, running: _Running) -> Outcome | None:
        """Score the next block and report it; how the trial ended, or None while it goes on.

        Raises:
            OutOfCalls: The allowance does not suffice for the block; nothing was run.
        """
        candidate, trial = running.candidate, running.trial
        if self._watchers.forbids(candidate) is not None:
            return "forbidden"
        if not self._validation.is_complete(candidate):
            self._validation.advance(
                candidate,
                allowance=self._allowance,
                phase=self._phase,
                against=None if self._is_forbidden else self.incumbent,
            )
        for step, score in enumerate(self._validation.scores(candidate)):
            if score is not None and step not in running.reported:
                trial.report(score, step)
                running.reported.add(step)
        if math.isnan(self._validation.mean(candidate)):
            return "failed"
        if self._watchers.forbids(candidate) is not None:
            return "forbidden"
        if self._validation.is_complete(candidate):
            return "complete"
        if self._validation.nothing_parses and self._validation.n_unparsed(candidate) >= MIN_UNPARSED_ANSWERS:
            return "dropped"
        known = () if self._is_forbidden else enumerate(self._validation.scores(self.incumbent))
        self._pruner.race_against(
            {step: score for step, score in known if score is not None},
            ties_lose=candidate.size >= self.incumbent.size,  # see Validation.is_better
        )
        return "dropped" if trial.should_prune() else None

    def _tell(self, running: _Running, outcome: Outcome) -> None:
        """Tell the sampler, and everybody who watches."""
        candidate = running.candidate
        mean, n_scored = self._validation.mean(candidate), self._validation.n_seen(candidate)
        value: float | None = None
        if outcome == "complete":
            value = mean
        elif outcome == "dropped":
            # Told as complete: Optuna would take the last example's score for a pruned trial's value.
            value = self._validation.mean(self.incumbent) + self._validation.estimate(candidate, self.incumbent)
        record = TrialRecord(
            number=len(self.trials),
            point=running.point,
            n_scored=n_scored,
            score=None if math.isnan(mean) else mean,
            outcome=outcome,
            n_new=n_scored - running.n_known,
            value=value,
        )
        for key, attribute in _attributes(record).items():
            running.trial.set_user_attr(key, attribute)
        if value is None:
            self._study.tell(running.trial, state=TrialState.FAIL)
        else:
            self._study.tell(running.trial, value)
        self.trials.append(record)
        self._tried.append(candidate)
        self._show(record, self._validation.scores(candidate))

    def _show(self, record: TrialRecord, scores: Scores) -> None:
        calls = self._allowance.scope.charged_calls
        if self._watchers.journal is not None:
            self._watchers.journal.add(
                record.number,
                params=record.point,
                options=self._space.dimensions,
                value=record.value,
                scores=scores,
                attributes={**_attributes(record), "calls": calls},
            )
        if self._watchers.progress is not None:
            self._watchers.progress.trial(
                self._name,
                len(self.trials),
                scores=self._validation.scores(self.incumbent),
                ceiling=self._allowance.ceiling,
            )
        logger.debug(
            "%s: trial %d %s, %s on %d of %d; incumbent %.3f; calls %d",
            self._name,
            record.number,
            record.outcome,
            "no score" if record.score is None else f"{record.score:.3f}",
            record.n_scored,
            self._validation.n,
            self._validation.mean(self.incumbent),
            calls,
        )

    @property
    def _is_perfect(self) -> bool:
        """Whether the incumbent cannot be improved upon."""
        return not self._is_forbidden and self._validation.mean(self.incumbent) >= PERFECT

    @property
    def _is_forbidden(self) -> bool:
        """Whether the incumbent breaks a limit: then any trial that does not is better, and none is hopeless."""
        return self._watchers.forbids(self.incumbent) is not None

    @property
    def _queue_waits(self) -> bool:
        return bool(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _nothing_parses(self) -> bool:
        """Whether no answer parses, neither the incumbent's nor those of candidates that could have cured it."""
        if not self._validation.nothing_parses:
            return False
        own, tried = self._space.incumbent, self._tried
        if any(name == WEIGHTS or name.endswith(".demos") for name in self._space.dimensions):
            tried = [one for one in tried if one.n_demos or one.lms != own.lms]
        counts = {one.key: self._validation.n_unparsed(one) for one in tried if one.key != own.key}
        enough = MIN_UNPARSED_CANDIDATES * MIN_UNPARSED_ANSWERS
        return len(counts) >= MIN_UNPARSED_CANDIDATES and sum(counts.values()) >= min(
            enough, MIN_UNPARSED_CANDIDATES * self._validation.n
        )

    def _has_no_headroom(self) -> bool:
        """Whether nothing looked at so far gets an example right that the incumbent gets wrong, after enough looks."""
        if not self._settings.stop_without_headroom or self._is_forbidden:
            return False
        if self._beaten_somewhere is self.incumbent:
            return False  # an example won from it once stays won
        mine, others = self._validation.scores(self.incumbent), [self._validation.scores(one) for one in self._tried]
        if gained_examples(mine, others):
            self._beaten_somewhere = self.incumbent
        return not has_headroom(mine, others)


def _attributes(record: TrialRecord) -> dict[str, Any]:
    """What Optuna and the journal show beside a trial."""
    return {"n_scored": record.n_scored, "outcome": record.outcome, "score": record.score}


def n_startup_trials(n_options: int) -> int:
    """How many trials the sampler is to see before it chooses by itself.

    Args:
        n_options: Options of the largest dimension; twice as many trials show each of them twice.
    """
    return min(MAX_STARTUP_TRIALS, max(2 * n_options, MIN_STARTUP_TRIALS))


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


def has_headroom(incumbent: Scores, others: Sequence[Scores]) -> bool:
    """Whether going on can pay: too few candidates or looks to tell, or some example on which one of them does better.

    Args:
        incumbent: The incumbent's full scores, the incumbent being the best found so far.
        others: What the candidates scored, the incumbent's own scores among them or not.
    """
    tried = sum(any(score is not None for score in scores) for scores in others)
    if tried < MIN_CANDIDATES or informative_looks(incumbent, others) < MIN_LOOKS:
        return True
    return gained_examples(incumbent, others) > 0


def gained_examples(incumbent: Scores, others: Sequence[Scores]) -> int:
    """On how many examples at least one of the others scores higher than the incumbent."""
    gained = 0
    for i, mine in enumerate(incumbent):
        theirs = [score for scores in others if i < len(scores) and (score := scores[i]) is not None]
        gained += mine is not None and max(theirs, default=0.0) > mine
    return gained


def informative_looks(incumbent: Scores, others: Sequence[Scores]) -> int:
    """How many scores of the others could have shown a gain: those on examples the incumbent lacks full marks on."""
    return sum(
        mine is not None and mine < 1.0 and theirs is not None
        for scores in others
        for mine, theirs in zip(incumbent, scores, strict=False)
    )
