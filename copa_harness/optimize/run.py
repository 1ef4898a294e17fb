"""One optimization as it runs: the incumbent, its record, and the shares of the budget.

What every step needs: proposing, searching, training and adopting with the run's settings. The incumbent is only ever
replaced by something no worse on validation.

What a run tells of itself: sentences, headlines, and what every phase spent and did to the score.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import dspy

from copa_harness.errors import BudgetExhausted
from copa_harness.evaluate.metrics import Metric
from copa_harness.evaluate.runner import usage_since
from copa_harness.lm.budget.scope import Scope
from copa_harness.optimize.budget import Allowance, OutOfCalls, share_of
from copa_harness.optimize.constraints import Constraints
from copa_harness.optimize.options import SearchOptions
from copa_harness.optimize.propose.proposer import propose_demos, propose_instructions, sized
from copa_harness.optimize.search.bandit import Knowledge
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.journal import Journal
from copa_harness.optimize.search.progress import Progress, incumbent_text
from copa_harness.optimize.search.scoring import Validation
from copa_harness.optimize.search.space import (
    DemoSet,
    InstructionOption,
    Point,
    Space,
    WeightsLevel,
    checkpoint_levels,
    level_of,
)
from copa_harness.optimize.search.study import Watchers, search
from copa_harness.optimize.weights import Trained, WeightsJob, train_weights
from copa_harness.results import Phase, PhaseRecord
from copa_harness.strategy import Step, StepKind
from copa_harness.tune.progress import report_progress_to

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


class Run(Story):
    """The state of one optimization, changed by its steps."""

    def __init__(
        self,
        student: Candidate,
        *,
        trainset: Sequence[dspy.Example],
        validation: Validation,
        metric: Metric,
        scope: Scope,
        settings: SearchOptions,
        prompt_lm: Any = None,
        teacher: dspy.Module | None = None,
        finetune_data: Sequence[Mapping[str, Any]] | None = None,
        journal: Journal | None = None,
        progress: Progress | None = None,
        constraints: Constraints | None = None,
    ) -> None:
        super().__init__(scope)
        self.constraints = constraints or Constraints()
        self.journal, self.progress = journal, progress or Progress(scope)
        self.student = self.incumbent = student
        self.trainset, self.validation, self.metric = trainset, validation, metric
        self.settings = settings
        self.prompt_lm, self.teacher, self.finetune_data = prompt_lm, teacher, finetune_data
        self.plain = {part.predictor: self.constraints.completed(part.instruction) for part in student.parts}
        self.evidence: Mapping[str, Any] = {}
        self.passed_over: frozenset[str] = frozenset()  # finalists that lost the last look
        self.n_trials = self._n_searched = 0
        self._elsewhere: set[str] = set()  # candidates that DSPy's optimizers evaluated
        self.stopped, self.last_search = "completed", ""
        self.tuned: Trained | None = None
        self._past: dict[str, dict[str, float]] = defaultdict(dict)
        self.knowledge = Knowledge(seed=settings.seed)
        self.n_steps = 0
        self._n_proposals = 0

    # -- the incumbent

    @property
    def score(self) -> float:
        """The incumbent's mean validation score so far; nan before the baseline."""
        return self.validation.mean(self.incumbent)

    def budget_note(self, step: Step) -> None:
        """Note that the budget ended a step."""
        self.stopped = "budget"
        self.note(f"the budget ended step {step}; the best program so far is kept")

    def count_candidates(self, keys: Iterable[str]) -> None:
        """Count programs that DSPy's optimizers evaluated, each once, as candidates looked at."""
        new = set(keys) - self._elsewhere - {self.student.key, self.incumbent.key}
        self.n_trials += len(new)
        self._elsewhere |= new

    @property
    def n_evaluated_elsewhere(self) -> int:
        """Programs that DSPy's optimizers evaluated in full and that have no full score here."""
        return len(self._elsewhere - {one.key for one in self.validation.completed()})

    def baseline(self) -> bool:
        """Score the student; False when the budget does not reach that far."""
        cost = self.validation.cost_to_complete(self.incumbent)
        try:
            with self.recorded("baseline", len(self.notes)):
                whole = Allowance(self.scope, math.inf)
                self.validation.complete(self.student, allowance=whole, phase=Phase.BASELINE)
                completed = self.constraints.completed_candidate(self.student)
                if completed.key != self.student.key:
                    self.validation.complete(completed, allowance=whole, phase=Phase.BASELINE)
                    self.incumbent = completed
                    self.note("the required texts were appended to the program's instructions")
        except (OutOfCalls, BudgetExhausted):
            self.stopped = "budget"
            self.note(
                f"the budget of {self.scope.budget.calls:g} calls does not pay for scoring the program as written "
                f"({cost} calls); it is returned as it is",
                headline=True,
            )
            return False
        if (broken := self.forbids(self.incumbent)) is not None:
            text = f"the program as written breaks a limit ({broken}); only a program that keeps it is returned"
            self.note(text, headline=True)
        self.progress.say(f"baseline: {incumbent_text(self.validation.scores(self.incumbent))}")
        return True

    # -- shares of the budget

    @property
    def full_score_cost(self) -> int:
        """Upper estimate of the calls that scoring a fresh candidate in full takes."""
        return self.validation.n * self.validation.calls_per_example(self.incumbent)

    def weights_cost(self) -> int:
        """Calls a weights step wants: three full scores."""
        return 3 * self.full_score_cost

    def share(self, step: Step, later: Sequence[Step]) -> Allowance:
        """Equal shares for this and every later step that searches, after weights steps have what they need."""
        if step.kind is StepKind.WEIGHTS:
            searching = sum(s.kind is not StepKind.WEIGHTS for s in later)
            return Allowance(self.scope, math.inf) if not searching else self.capped(self.weights_cost())
        wanted = self.weights_cost() * sum(s.kind is StepKind.WEIGHTS for s in later)
        reserved = min(float(wanted), 0.4 * self.scope.remaining_calls) if wanted else 0.0
        if any(s.kind is StepKind.ENSEMBLE for s in later):  # asks nothing new, but for a last look at other rows
            reserved += min(self.full_score_cost, 0.1 * self.scope.remaining_calls)
        searching = sum(s.kind not in (StepKind.WEIGHTS, StepKind.ENSEMBLE) for s in later)
        return share_of(self.scope, 1, 1 + searching, reserved=reserved)

    def capped(self, calls: float) -> Allowance:
        """So many calls from here on, as far as the run has them."""
        return Allowance(self.scope, self.scope.charged_calls + min(calls, self.scope.remaining_calls))

    # -- prompts

    def open_levels(self) -> tuple[WeightsLevel, ...]:
        """Tuned weights the incumbent does not use: a prompt step may still show what they are good for."""
        if self.tuned is None or self.tuned.lms == self.incumbent.lms:
            return ()
        level = level_of(self.incumbent.with_lms(self.tuned.lms))
        return () if level.name == level_of(self.incumbent).name else (level,)

    def checkpoint_levels(self) -> tuple[WeightsLevel, ...]:
        """Other epochs of the last training."""
        lms = () if self.tuned is None else self.tuned.lms
        return checkpoint_levels(self.incumbent, lms, n=self.settings.n_checkpoints)

    def demo_options(self, allowance: Allowance) -> dict[str, tuple[DemoSet, ...]]:
        """Fresh demonstration sets for every predictor."""
        return propose_demos(
            self.incumbent,
            trainset=self.trainset,
            metric=self.metric,
            settings=sized(self.settings, calls=allowance.remaining, full_score=self.full_score_cost),
            allowance=allowance,
            threads=self.settings.threads,
            seed=(self.settings.seed, self.n_steps, self._n_proposals),
            calls_per_example=self.validation.calls_per_example(self.incumbent),
            teacher=self.teacher,
            knowledge=self.knowledge,
            mistakes=self.validation.mistakes(self.incumbent),
        )

    def instruction_options(self, allowance: Allowance) -> dict[str, tuple[InstructionOption, ...]]:
        """Instructions for every predictor; the prompt LM is told what was tried and how it scored."""
        first = 1 + self._n_proposals * self.settings.n_proposed
        self._n_proposals += 1
        return propose_instructions(
            self.incumbent,
            plain=self.plain,
            trainset=self.trainset,
            settings=self.settings,
            allowance=allowance,
            seed=self.settings.seed,
            prompt_lm=self.prompt_lm,
            metric=self.metric,
            threads=self.settings.threads,
            calls_per_example=self.validation.calls_per_example(self.incumbent),
            knowledge=self.knowledge,
            past={name: tuple(scores.items()) for name, scores in self._past.items()},
            first_rollout=first,
        )

    def search(
        self, space: Space, allowance: Allowance, *, phase: Phase, name: str, starts: Sequence[Point] = ()
    ) -> str:
        """Run one study and adopt its best; why it stopped."""
        space = space.with_instructions(self.constraints.completed) if self.constraints.required_text else space
        settings = replace(self.settings, seed=1000 * self.settings.seed + self._n_searched)
        outcome = search(
            space,
            validation=self.validation,
            allowance=allowance,
            settings=settings,
            phase=phase,
            starts=starts,
            name=name,
            watchers=self.watchers(name, space),
        )
        self._n_searched += len(outcome.trials)
        self.n_trials, self.last_search = self.n_trials + len(outcome.trials), outcome.stopped
        tried = [(space.candidate(trial.point), trial.outcome) for trial in outcome.trials]
        scores = {one.key: self.validation.scores(one) for one, _ in [*tried, (space.incumbent, "")]}
        values = {space.candidate(trial.point).key: trial.value for trial in outcome.trials}
        self.knowledge.note_study(name, space.incumbent, tried, scores, values=values)
        for trial in outcome.trials:
            if trial.outcome == "complete" and trial.score is not None:
                for part in space.candidate(trial.point).parts:
                    known = self._past[part.predictor].get(part.instruction, -1.0)
                    self._past[part.predictor][part.instruction] = max(known, trial.score)
        self.incumbent = outcome.best
        n = self.validation.n
        for sentence in outcome.sentences(name, size=space.size, n=n, calls=self.scope.charged_calls):
            self.note(sentence)
        if outcome.stopped == "budget" and allowance.ceiling >= self.scope.budget.calls:
            self.stopped = "budget"  # and not merely this step's share
        return outcome.stopped

    def watchers(self, name: str, space: Space) -> Watchers:
        """Who is told of the trials of a study."""
        journal = None
        if self.journal is not None:
            about = {"step": self.n_steps, "n_validation": self.validation.n, "seed": self.settings.seed}
            journal = self.journal.study(f"step {self.n_steps}: {name}", attributes=about | space.texts)
        return Watchers(progress=self.progress, journal=journal, forbids=self.forbids)

    def forbids(self, candidate: Candidate) -> str | None:
        """Which limit a candidate breaks, as far as is known, or None."""
        return self.constraints.broken_by(candidate, self.validation.cost(candidate)) if self.constraints.any else None

    def fraction(self, allowance: Allowance, share: float) -> Allowance:
        """A share of what an allowance has left."""
        if math.isinf(allowance.remaining):
            return allowance
        return self.capped(math.floor(allowance.remaining * share))

    # -- weights

    def train(self, *, demos_ahead: bool) -> Trained:
        """Tuned weights for the incumbent's prompts; see `train_weights`."""
        n_calls = len(self.trainset) * self.validation.calls_per_example(self.incumbent)
        try:
            with report_progress_to(self.progress.doing):
                return train_weights(
                    WeightsJob(
                        incumbent=self.incumbent,
                        trainset=self.trainset,
                        metric=self.metric,
                        settings=self.settings,
                        demos_ahead=demos_ahead,
                        seed=self.settings.seed,
                        threads=self.settings.threads,
                        can_afford_traces=n_calls <= self.scope.remaining_calls,
                        finetune_data=self.finetune_data,
                    )
                )
        finally:
            self.progress.doing("")

    def adopt(self, candidate: Candidate, *, what: str) -> None:
        """Make a fully scored candidate the incumbent if it keeps all limits and is not worse."""
        difference = self.validation.difference(candidate, self.incumbent)
        if candidate.key == self.incumbent.key:
            self.note(f"{what}: the program it began with")
        elif (broken := self.forbids(candidate)) is not None:
            self.note(f"{what} not adopted: {broken}")
        elif difference >= -1e-9 or self.forbids(self.incumbent) is not None:
            self.note(f"{what} adopted ({difference:+.3f} on validation, {candidate.n_demos} demonstrations)")
            self.incumbent = candidate
        else:
            self.note(f"{what} not adopted ({difference:+.3f} on validation)")
