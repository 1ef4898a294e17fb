"""COPA: joint optimization of weights and prompts, as a DSPy `Teleprompter`. Works with and without pytest.

    program = COPA(metric=metric, strategy="p -> w -> p", budget="light", lm=lm).compile(student, trainset=rows)
    program.copa_result.score_after

Translates arguments into a `Run` and its outcome into a program; the work is done in `steps`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from copa_harness.errors import ConfigurationError
from copa_harness.evaluate.metrics import Metric, metric_arity
from copa_harness.lm.call_context import open_scope
from copa_harness.optimize.adoption import conclude, out_of_reach, plan_holdout
from copa_harness.optimize.checks import check_metered, splits_of, thawed
from copa_harness.optimize.constraints import parse_constraints
from copa_harness.optimize.dspy_optimizers.student import models_in
from copa_harness.optimize.guard import Guard, guard_task
from copa_harness.optimize.options import SearchOptions, parse_budget, parse_preference
from copa_harness.optimize.result import result_of
from copa_harness.optimize.run import Run
from copa_harness.optimize.search.advice import advise
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.credit import credit_of
from copa_harness.optimize.search.journal import SharedJournal, exclusive_journal
from copa_harness.optimize.search.progress import Progress
from copa_harness.optimize.search.scoring import Validation
from copa_harness.optimize.search_context import SearchContext
from copa_harness.optimize.step_budget import Choice, resolved
from copa_harness.optimize.steps import execute
from copa_harness.option_fields import check_names, options_of, values_of
from copa_harness.results import Budget
from copa_harness.robustness.perturbations import Forms
from copa_harness.strategy import Step, StepKind, parse_strategy

logger = logging.getLogger("copa_harness")


_BEFORE = {"min_score": "pass_score"}
"""Names that arguments had, and have."""


class COPA(Teleprompter):
    """Optimizes a program's weights and prompts together, within a budget of model calls.

    Args:
        metric: DSPy metric, ``metric(example, prediction, trace=None)``, giving a bool or a number in 0..1.
        strategy: What to optimize and in which order, see `parse_strategy`.
        budget: "light" (400 distinct calls), "medium" (1,600), "heavy" (6,400), "calls=500", a number, or a `Budget`.
        lm: Model of every predictor without one of its own; default `dspy.settings.lm`. Must be metered (`build_lm`,
            `ScriptedLM`), or its calls could be neither bounded nor cached.
        prompt_lm: Model that writes instructions. None proposes only instructions that need no model: a task model
            that fits in a test suite is no writer.
        finetune_data: Rows ``{"messages": [...]}`` to fine-tune on instead of rows made from the training examples.
        journal: File that keeps every trial, one JSON line each; `optuna-dashboard` opens it. A killed optimization
            started again replays from the response cache and goes on there. One process at a time writes it. None keeps
            no journal.
        on_progress: Takes a line of text now and then while it runs, besides the log.
        **search: How it searches, by name: the fields of `SearchOptions` (`seed`, `threads`, `n_proposed`, ...).

    Attributes:
        settings: The `SearchOptions`.

    Raises:
        ConfigurationError: An argument cannot be used.
    """

    def __init__(
        self,
        *,
        metric: Metric,
        strategy: str = "p -> w -> p",
        budget: Budget | int | str = "light",
        lm: Any = None,
        prompt_lm: Any = None,
        finetune_data: Sequence[Mapping[str, Any]] | None = None,
        journal: Path | str | SharedJournal | None = None,
        on_progress: Callable[[str], None] | None = None,
        **search: Any,
    ) -> None:
        super().__init__()
        metric_arity(metric)
        given = {_BEFORE.get(name, name): value for name, value in search.items()}
        own = list(signature(COPA).parameters)[:-1]
        check_names(given, [*own, *options_of(SearchOptions)], where="COPA")
        self.settings = SearchOptions(**given)
        self.metric = metric
        self.strategy = strategy
        self.steps: tuple[Step, ...] = parse_strategy(strategy)
        self.budget = parse_budget(budget)
        self.lm, self.prompt_lm = lm, prompt_lm
        self.finetune_data = finetune_data
        self.journal = Path(journal) if isinstance(journal, str) else journal
        self.on_progress = on_progress
        self.constraints = parse_constraints(self.settings.constraints)
        self.preference = parse_preference(self.settings.prefer)

    @classmethod
    def from_options(cls, options: SearchOptions, **arguments: Any) -> COPA:
        """An optimizer that searches as `options` say; the other arguments as for `COPA`."""
        return cls(**arguments, **values_of(options))

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: list[dspy.Example],
        teacher: dspy.Module | None = None,
        valset: list[dspy.Example] | None = None,
        **kwargs: Any,
    ) -> dspy.Module:
        """The best program found, with its models attached and the record of the run as `copa_result`.

        The student is not changed. The result is never worse on validation than the student, also when the budget ends
        the run early.

        Args:
            student: The program to optimize.
            trainset: Labelled examples: source of demonstrations, rules and training rows.
            teacher: Program whose traces demonstrations are bootstrapped from, if not the student's own.
            valset: Labelled examples that decide; default a seeded third of the training examples.
            **kwargs: Refused; DSPy's signature has them.

        Raises:
            TaskError: A split is empty or too small, or the program has no predictors.
            ConfigurationError: No metered model, or a strategy the model cannot do.
            ProviderError, MetricError, TrainingError: The model, the metric or a training failed throughout.
        """
        if kwargs:
            raise ConfigurationError(
                f"got unknown argument(s) {', '.join(sorted(kwargs))}; compile takes trainset, valset and teacher"
            )
        train, validation_examples = splits_of(trainset, valset, steps=self.steps, seed=self.settings.seed)
        candidate = Candidate.of(thawed(student), lm=self.lm or dspy.settings.lm)
        for lm in (*self._all_lms(candidate), *models_in(teacher)):
            check_metered(lm)
        steps, settings, choice = self._resolved(candidate, len(train), len(validation_examples))
        advises = self.steps[0].kind is StepKind.ADVISE
        observe = self.constraints.measured or self.preference is not None or advises
        forms = Forms(settings.perturbations, settings.seed, self.prompt_lm) if settings.robust else None
        whole = Validation(
            validation_examples,
            metric=self.metric,
            threads=settings.threads,
            seed=settings.seed,
            observe=observe,
            forms=forms,
        )
        validation, plan = plan_holdout(
            whole, candidate, steps, settings, n_training=len(train), calls=self.budget.calls
        )
        name = " -> ".join(map(str, self.steps))
        logger.info(
            "optimizing %s with %s: %d training and %d validation examples, budget %s",
            type(student).__name__,
            name,
            len(train),
            validation.n,
            self.budget.name,
        )
        about = {"strategy": name, "budget": self.budget.name}
        with (
            exclusive_journal(self.journal, attributes=about) as journal,
            open_scope(f"COPA {name}", budget=self.budget) as scope,
            dspy.context(lm=candidate.lms[0]),
        ):
            context = SearchContext(
                candidate,
                train,
                validation,
                self.metric,
                settings,
                constraints=self.constraints,
                prompt_lm=self.prompt_lm,
                teacher=teacher,
                finetune_data=self.finetune_data,
                guard=self._guard(candidate, whole),
            )
            run = Run(context, scope=scope, journal=journal, progress=Progress(scope, write=self.on_progress))
            if forms is not None:
                run.note(f"robust: a row counts as the worst of itself and its forms {', '.join(forms.labels)}")
            if choice is not None:
                run.note(str(choice), headline=True)
                run.progress.say(str(choice))
            with run.progress.ticking():
                with run.reserving(plan.cost + advises * context.full_score_cost(candidate)):
                    execute(run, steps, why_not=None if self.preference else partial(out_of_reach, run, plan))
                adoption = conclude(run, plan, self.preference)
                run.choose(adoption.program)
                if advises:
                    advise(run)
                credit = credit_of(run)
                returned = run.refit(validation_examples)
            run.note_truncated()
            run.progress.say(f"{name} ended: {run.reason}")
        program = returned.program()
        program.copa_result = result_of(run, adoption, strategy=name, returned=returned, credit=credit)
        return program

    def _guard(self, student: Candidate, validation: Validation) -> Guard | None:
        if self.settings.guard is None:
            return None
        task = guard_task(self.settings.guard)
        rows = Validation(task.valset, metric=task.metric, threads=validation.threads, seed=self.settings.seed)
        return Guard(task, self.settings.guard_margin, student.lms, rows)

    def _all_lms(self, student: Candidate) -> tuple[Any, ...]:
        return (*student.lms, *(() if self.prompt_lm is None else (self.prompt_lm,)))

    def _resolved(
        self, student: Candidate, n_train: int, n_validation: int
    ) -> tuple[tuple[Step, ...], SearchOptions, Choice | None]:
        return resolved(
            self.steps,
            self.settings,
            student,
            n_train=n_train,
            n_validation=n_validation,
            calls=self.budget.calls,
            has_prompt_lm=self.prompt_lm is not None,
        )
