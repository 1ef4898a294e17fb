"""What goes into a DSPy optimizer and what comes out: `OptimizerJob`, `Built`, `OptimizerOutcome`.

The user's own arguments are put wherever DSPy takes them (`split_kwargs`), and unknown ones refused by name. Two of
ours go wherever they are taken as well: the teacher, and the score from which a bootstrapped answer passes (DSPy takes
any score above 0).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy

from copa_harness.errors import ConfigurationError, CopaError
from copa_harness.evaluate.metrics import Metric, call_metric
from copa_harness.optimize.dspy_optimizers.student import ProposalCount, teacher_of
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.step_budget import CallBudget

logger = logging.getLogger(__name__)

MAX_ERRORS = 10_000_000
"""Unparsable answers are counted as such by our own scoring; DSPy must not give up on the tenth."""


@dataclass(frozen=True, slots=True)
class OptimizerJob:
    """One DSPy optimizer to be run.

    Attributes:
        name: Registered name.
        incumbent: What it starts from.
        trainset, valset: As in DSPy.
        metric: The user's metric.
        allowance: Calls it may use; it is sized to them and stopped at them.
        calls_per_example: Upper estimate of the calls of one program run.
        prompt_lm: Model that writes instructions, if any.
        threads: Examples in flight at once.
        seed: Of the optimizer's random choices, where it has a seed.
        n_demos: Demonstrations per predictor at most.
        kwargs: The user's own arguments, which win over the sizes chosen here.
        teacher: Program to bootstrap from, for optimizers that take one; the incumbent itself by default.
        min_score: Score from which a bootstrapped answer passes, 0..1.
        shows: Whether a demonstration may be shown, for programs that choose theirs per input.
        proposals: Counts the instructions asked for, and those that could not be used.
        known: Keys of the candidates that were scored on the whole validation split before.
    """

    name: str
    incumbent: Candidate
    trainset: Sequence[dspy.Example]
    valset: Sequence[dspy.Example]
    metric: Metric
    allowance: CallBudget
    calls_per_example: int
    prompt_lm: Any = None
    threads: int = 8
    seed: int = 0
    n_demos: int = 9
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    teacher: dspy.Module | None = None
    min_score: float = 1.0
    shows: Callable[[Any], bool] = lambda demo: True
    proposals: ProposalCount = field(default_factory=ProposalCount)
    known: frozenset[str] = frozenset()

    @property
    def task_lm(self) -> Any:
        """The model of the first predictor; DSPy's optimizers know one task model."""
        return self.incumbent.lms[0]

    @property
    def calls(self) -> int:
        """Calls it may use, as a number to size it by."""
        return int(min(self.allowance.remaining, 1_000_000))

    @property
    def val_cost(self) -> int:
        """Calls of one pass over the validation examples."""
        return max(1, len(self.valset) * self.calls_per_example)

    @property
    def train_cost(self) -> int:
        """Calls of one pass over the training examples."""
        return len(self.trainset) * self.calls_per_example

    def scored(self, example: dspy.Example, prediction: Any, trace: Any = None) -> float:
        """The user's metric as a number, whatever its signature and return type.

        An answer on which the metric fails scores 0 here, as DSPy has no other word for it; the final scores on
        validation keep failures apart.
        """
        try:
            return call_metric(self.metric, example, prediction=prediction, trace=trace)
        except CopaError as error:
            logger.debug("metric failed inside %s: %s", self.name, error)
            return 0.0


@dataclass(frozen=True, slots=True)
class OptimizerOutcome:
    """What an optimizer found.

    Attributes:
        candidate: Its result, or the best program it had fully evaluated when the budget ended it; None without any.
        notes: Sentences about it.
        others: The other programs it fully evaluated, best first.
        evaluated: Keys of all it fully evaluated.
        covers_all: Whether that was on every validation example: their scores there then cost no further call.
    """

    candidate: Candidate | None
    notes: tuple[str, ...] = ()
    others: tuple[Candidate, ...] = ()
    evaluated: frozenset[str] = frozenset()
    covers_all: bool = False


@dataclass(frozen=True, slots=True)
class Built:
    """A constructed optimizer.

    Attributes:
        optimizer: The DSPy teleprompter.
        compile_kwargs: For its `compile`, besides the student.
        tunes_weights: Whether the models of its result are its own; otherwise the incumbent's are put back.
        takes_best_evaluation: Whether the best recorded evaluation is preferred to the program returned.
        structure: Name of a change to the program that settings cannot express; empty for none.
        note: What it was sized to.
    """

    optimizer: Any
    compile_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tunes_weights: bool = False
    takes_best_evaluation: bool = False
    structure: str = ""
    note: str = ""


_NO_TEACHER = ("gepa",)
"""Their `compile` has the argument and refuses any."""


def data_of(job: OptimizerJob) -> dict[str, Any]:
    """Training and validation examples under DSPy's names."""
    return {"trainset": list(job.trainset), "valset": list(job.valset)}


def split_kwargs(
    job: OptimizerJob, kind: Any, *, ours: dict[str, Any], at_compile: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """(optimizer, compile arguments): the user's kwargs go wherever DSPy takes them.

    Raises:
        ConfigurationError: A kwarg that neither constructor nor `compile` knows.
    """
    known = parameters_of(kind.__init__)
    known_at_compile = parameters_of(inspect.unwrap(kind.compile))
    constructor, compile_kwargs = dict(ours), dict(at_compile)
    if "metric_threshold" in known:
        constructor["metric_threshold"] = job.min_score
    for name, value in job.kwargs.items():
        if name in known and name != "metric":
            constructor[name] = value
        elif name in known_at_compile and name not in ("student", "trainset", "valset"):
            compile_kwargs[name] = value
        else:
            raise ConfigurationError(
                f"got optimizer_kwargs {name!r} for {job.name}; expected some of "
                f"{', '.join(sorted((known | known_at_compile) - {'self', 'metric', 'student', 'trainset', 'valset'}))}"
            )
    if "teacher" in known_at_compile and job.name not in _NO_TEACHER:
        compile_kwargs["teacher"] = teacher_for(
            job, given=compile_kwargs.get("teacher"), settings=constructor.get("teacher_settings")
        )
    return kind(**constructor), compile_kwargs


def teacher_for(job: OptimizerJob, *, given: Any = None, settings: Any = None) -> dspy.Module | None:
    """The program to bootstrap from, on models that stay; None for the student itself.

    Args:
        job: With the run's teacher, if it has one.
        given: A teacher from the user's arguments, which wins.
        settings: DSPy's `teacher_settings`; their `lm` answers for predictors without a model of their own, and for
            the student's own when no teacher is given.
    """
    lm = (settings or {}).get("lm")
    teacher = job.teacher if given is None else given
    if teacher is not None:
        return teacher_of(teacher, lm=lm or job.task_lm)
    if lm is None:
        return None
    student = job.incumbent.program()
    student.set_lm(lm)
    return teacher_of(student, lm=lm)


def sized(job: OptimizerJob, to: str, *names: str) -> str:
    """The note on what an optimizer was sized to: `to`, unless the user's arguments of these names say otherwise."""
    given = {name: job.kwargs[name] for name in names if job.kwargs.get(name) is not None}
    if not given:
        return f"sized to {to}"
    return "sized by its own arguments: " + ", ".join(f"{name}={value!r}" for name, value in given.items())


def parameters_of(function: Callable[..., Any]) -> set[str]:
    """Names of a function's parameters, without `self`."""
    return {name for name in inspect.signature(function).parameters if name != "self"}
