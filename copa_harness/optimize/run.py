"""One optimization as it runs: the incumbent, and the steps that may replace it.

A step proposes, scores and adopts; the incumbent after it is never worse on validation than before. Each step gets its
share of the calls that are left. Knows steps and their order; knows nothing of how an optimization is called or stored.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import dspy
import numpy as np

from copa_harness.errors import BudgetExhausted
from copa_harness.evaluate.metrics import Metric
from copa_harness.evaluate.runner import usage_since
from copa_harness.lm.scope import Scope
from copa_harness.optimize.allowance import Allowance, OutOfCalls, share_of
from copa_harness.optimize.candidate import Candidate
from copa_harness.optimize.demos import NO_DEMOS, DemoSet, labelled_pool, random_sets
from copa_harness.optimize.instructions import InstructionOption
from copa_harness.optimize.proposals import ProposalSettings, propose_demos, propose_instructions, starting_points
from copa_harness.optimize.registry import OptimizerJob, run_optimizer
from copa_harness.optimize.scoring import Validation
from copa_harness.optimize.space import Point, Space, WeightsLevel, level_of
from copa_harness.optimize.strategy import Step, StepKind
from copa_harness.optimize.study import SearchSettings, search
from copa_harness.optimize.weights import Trained, WeightsJob, WeightsSettings, train_weights
from copa_harness.results import Phase, PhaseRecord

logger = logging.getLogger("copa_harness")

PERFECT = 1.0 - 1e-9


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything an optimization is configured with; see `COPA` for the meanings."""

    seed: int
    threads: int
    max_cycles: int
    epsilon: float
    search: SearchSettings
    proposals: ProposalSettings
    weights: WeightsSettings
    optimizer_kwargs: Mapping[str, Any] = field(default_factory=dict)


class Run:
    """The state of one optimization, changed by its steps."""

    def __init__(
        self,
        student: Candidate,
        *,
        trainset: Sequence[dspy.Example],
        validation: Validation,
        metric: Metric,
        scope: Scope,
        settings: RunSettings,
        prompt_lm: Any = None,
        teacher: dspy.Module | None = None,
        finetune_data: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.student = self.incumbent = student
        self.trainset, self.validation, self.metric = trainset, validation, metric
        self.scope, self.settings = scope, settings
        self.prompt_lm, self.teacher, self.finetune_data = prompt_lm, teacher, finetune_data
        self.plain = {part.predictor: part.instruction for part in student.parts}
        self.phases: list[PhaseRecord] = []
        self.notes: list[str] = []
        self.n_trials = 0
        self.stopped = "completed"
        self.tuned: Trained | None = None
        self._past: dict[str, dict[str, float]] = defaultdict(dict)
        self._n_steps = 0
        self._n_proposals = 0

    # -- the whole

    def execute(self, steps: Sequence[Step]) -> None:
        """Score the student, then take the steps in order until they, the budget, or a perfect score end it."""
        if [step.kind for step in steps] == [StepKind.NONE]:
            return
        if not self._baseline():
            return
        for i, step in enumerate(steps):
            if self.score >= PERFECT:
                self.stopped = "perfect score"
                self._note(f"perfect score on validation before step {i + 1} ({step})")
                return
            self._n_steps += 1
            before = len(self.notes)
            with self._recorded(f"{i + 1}: {step}" if len(steps) > 1 else str(step), before):
                self._take(step, steps[i + 1 :])
        if self.score >= PERFECT and self.stopped == "completed":
            self.stopped = "perfect score"

    @property
    def score(self) -> float:
        """The incumbent's mean validation score so far; nan before the baseline."""
        return self.validation.mean(self.incumbent)

    def _take(self, step: Step, later: Sequence[Step]) -> None:
        allowance = self._share(step, later)
        try:
            if step.kind is StepKind.WEIGHTS:
                self._weights(allowance, demos_ahead=any(s.kind is not StepKind.WEIGHTS for s in later))
            elif step.kind is StepKind.PROMPTS:
                self._prompts(allowance, phase=Phase.SEARCH, name="p")
            elif step.kind is StepKind.ALTERNATE:
                self._alternate(allowance)
            elif step.kind is StepKind.JOINT:
                self._joint(allowance)
            else:
                self._optimizer(step, allowance)
        except OutOfCalls:
            self._budget_note(step)
        except BudgetExhausted:
            self._budget_note(step)

    def _budget_note(self, step: Step) -> None:
        self.stopped = "budget"
        self._note(f"the budget ended step {step}; the best program so far is kept")

    def _baseline(self) -> bool:
        cost = self.validation.cost_to_complete(self.incumbent)
        try:
            with self._recorded("baseline", len(self.notes)):
                self.validation.complete(
                    self.incumbent, allowance=Allowance(self.scope, math.inf), phase=Phase.BASELINE
                )
        except (OutOfCalls, BudgetExhausted):
            self.stopped = "budget"
            self._note(
                f"the budget of {self.scope.budget.calls:g} calls does not pay for scoring the program as written "
                f"({cost} calls); it is returned as it is"
            )
            return False
        logger.info("baseline: %.3f on %d validation examples", self.score, self.validation.n)
        return True

    # -- shares of the budget

    def _weights_cost(self) -> int:
        """Calls a weights step wants: three full scores."""
        return 3 * self.validation.n * self.validation.calls_per_example(self.incumbent)

    def _share(self, step: Step, later: Sequence[Step]) -> Allowance:
        """Equal shares for this and every later step that searches, after weights steps have what they need."""
        if step.kind is StepKind.WEIGHTS:
            searching = sum(s.kind is not StepKind.WEIGHTS for s in later)
            return Allowance(self.scope, math.inf) if not searching else self._capped(self._weights_cost())
        wanted = self._weights_cost() * sum(s.kind is StepKind.WEIGHTS for s in later)
        reserved = min(float(wanted), 0.4 * self.scope.remaining_calls) if wanted else 0.0
        searching = sum(s.kind is not StepKind.WEIGHTS for s in later)
        return share_of(self.scope, 1, 1 + searching, reserved=reserved)

    def _capped(self, calls: float) -> Allowance:
        return Allowance(self.scope, self.scope.charged_calls + min(calls, self.scope.remaining_calls))

    # -- prompts

    def _prompts(self, allowance: Allowance, *, phase: Phase, name: str) -> None:
        """One study over instructions and demonstrations (and over tuned weights that were not adopted)."""
        demos = self._demo_options(allowance)
        instructions = self._instruction_options(allowance)
        levels = self._open_levels()
        starts = starting_points(instructions, demos, weights=(level_of(self.incumbent), *levels))
        space = Space.around(self.incumbent, weights=levels, instructions=instructions, demos=demos)
        self._search(space, allowance, phase=phase, name=name, starts=starts)

    def _open_levels(self) -> tuple[WeightsLevel, ...]:
        """Tuned weights the incumbent does not use: a prompt step may still show what they are good for."""
        if self.tuned is None or self.tuned.lms == self.incumbent.lms:
            return ()
        level = level_of(self.incumbent.with_lms(self.tuned.lms))
        return () if level.name == level_of(self.incumbent).name else (level,)

    def _demo_options(self, allowance: Allowance) -> dict[str, tuple[DemoSet, ...]]:
        return propose_demos(
            self.incumbent,
            trainset=self.trainset,
            metric=self.metric,
            settings=self.settings.proposals,
            allowance=allowance,
            threads=self.settings.threads,
            seed=(self.settings.seed, self._n_steps, self._n_proposals),
            calls_per_example=self.validation.calls_per_example(self.incumbent),
            teacher=self.teacher,
        )

    def _instruction_options(self, allowance: Allowance) -> dict[str, tuple[InstructionOption, ...]]:
        first = 1 + self._n_proposals * self.settings.proposals.n_proposed
        self._n_proposals += 1
        return propose_instructions(
            self.incumbent,
            plain=self.plain,
            trainset=self.trainset,
            settings=self.settings.proposals,
            allowance=allowance,
            seed=self.settings.seed,
            prompt_lm=self.prompt_lm,
            past={name: tuple(scores.items()) for name, scores in self._past.items()},
            first_rollout=first,
        )

    def _search(
        self, space: Space, allowance: Allowance, *, phase: Phase, name: str, starts: Sequence[Point] = ()
    ) -> str:
        """Run one study and adopt its best; why it stopped."""
        settings = replace(self.settings.search, seed=1000 * self.settings.seed + self.n_trials)
        outcome = search(
            space,
            validation=self.validation,
            allowance=allowance,
            settings=settings,
            phase=phase,
            starts=starts,
            name=name,
        )
        self.n_trials += len(outcome.trials)
        for trial in outcome.trials:
            if trial.outcome == "complete" and trial.score is not None:
                for part in space.candidate(trial.point).parts:
                    known = self._past[part.predictor].get(part.instruction, -1.0)
                    self._past[part.predictor][part.instruction] = max(known, trial.score)
        self.incumbent = outcome.best
        saved = sum(self.validation.n - t.n_scored for t in outcome.trials if t.outcome == "dropped")
        self._note(
            f"{name}: {len(outcome.trials)} candidates of {space.size}, stopped: {outcome.stopped}; racing left out "
            f"{saved} of {len(outcome.trials) * self.validation.n} example evaluations"
        )
        if outcome.stopped == "budget" and allowance.ceiling >= self.scope.budget.calls:
            self.stopped = "budget"  # and not merely this step's share
        return outcome.stopped

    # -- demos -> instructions

    def _alternate(self, allowance: Allowance) -> None:
        """Demonstrations for the current instruction, then instructions for those demonstrations, until converged.

        Source: COPA's alternating scheme (compilation phase, prompt phase). A cycle without more than `epsilon` of
        improvement over both halves has converged.
        """
        for cycle in range(self.settings.max_cycles):
            before = self.score
            # Every cycle may use half of what is left, the last one all of it; demonstrations have more to choose from.
            cycle_share = allowance if cycle + 1 == self.settings.max_cycles else self._fraction(allowance, 1 / 2)
            demos_share = self._fraction(cycle_share, 2 / 3)
            demos = self._demo_options(demos_share)
            self._half(demos_share, Phase.DEMOS, f"demos {cycle + 1}", {}, demos)
            if self.score < PERFECT:
                instructions = self._instruction_options(cycle_share)
                self._half(cycle_share, Phase.INSTRUCTIONS, f"instructions {cycle + 1}", instructions, {})
            if self.score >= PERFECT:
                self.stopped = "perfect score"
                return
            if not allowance.can_afford(self.validation.n * self.validation.calls_per_example(self.incumbent)):
                self.stopped = "budget"
                return
            if self.score - before < self.settings.epsilon:
                self.stopped = "converged"
                self._note(
                    f"converged: cycle {cycle + 1} improved validation by {self.score - before:+.3f}, "
                    f"less than epsilon {self.settings.epsilon:g}"
                )
                return
        self.stopped = "max_cycles"

    def _half(
        self,
        allowance: Allowance,
        phase: Phase,
        name: str,
        instructions: Mapping[str, tuple[InstructionOption, ...]],
        demos: Mapping[str, tuple[DemoSet, ...]],
    ) -> str:
        space = Space.around(self.incumbent, instructions=instructions, demos=demos)
        starts: list[Point] = []
        if instructions:
            longest = max(len(options) for options in instructions.values())
            starts = [
                {f"{p}.instruction": options[min(i, len(options) - 1)].name for p, options in instructions.items()}
                for i in range(longest)
            ]
        return self._search(space, allowance, phase=phase, name=name, starts=starts)

    def _fraction(self, allowance: Allowance, share: float) -> Allowance:
        if math.isinf(allowance.remaining):
            return allowance
        return self._capped(math.floor(allowance.remaining * share))

    # -- weights

    def _train(self, *, demos_ahead: bool) -> Trained:
        n_calls = len(self.trainset) * self.validation.calls_per_example(self.incumbent)
        return train_weights(
            WeightsJob(
                incumbent=self.incumbent,
                trainset=self.trainset,
                metric=self.metric,
                settings=self.settings.weights,
                demos_ahead=demos_ahead,
                seed=self.settings.seed,
                threads=self.settings.threads,
                can_afford_traces=n_calls <= self.scope.remaining_calls,
                finetune_data=self.finetune_data,
            )
        )

    def _weights(self, allowance: Allowance, *, demos_ahead: bool) -> None:
        """Train, then adopt the tuned weights under whichever prompt serves them best, if that is not worse."""
        trained = self.tuned = self._train(demos_ahead=demos_ahead)
        self._note(f"w: {trained.note}")
        whole = Allowance(self.scope, math.inf)
        best: Candidate | None = None
        for candidate in self._serving_prompts(trained):
            # The first prompt is always tried; further ones only within this step's share.
            if best is not None and not allowance.can_afford(self.validation.cost_to_complete(candidate)):
                break
            self.validation.complete(candidate, allowance=whole, phase=Phase.WEIGHTS)
            logger.info("w: tuned weights, %d demonstrations: %.3f", candidate.n_demos, self.validation.mean(candidate))
            if best is None or self.validation.is_better(candidate, best):
                best = candidate
        if best is not None:
            self._adopt(best, what="w: tuned weights")

    def _adopt(self, candidate: Candidate, *, what: str) -> None:
        """Make a fully scored candidate the incumbent if it is not worse."""
        difference = self.validation.difference(candidate, self.incumbent)
        if difference >= -1e-9:
            self._note(f"{what} adopted ({difference:+.3f} on validation, {candidate.n_demos} demonstrations)")
            self.incumbent = candidate
        else:
            self._note(f"{what} not adopted ({difference:+.3f} on validation)")

    def _serving_prompts(self, trained: Trained) -> list[Candidate]:
        """The incumbent's prompts on the tuned weights; fresh demonstrations as in training; none."""
        tuned = self.incumbent.with_lms(trained.lms)
        found = [tuned]
        if trained.n_demos:
            fresh: dict[str, tuple[Any, ...]] = {}
            for i, (name, predictor) in enumerate(self.incumbent.template.named_predictors()):
                generator = np.random.default_rng([self.settings.seed, self._n_steps, i, 707])
                pool = labelled_pool(predictor.signature, self.trainset)
                sets = random_sets(pool, label="labelled", counts={trained.n_demos: 1}, generator=generator)
                if sets:
                    fresh[name] = sets[0].demos
            found.append(tuned.with_demos(fresh))
            found.append(tuned.with_demos({part.predictor: NO_DEMOS.demos for part in tuned.parts}))
        return list({candidate.key: candidate for candidate in found}.values())

    # -- joint

    def _joint(self, allowance: Allowance) -> None:
        """One study over weights and prompts at once.

        Levels of the weights: as they are, tuned behind demonstrations, tuned bare.
        """
        levels = []
        for demos_ahead in (True, False):
            trained = self._train(demos_ahead=demos_ahead)
            self._note(f"joint: {trained.note}")
            levels.append(level_of(self.incumbent.with_lms(trained.lms)))
        demos = self._demo_options(allowance)
        instructions = self._instruction_options(allowance)
        space = Space.around(self.incumbent, weights=levels, instructions=instructions, demos=demos)
        first = {f"{name}.demos": sets[0].name for name, sets in demos.items()}
        bare = {f"{name}.demos": NO_DEMOS.name for name in demos}
        starts: list[Point] = [
            {"weights": levels[0].name, **first},
            {"weights": levels[-1].name, **bare},
            *starting_points(instructions, demos),
        ]
        self._search(space, allowance, phase=Phase.SEARCH, name="joint", starts=starts)

    # -- DSPy's optimizers

    def _optimizer(self, step: Step, allowance: Allowance) -> None:
        """A DSPy optimizer on the incumbent; its result is adopted if it is not worse on validation."""
        cost = self.validation.n * self.validation.calls_per_example(self.incumbent)
        if not allowance.can_afford(2 * cost):
            raise OutOfCalls
        job = OptimizerJob(
            name=step.name,
            incumbent=self.incumbent,
            trainset=self.trainset,
            valset=self.validation.examples,
            metric=self.metric,
            allowance=Allowance(self.scope, self.scope.charged_calls + allowance.remaining - cost),
            calls_per_example=self.validation.calls_per_example(self.incumbent),
            prompt_lm=self.prompt_lm,
            threads=self.settings.threads,
            seed=self.settings.seed,
            n_demos=self.settings.proposals.max_demos,
            kwargs=self.settings.optimizer_kwargs.get(step.name, {}),
        )
        found = run_optimizer(job)
        for note in found.notes:
            self._note(f"{step}: {note}")
        if found.candidate is None:
            return
        self.validation.complete(found.candidate, allowance=Allowance(self.scope, math.inf), phase=Phase.SEARCH)
        self._adopt(found.candidate, what=f"{step}: result")

    # -- records

    @contextmanager
    def _recorded(self, name: str, first_note: int) -> Iterator[None]:
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

    def _note(self, text: str) -> None:
        self.notes.append(text)
        logger.info("%s", text)
