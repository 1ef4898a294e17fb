"""COPA: joint optimization of weights and prompts, as a DSPy `Teleprompter`. Works with and without pytest.

    program = COPA(metric=metric, strategy="p -> w -> p", budget="light", lm=lm).compile(student, trainset=rows)
    program.copa_result.score_after

Translates arguments into a `Run` and its outcome into a program; the work is done in `steps`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from copa_harness.errors import ConfigurationError
from copa_harness.evaluate.metrics import Metric, metric_arity
from copa_harness.evaluate.runner import DEFAULT_THREADS
from copa_harness.lm.context import open_scope
from copa_harness.optimize.adoption import conclude, out_of_reach, planned, reason_of, result_of, setting_aside
from copa_harness.optimize.budget import Choice, resolved
from copa_harness.optimize.checks import at_least, check_metered, in_unit_interval, splits_of, thawed
from copa_harness.optimize.constraints import Constraints, parse_constraints
from copa_harness.optimize.dspy_optimizers.kwargs import check_optimizer_kwargs
from copa_harness.optimize.dspy_optimizers.student import models_in
from copa_harness.optimize.options import (
    GROUNDINGS,
    ProposalSettings,
    RunSettings,
    SearchSettings,
    WeightsSettings,
    check_groundings,
    check_sampler,
    parse_budget,
    parse_preference,
)
from copa_harness.optimize.run import Run
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.credit import credit_of
from copa_harness.optimize.search.journal import exclusive_journal
from copa_harness.optimize.search.progress import Progress
from copa_harness.optimize.search.scoring import Validation
from copa_harness.optimize.steps import execute
from copa_harness.results import Budget
from copa_harness.strategy import Step, parse_strategy
from copa_harness.tune.settings import check_lora

if TYPE_CHECKING:
    from copa_harness.tune.settings import LoraSettings

logger = logging.getLogger("copa_harness")


class COPA(Teleprompter):
    """Optimizes a program's weights and prompts together, within a budget of model calls.

    Args:
        metric: DSPy metric, ``metric(example, prediction, trace=None)``, giving a bool or a number in 0..1.
        strategy: What to optimize and in which order, see `parse_strategy`.
        budget: "light" (400 distinct calls), "medium" (1,600), "heavy" (6,400), "calls=500", a number, or a `Budget`.
        seed: Of every random choice. Same seed, same program.
        lm: Model of every predictor without one of its own; default `dspy.settings.lm`. Must be metered (`build_lm`,
            `ScriptedLM`), or its calls could be neither bounded nor cached.
        prompt_lm: Model that writes instructions. None proposes only instructions that need no model: a task model
            that fits in a test suite is no writer.
        threads: Examples in flight at once. Results do not depend on it.
        sampler: Optuna sampler of the study: "tpe", "random" or "gp".
        max_demos: Demonstrations in the largest sets proposed; also what weights are tuned behind when the program has
            none yet but a prompt step follows.
        n_demo_sets: Demonstration sets proposed per predictor and round; None: as many as the round can look at.
        bootstrap: Whether demonstrations are taken from the program's own passing traces; None does so where examples
            lack a predictor's outputs.
        n_proposed: Instructions asked of `prompt_lm` per predictor and round.
        groundings: What `prompt_lm` may be shown beside the step: some of `GROUNDINGS`; which of them is learned.
        n_reflected: Training examples the program is run on to find mistakes `prompt_lm` reflects on; 0 does not.
        transfer: Whether bare instructions are tried, to see which demonstrations they make redundant.
        n_rounds: Rounds of proposing and searching in a prompt or joint step.
        lora: `LoraSettings`, or a mapping of those that shall differ from the defaults, which are the trainer's with
            `epochs_with_demos` or `epochs_bare` passes: ``{"rank": 8, "learning_rate": 1e-3}``.
        epochs_with_demos: Passes over rows that carry demonstrations.
        epochs_bare: Passes over rows without demonstrations.
        bare_share: Share of the rows also rendered bare when rows carry demonstrations, 0..1.
        held_out_share: Share of the rows held out for early stopping, 0..1; 0 trains all epochs.
        n_checkpoints: Earlier epochs of a training that are offered as weights besides its last, in `joint` and in
            prompt steps after a `w`; 0 offers none. Measured: see `levels`.
        min_score: Score from which a trace counts as passing, 0..1.
        max_cycles: Cycles of ``demos -> instructions`` at most.
        epsilon: Improvement below which a cycle has converged.
        patience: Trials in a row without improvement that end a study; None never does.
        adoption_p: Level of the paired test the result must pass against the program as written, 0..1, or that is
            returned; see `evidence`. 1 keeps whatever is no worse, as is always done for DSPy's optimizers alone.
        finetune_data: Rows ``{"messages": [...]}`` to fine-tune on instead of rows made from the training examples.
        optimizer_kwargs: Arguments for DSPy optimizers by registered name, e.g. ``{"gepa": {"use_merge": False}}``.
        journal: File that keeps every trial, one JSON line each; `optuna-dashboard` opens it. A killed optimization
            started again replays from the response cache and goes on there. One process at a time
            writes it. None keeps no journal.
        constraints: Hard limits that the returned program keeps, see `Constraints`: ``{"max_prompt_tokens": 800,
            "forbidden_text": [...], "required_text": [...], "max_usd_per_answer": .., "max_seconds_per_answer": ..}``.
        prefer: "best" score, or "cheapest within 1 point of best" (also "shortest", "fastest"; see `parse_preference`);
            then the result carries the front of score and cost.
        on_progress: Takes a line of text now and then while it runs, besides the log.

    Raises:
        ConfigurationError: An argument cannot be used.
    """

    def __init__(
        self,
        *,
        metric: Metric,
        strategy: str = "p -> w -> p",
        budget: Budget | int | str = "light",
        seed: int = 0,
        lm: Any = None,
        prompt_lm: Any = None,
        threads: int = DEFAULT_THREADS,
        sampler: str = "tpe",
        max_demos: int = 9,
        n_demo_sets: int | None = None,
        bootstrap: bool | None = None,
        n_proposed: int = 4,
        groundings: Sequence[str] = GROUNDINGS,
        n_reflected: int = 8,
        transfer: bool = True,
        n_rounds: int = 2,
        lora: LoraSettings | Mapping[str, Any] | None = None,
        epochs_with_demos: int = 4,
        epochs_bare: int = 12,
        bare_share: float = 0.2,
        held_out_share: float = 0.0,
        n_checkpoints: int = 1,
        min_score: float = 1.0,
        max_cycles: int = 3,
        epsilon: float = 0.01,
        patience: int | None = 40,
        adoption_p: float = 0.2,
        finetune_data: Sequence[Mapping[str, Any]] | None = None,
        optimizer_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        journal: Path | str | None = None,
        constraints: Mapping[str, Any] | Constraints | None = None,
        prefer: str | None = None,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        metric_arity(metric)
        at_least(1, threads=threads, max_cycles=max_cycles, n_rounds=n_rounds)
        at_least(0, seed=seed, max_demos=max_demos, n_demo_sets=n_demo_sets or 0, n_proposed=n_proposed)
        at_least(0, n_checkpoints=n_checkpoints, n_reflected=n_reflected)
        in_unit_interval(bare_share=bare_share, held_out_share=held_out_share, min_score=min_score, epsilon=epsilon)
        in_unit_interval(adoption_p=adoption_p)
        check_sampler(sampler)
        check_groundings(groundings)
        check_optimizer_kwargs(optimizer_kwargs or {})
        if lora is not None and not hasattr(lora, "replaced"):
            check_lora(lora)
        self.metric = metric
        self.strategy = strategy
        self.steps: tuple[Step, ...] = parse_strategy(strategy)
        self.budget = parse_budget(budget)
        self.lm, self.prompt_lm = lm, prompt_lm
        self.finetune_data = finetune_data
        self.journal = None if journal is None else Path(journal)
        self.on_progress = on_progress
        self.constraints, self.preference = parse_constraints(constraints), parse_preference(prefer)
        self.settings = RunSettings(
            seed=seed,
            threads=threads,
            max_cycles=max_cycles,
            epsilon=epsilon,
            search=SearchSettings(sampler=sampler, patience=patience),
            proposals=ProposalSettings(
                max_demos=max_demos,
                n_demo_sets=n_demo_sets,
                bootstrap=bootstrap,
                min_score=min_score,
                n_proposed=n_proposed,
                groundings=tuple(groundings),
                n_reflected=n_reflected,
                transfer=transfer,
                n_rounds=n_rounds,
            ),
            weights=WeightsSettings(
                lora=lora,
                epochs_with_demos=epochs_with_demos,
                epochs_bare=epochs_bare,
                n_demos=max_demos,
                bare_share=bare_share,
                held_out_share=held_out_share,
                min_score=min_score,
            ),
            n_checkpoints=n_checkpoints,
            adoption_p=adoption_p,
            optimizer_kwargs=dict(optimizer_kwargs or {}),
        )

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
        observe = self.constraints.measured or self.preference is not None
        whole = Validation(
            validation_examples, metric=self.metric, threads=settings.threads, seed=settings.seed, observe=observe
        )
        validation, look = planned(whole, candidate, steps, settings, n_training=len(train), calls=self.budget.calls)
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
            run = Run(
                candidate,
                trainset=train,
                validation=validation,
                metric=self.metric,
                scope=scope,
                settings=settings,
                prompt_lm=self.prompt_lm,
                teacher=teacher,
                finetune_data=self.finetune_data,
                journal=journal,
                progress=Progress(scope, write=self.on_progress),
                constraints=self.constraints,
            )
            if choice is not None:
                run.note(str(choice), headline=True)
                run.progress.say(str(choice))
            with run.progress.ticking():
                with setting_aside(run, look):
                    execute(run, steps, why_not=None if self.preference else partial(out_of_reach, run, look))
                front = conclude(run, look, self.preference)
                credit = credit_of(run)
            run.progress.say(f"{name} ended: {reason_of(run)}")
        program = run.incumbent.program()
        program.copa_result = result_of(run, strategy=name, program=program, front=front, credit=credit)
        return program

    def _all_lms(self, student: Candidate) -> tuple[Any, ...]:
        return (*student.lms, *(() if self.prompt_lm is None else (self.prompt_lm,)))

    def _resolved(
        self, student: Candidate, n_train: int, n_validation: int
    ) -> tuple[tuple[Step, ...], RunSettings, Choice | None]:
        return resolved(
            self.steps,
            self.settings,
            student,
            n_train=n_train,
            n_validation=n_validation,
            calls=self.budget.calls,
            has_prompt_lm=self.prompt_lm is not None,
        )
