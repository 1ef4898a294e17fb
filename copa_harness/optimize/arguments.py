"""The user's own arguments for a DSPy optimizer, put wherever DSPy takes them; unknown ones refused by name.

Knows signatures; knows nothing of sizes or budgets.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from copa_harness.errors import ConfigurationError
from copa_harness.optimize.registry import OptimizerJob


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
    return kind(**constructor), compile_kwargs


def parameters_of(function: Callable[..., Any]) -> set[str]:
    """Names of a function's parameters, without `self`."""
    return {name for name in inspect.signature(function).parameters if name != "self"}
