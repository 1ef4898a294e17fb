"""What one optimization is given, once and for all: program, data, metric, models, options and limits.

Every proposer and every step gets the same `SearchContext` beside what changes from step to step (the incumbent, an
allowance, what the run remembers).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy

from copa_harness.evaluate.metrics import Metric
from copa_harness.evaluate.runner import ExampleRun, run_examples
from copa_harness.optimize.constraints import Constraints
from copa_harness.optimize.guard import Guard
from copa_harness.optimize.options import SearchOptions
from copa_harness.optimize.rollouts import Rollouts
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.scoring import Validation
from copa_harness.results import Phase


@dataclass(frozen=True, slots=True)
class SearchContext:
    """What a search works with.

    Attributes:
        student: The program as given, its models attached.
        trainset: Source of demonstrations, rules and training rows.
        validation: Where candidates are scored.
        metric: Scores an answer.
        settings: How to search.
        constraints: Limits that whatever is returned keeps.
        prompt_lm: Writes instructions; None leaves it at what needs no model. Never the task model by default: a small
            one cannot.
        teacher: Program whose traces demonstrations are bootstrapped from, with the student's predictors; None for the
            incumbent's own.
        finetune_data: Rows ``{"messages": [...]}`` to train on instead of rows made from the training examples.
        guard: Another task that weights must not get worse at.
        rollouts: What programs answered on training examples so far.
    """

    student: Candidate
    trainset: Sequence[dspy.Example]
    validation: Validation
    metric: Metric
    settings: SearchOptions
    constraints: Constraints = field(default_factory=Constraints)
    prompt_lm: Any = None
    teacher: dspy.Module | None = None
    finetune_data: Sequence[Mapping[str, Any]] | None = None
    guard: Guard | None = None
    rollouts: Rollouts = field(default_factory=Rollouts, compare=False)

    def plain_instruction(self, predictor: str) -> str:
        """The student's own instruction, required texts appended: what labels and rules are added to."""
        instructions = {part.predictor: part.instruction for part in self.student.parts}
        return self.constraints.completed(instructions[predictor])

    def full_score_cost(self, candidate: Candidate) -> int:
        """Upper estimate of the calls that scoring a candidate like this one in full takes."""
        return self.validation.n * self.validation.calls_per_example(candidate)

    def n_affordable(self, candidate: Candidate, calls: float) -> int:
        """How many training examples the candidate can be run on with so many calls."""
        n = calls / max(1, self.validation.calls_per_example(candidate))
        return len(self.trainset) if math.isinf(n) else min(len(self.trainset), int(n))

    def run_on_training(
        self, program: dspy.Module, rows: Sequence[int], *, phase: Phase, candidate: Candidate | None
    ) -> tuple[ExampleRun, ...]:
        """Run a program on training examples and keep what came out; that all of them fail is no error.

        Args:
            program: Any program.
            rows: Places of the examples in the training set.
            phase: Stamped on the calls; in `Phase.BOOTSTRAP` the metric sees the trace.
            candidate: What the program was made of; None for a teacher.
        """
        runs = run_examples(
            program,
            [self.trainset[row] for row in rows],
            metric=self.metric,
            split="train",
            phase=phase,
            threads=self.settings.threads,
        )
        self.rollouts.note(program, candidate, rows, runs)
        return runs
