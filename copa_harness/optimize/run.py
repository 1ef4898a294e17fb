"""One optimization as it runs: the incumbent, what was learned and told, and the shares of the budget.

The steps of a strategy (`steps`) decide what is proposed and searched next; a `Run` does it with the run's settings,
and sees to it that the incumbent is only ever replaced by something no worse on validation.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from copa_harness.errors import BudgetExhausted, NoTrainingRowsError, TrainingDivergedError
from copa_harness.evaluate.progress import telling
from copa_harness.evaluate.runner import usage_since
from copa_harness.formatting import counted
from copa_harness.judge.explanations import truncated_text, what_makes_answers_parse
from copa_harness.lm.budget.scope import Scope
from copa_harness.optimize.constraints import Constraints
from copa_harness.optimize.options import SearchOptions
from copa_harness.optimize.propose.proposer import propose_demos, propose_instructions
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.journal import Journal
from copa_harness.optimize.search.progress import Progress, incumbent_text
from copa_harness.optimize.search.scoring import Validation
from copa_harness.optimize.search.space import (
    DemoSet,
    InstructionOption,
    Point,
    Space,
    WeightsChoice,
    weights_choice,
)
from copa_harness.optimize.search.study import SearchOutcome, Watchers, search
from copa_harness.optimize.search.trial_memory import SearchMemory
from copa_harness.optimize.search_context import SearchContext
from copa_harness.optimize.step_budget import CallBudget, OutOfCalls, share_of, step_scope
from copa_harness.optimize.weights import Trained, WeightsJob, refit, train_weights, wants_refit, weights_jobs
from copa_harness.results import Phase, PhaseRecord
from copa_harness.strategy import Step, StepKind
from copa_harness.tune.progress import report_progress_to

if TYPE_CHECKING:
    import dspy

logger = logging.getLogger("copa_harness")

NO_ANSWER_PARSES = "no answer parses"
"""Why a run ended that could not get one usable answer out of its model."""


class Run:
    """The state of one optimization; only its own methods change it.

        baseline ──────────── the program as written is scored and becomes the incumbent
        reserving ─┐          calls are set aside for the end
          step ────┤          once per step of the strategy:
            │      │            demo_options, instruction_options, train    what there is to choose from
            │      │            search                                      a study, its best is the incumbent
            │      │            adopt                                       or a candidate made otherwise, if no worse
            │      │            stop                                        why it ended, where it did
          ─────────┘
        choose ────────────── the end: what the adoption decided is the incumbent (see `adoption.conclude`)
        refit ─────────────── its weights, trained on validation rows too

    `recorded` blocks around all of these become the phases of the record.

    Attributes:
        context: What it was given.
        scope: Where calls are charged; while steps are taken less than the whole budget (`reserving`).
        incumbent: The best program so far.
        memory: What its trials taught.
        trained: Its trainings, in order.
        phases: What was spent, in order.
        notes: Sentences worth telling, in order.
        headlines: Those of them that are printed in the terminal as well.
        stopped: Why it ended, in one word or two; "completed" when all steps were taken.
        n_steps: Steps begun.
        n_trials: Candidates looked at.
    """

    def __init__(
        self, context: SearchContext, *, scope: Scope, journal: Journal | None = None, progress: Progress | None = None
    ) -> None:
        self.context, self.scope = context, scope
        self.journal, self.progress = journal, progress or Progress(scope)
        self.incumbent = context.student
        self.memory = SearchMemory(seed=context.settings.seed)
        self.trained: list[Trained] = []
        self.phases: list[PhaseRecord] = []
        self.notes: list[str] = []
        self.headlines: list[str] = []
        self.stopped = "completed"
        self.n_steps = self.n_trials = 0
        self._last_search = ""
        self._n_searched = self._n_proposals = 0
        self._elsewhere: set[str] = set()  # candidates that DSPy's optimizers evaluated
        self._past: dict[str, dict[str, float]] = defaultdict(dict)  # best score by predictor and instruction

    @property
    def settings(self) -> SearchOptions:
        """How to search."""
        return self.context.settings

    @property
    def validation(self) -> Validation:
        """Where candidates are scored."""
        return self.context.validation

    @property
    def constraints(self) -> Constraints:
        """Limits that the result keeps."""
        return self.context.constraints

    @property
    def student(self) -> Candidate:
        """The program as given."""
        return self.context.student

    @property
    def score(self) -> float:
        """The incumbent's mean validation score so far; nan before the baseline."""
        return self.validation.mean(self.incumbent)

    # -- its record

    @contextmanager
    def recorded(self, name: str, *, only_if_charged: bool = False) -> Iterator[None]:
        """Record the block as a phase: what it spent, said, and did to the score.

        Args:
            name: Of the phase.
            only_if_charged: Leave a block out that took no call.
        """
        before, score_before, started = self.scope.usage(), self.score, time.perf_counter()
        self.progress.at(name, scores=self.validation.scores(self.incumbent))
        first_note, charged = len(self.notes), self.scope.charged_calls
        try:
            yield
        finally:
            if not only_if_charged or self.scope.charged_calls > charged:
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

    def note_truncated(self) -> None:
        """Say once how many answers were cut off, if any were."""
        usage = self.scope.usage()
        if usage.truncated_calls:
            self.note(truncated_text(usage), headline=True)

    def stop(self, why: str, note: str = "", *, headline: bool = False) -> None:
        """Say why the run ended, if no later step goes on: "budget", "perfect score", "converged", ..."""
        self.stopped = why
        if note:
            self.note(note, headline=headline)

    def count_candidates(self, keys: Iterable[str]) -> None:
        """Count programs that DSPy's optimizers evaluated, each once, as candidates looked at."""
        new = set(keys) - self._elsewhere - {self.student.key, self.incumbent.key}
        self.n_trials += len(new)
        self._elsewhere |= new

    @property
    def n_evaluated_elsewhere(self) -> int:
        """Programs that DSPy's optimizers evaluated in full and that have no full score here."""
        return len(self._elsewhere - {one.key for one in self.validation.completed()})

    @property
    def reason(self) -> str:
        """Why it ended, in words for the report."""
        if self.stopped == "budget":
            used, whole = self.scope.charged_calls, self.scope.budget.calls
            return f"the budget: {used:,} of {whole:,.0f} calls used{self._why_a_rest()}"
        if self.stopped == "converged":
            return f"no improvement over a full cycle (epsilon {self.settings.epsilon:g}, or the noise)"
        if self.stopped == "max_cycles":
            return f"max_cycles = {self.settings.max_cycles}, the last of which still improved"
        if self.stopped == "out of reach":
            return "too few mistakes on validation for any result to be adopted"
        if self.stopped == NO_ANSWER_PARSES:
            return "no answer parses, whatever was tried"
        if self.stopped == "perfect score":
            return f"perfect score on {counted(self.validation.n, 'validation example')}"
        said = {
            "no improvement": f"no improvement in {counted(self.settings.patience or 0, 'trial')}",
            "no head-room": "no head-room",
            "no answer parses": "no answer of any candidate parses",
            "search space exhausted": "every combination was tried",
            "trials": "as many trials as there may be",
            "budget": "its share of the calls was used",
            "perfect score": "perfect score",
        }
        return "all steps taken" + (f"; the last search: {said[self._last_search]}" if self._last_search else "")

    def _why_a_rest(self) -> str:
        """Why a budget that ended the run has calls left."""
        if self.scope.remaining_calls < 1 or math.isinf(self.scope.remaining_calls) or self.scope.exhausted:
            return ""  # none is left, or it was another ceiling that ended it
        if not self.validation.is_complete(self.student):
            return "; the rest does not pay for scoring the program as written"
        if self.scope.remaining_calls < self.full_score_cost:
            return "; the rest does not pay for another candidate in full"
        return "; the rest was set aside for what comes after the search"

    # -- the incumbent

    def baseline(self) -> bool:
        """Score the student; False when the budget does not reach that far."""
        cost = self.validation.cost_to_complete(self.incumbent)
        try:
            with self.recorded("baseline"):
                whole = CallBudget(self.scope, math.inf)
                with telling(self.progress.scoring(self.validation.n)):
                    self.validation.complete(self.student, allowance=whole, phase=Phase.BASELINE)
                completed = self.constraints.completed_candidate(self.student)
                if completed.key != self.student.key:
                    self.validation.complete(completed, allowance=whole, phase=Phase.BASELINE)
                    self.incumbent = completed
                    self.note("the required texts were appended to the program's instructions")
        except (OutOfCalls, BudgetExhausted):
            self.stop(
                "budget",
                f"the budget of {self.scope.budget.calls:g} calls does not pay for scoring the program as written "
                f"({cost} calls); it is returned as it is",
                headline=True,
            )
            return False
        if (broken := self.forbids(self.incumbent)) is not None:
            text = f"the program as written breaks a limit ({broken}); only a program that keeps it is returned"
            self.note(text, headline=True)
        if self.validation.nothing_parses:
            self._warn_unparsed()
        self.progress.say(f"baseline: {incumbent_text(self.validation.scores(self.incumbent))}")
        return True

    def _warn_unparsed(self) -> None:
        text = f"no answer of the program as written parses on {counted(self.validation.n, 'validation row')}"
        self.note(text)
        self.progress.say(f"{text}; {self.how_to_parse}")

    @property
    def how_to_parse(self) -> str:
        """What answers that do not parse look like, and what helps."""
        what_helps = what_makes_answers_parse(self.scope.usage().truncated_calls)
        return f"they look like {self.validation.unparsed_text}; what helps: {what_helps}"

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """The next step of the strategy: a phase of its own, and a line of progress."""
        self.n_steps += 1
        with self.recorded(name):
            scores = self.validation.scores(self.incumbent)
            self.progress.say(f"step {name}: from {incumbent_text(scores)}")
            self.progress.at(f"step {name}", scores=scores)
            yield

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

    def choose(self, candidate: Candidate) -> None:
        """Make a candidate the incumbent, whatever its score: others have decided."""
        self.incumbent = candidate

    def forbids(self, candidate: Candidate) -> str | None:
        """Which limit a candidate breaks, as far as is known, or None; asks the guard about weights it has not seen."""
        broken = (
            self.constraints.broken_by(candidate, self.validation.cost(candidate)) if self.constraints.any else None
        )
        if broken is None and self.context.guard is not None:
            broken = self.context.guard.broken_by(candidate, scope=self.scope, say=self.note)
        return broken

    # -- shares of the budget

    @property
    def full_score_cost(self) -> int:
        """Upper estimate of the calls that scoring a fresh candidate in full takes."""
        return self.context.full_score_cost(self.incumbent)

    @contextmanager
    def reserving(self, calls: float) -> Iterator[None]:
        """Hold the block to the budget less so many calls."""
        whole = self.scope
        if not calls or math.isinf(whole.budget.calls):
            yield
            return
        try:
            with step_scope(CallBudget(whole, whole.budget.calls - calls), name="search") as self.scope:
                yield
        finally:
            self.scope = whole

    def share(self, step: Step, later: Sequence[Step]) -> CallBudget:
        """Equal shares for this and every later step that searches, after weights steps have what they need.

        That is their bare weights in full, and those behind the best prompts under two sets of demonstrations.
        """
        weights_cost = 3 * self.full_score_cost
        if step.kind is StepKind.WEIGHTS:
            searching = sum(s.kind is not StepKind.WEIGHTS for s in later)
            return CallBudget(self.scope, math.inf) if not searching else self.capped(weights_cost)
        wanted = weights_cost * sum(s.kind is StepKind.WEIGHTS for s in later)
        reserved = min(float(wanted), 0.5 * self.scope.remaining_calls) if wanted else 0.0
        if any(s.kind is StepKind.ENSEMBLE for s in later):  # asks nothing new, but for the holdout rows
            reserved += min(self.full_score_cost, 0.1 * self.scope.remaining_calls)
        searching = sum(s.kind not in (StepKind.WEIGHTS, StepKind.ENSEMBLE) for s in later)
        return share_of(self.scope, 1, 1 + searching, reserved=reserved)

    def capped(self, calls: float) -> CallBudget:
        """So many calls from here on, as far as the run has them."""
        return CallBudget(self.scope, self.scope.charged_calls + min(calls, self.scope.remaining_calls))

    def fraction(self, allowance: CallBudget, share: float) -> CallBudget:
        """A share of what an allowance has left."""
        if math.isinf(allowance.remaining):
            return allowance
        return self.capped(math.floor(allowance.remaining * share))

    # -- what there is to choose from

    def demo_options(self, allowance: CallBudget) -> dict[str, tuple[DemoSet, ...]]:
        """Fresh demonstration sets for every predictor."""
        seed = (self.settings.seed, self.n_steps, self._n_proposals)
        return propose_demos(self.context, self.incumbent, allowance=allowance, memory=self.memory, seed=seed)

    def instruction_options(self, allowance: CallBudget) -> dict[str, tuple[InstructionOption, ...]]:
        """Instructions for every predictor; the prompt LM is told what was tried and how it scored."""
        first = 1 + self._n_proposals * self.settings.n_proposed
        self._n_proposals += 1
        return propose_instructions(
            self.context,
            self.incumbent,
            allowance=allowance,
            memory=self.memory,
            past={name: tuple(scores.items()) for name, scores in self._past.items()},
            first_rollout=first,
        )

    @property
    def plain(self) -> Candidate:
        """The program as written, required texts appended."""
        return self.constraints.completed_candidate(self.student)

    def weights_jobs(self, *, demos_ahead: bool) -> tuple[WeightsJob, ...]:
        """The trainings that are worth doing now, see `weights.weights_jobs`."""
        return weights_jobs(self.context, self.plain, self.incumbent, demos_ahead=demos_ahead)

    def train(self, job: WeightsJob) -> Trained:
        """Tuned weights, which later prompt steps offer too; see `train_weights`."""
        try:
            with report_progress_to(self.progress.doing):
                trained = train_weights(job, best=self.incumbent)
        finally:
            self.progress.doing("")
        if all(one.prompts.key != trained.prompts.key for one in self.trained):
            self.trained.append(trained)
        return trained

    def refit(self, more: Sequence[dspy.Example]) -> Candidate:
        """The incumbent, with its weights trained once more on these examples too where that can be done."""
        if not self.trained or not more or not wants_refit(self.settings, self.plain.lms):
            return self.incumbent
        with self.recorded("refit"):
            try:
                with report_progress_to(self.progress.doing):
                    again = refit(self.incumbent, self.trained, more)
            except (NoTrainingRowsError, TrainingDivergedError, BudgetExhausted) as error:
                self.note(f"the weights were not trained on validation rows too: {error}")
                return self.incumbent
            finally:
                self.progress.doing("")
            if again is None:
                return self.incumbent
            if (broken := self.forbids(again.prompts)) is not None:
                self.note(f"the weights trained on validation rows too are not used: {broken}", headline=True)
                return self.incumbent
            self.note(f"refit, with the validation rows: {again.note}; validation scores are of the weights before it")
            return again.prompts

    def weights_choices(self) -> tuple[WeightsChoice, ...]:
        """All tuned weights of this run, the latest first, and the weights as given."""
        tuned = [weights_choice(one.prompts) for one in reversed(self.trained)]
        return (*tuned, weights_choice(self.student))

    def trained_on(self, candidate: Candidate) -> frozenset[int]:
        """Places of the training examples a candidate's weights may have learned from: all where that is not known."""
        if weights_choice(candidate).name == weights_choice(self.student).name:
            return frozenset()
        if not self.trained:
            return frozenset(range(len(self.context.trainset)))
        return frozenset.union(*(one.rows for one in self.trained))

    # -- searching

    def search(
        self,
        space: Space,
        allowance: CallBudget,
        *,
        phase: Phase,
        name: str,
        starts: Sequence[Point] = (),
        max_trials: int | None = None,
    ) -> str:
        """Run one study, of all the trials there may be or of fewer, and adopt its best; why it stopped."""
        space = space.with_instructions(self.constraints.completed) if self.constraints.required_text else space
        outcome = search(
            space,
            validation=self.validation,
            allowance=allowance,
            settings=replace(
                self.settings,
                seed=1000 * self.settings.seed + self._n_searched,
                max_trials=max_trials or self.settings.max_trials,
            ),
            phase=phase,
            starts=starts,
            name=name,
            watchers=self._watchers(name, space),
        )
        self._learn(name, space, outcome)
        self.incumbent, self._last_search = outcome.best, outcome.stopped
        calls = self.scope.charged_calls
        for sentence in outcome.sentences(name, size=space.size, n=self.validation.n, calls=calls):
            self.note(sentence)
        if outcome.stopped == "budget" and allowance.ceiling >= self.scope.budget.calls:
            self.stop("budget")  # and not merely this step's share
        return outcome.stopped

    def _watchers(self, name: str, space: Space) -> Watchers:
        """Who is told of the trials of a study."""
        journal = None
        if self.journal is not None:
            about = {"step": self.n_steps, "n_validation": self.validation.n, "seed": self.settings.seed}
            journal = self.journal.study(f"step {self.n_steps}: {name}", attributes=about | space.texts)
        return Watchers(progress=self.progress, journal=journal, forbids=self.forbids)

    def _learn(self, name: str, space: Space, outcome: SearchOutcome) -> None:
        """Remember the trials of a study."""
        self._n_searched += len(outcome.trials)
        self.n_trials += len(outcome.trials)
        tried = [(space.candidate(trial.point), trial.outcome) for trial in outcome.trials]
        scores = {one.key: self.validation.scores(one) for one, _ in [*tried, (space.incumbent, "")]}
        values = {space.candidate(trial.point).key: trial.value for trial in outcome.trials}
        self.memory.note_study(name, space.incumbent, tried, scores, values=values)
        for trial in outcome.trials:
            if trial.outcome == "complete" and trial.score is not None:
                for part in space.candidate(trial.point).parts:
                    known = self._past[part.predictor].get(part.instruction, -1.0)
                    self._past[part.predictor][part.instruction] = max(known, trial.score)
