"""The user's own arguments for a DSPy optimizer, put wherever DSPy takes them; unknown ones refused by name.

Two of ours go wherever they are taken as well: the teacher, and the score from which a bootstrapped answer passes (DSPy
takes any score above 0). Knows signatures; knows nothing of sizes or budgets.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import dspy

from copa_harness.errors import ConfigurationError
from copa_harness.optimize.registry import OptimizerJob
from copa_harness.optimize.students import teacher_of

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
