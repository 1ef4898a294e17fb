"""Calling a user's metric: any of DSPy's signatures in, one number in 0..1 out, or a clear `MetricError`.

What a metric asks a model is booked as `Phase.METRIC`, and the first traceback of a metric that raises is kept in the
scope. DSPy metrics take (example, prediction), (example, prediction, trace), or for GEPA (gold, pred, trace, pred_name,
pred_trace), and return a bool, a number or a `dspy.Prediction(score=...)`.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable
from typing import Any

import dspy

from copa_harness.credentials import mask_text
from copa_harness.errors import ConfigurationError, MetricError
from copa_harness.lm.call_context import booked_as, current_scope
from copa_harness.results import Phase

Metric = Callable[..., Any]
"""A DSPy metric."""


def metric_name(metric: Metric) -> str:
    """The name a metric is called in messages."""
    return getattr(metric, "__name__", type(metric).__name__)


def metric_arity(metric: Metric) -> int:
    """How many positional arguments the metric is to be called with: 2 to 5.

    Raises:
        ConfigurationError: It is not callable, or cannot be called with 2 to 5 positional arguments.
    """
    if not callable(metric):
        raise ConfigurationError(
            f"got {metric!r} as the metric; expected a function metric(example, prediction, trace=None)"
        )
    for arity in (3, 2, 5, 4):
        if takes_arguments(metric, arity):
            return arity
    raise ConfigurationError(
        f"got a metric with the signature {metric_name(metric)}{inspect.signature(metric)}; "
        "expected metric(example, prediction, trace=None)"
    )


def takes_arguments(metric: Metric, n: int) -> bool:
    """Whether the metric can be called with `n` positional arguments; without a readable signature, with 2."""
    try:
        inspect.signature(metric).bind(*range(n))
    except ValueError:
        return n == 2
    except TypeError:
        return False
    return True


def call_metric(
    metric: Metric, example: dspy.Example, *, prediction: Any, trace: Any = None, arity: int | None = None
) -> float:
    """The metric's score of one prediction.

    Args:
        metric: A DSPy metric of 2 to 5 arguments.
        example: The example with its labels.
        prediction: What the program returned.
        trace: DSPy's trace while bootstrapping (metrics may be stricter then), else None.
        arity: `metric_arity(metric)` if it is known: reading a signature takes longer than most metrics.

    Returns:
        A score in 0..1.

    Raises:
        MetricError: The metric raised, or returned something that is not a number in 0..1.
    """
    arguments = (example, prediction, trace, None, None)[: metric_arity(metric) if arity is None else arity]
    try:
        with booked_as(Phase.METRIC):
            returned = metric(*arguments)
    except Exception as error:
        current_scope().note_failure("metric exception", mask_text(traceback.format_exc()))
        raise MetricError(f"the metric {metric_name(metric)!r} raised {type(error).__name__}: {error}") from error
    return score_of(returned, name=metric_name(metric))


def score_of(returned: Any, *, name: str = "metric") -> float:
    """What a metric returned, as a float in 0..1.

    Raises:
        MetricError: It is not a number in 0..1.
    """
    value = returned
    if isinstance(value, dspy.Prediction):
        value = value.get("score", returned)
    elif isinstance(value, dict) and "score" in value:
        value = value["score"]
    if hasattr(value, "item") and not isinstance(value, (bool, int, float)):
        value = value.item()
    if not isinstance(value, (bool, int, float)):
        raise MetricError(
            f"got {returned!r} from the metric {name!r}; "
            "expected a bool, a number in 0..1 or dspy.Prediction(score=...)"
        )
    score = float(value)
    if not math.isfinite(score) or not 0.0 <= score <= 1.0:
        raise MetricError(
            f"got {score} from the metric {name!r}; "
            "expected a number in 0..1 (divide a score of another range by its maximum)"
        )
    return score
