"""Calling a user's metric."""

import dspy
import numpy as np
import pytest

from copa_harness.errors import ConfigurationError, MetricError
from copa_harness.evaluate.metrics import call_metric, metric_arity

EXAMPLE = dspy.Example(question="q", answer="a").with_inputs("question")
PREDICTION = dspy.Prediction(answer="a")


def score(metric, trace=None):
    return call_metric(metric, EXAMPLE, prediction=PREDICTION, trace=trace)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (True, 1.0),
        (False, 0.0),
        (1, 1.0),
        (0.25, 0.25),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
        (dspy.Prediction(score=0.75, feedback="ok"), 0.75),
        ({"score": 0.5}, 0.5),
    ],
)
def test_bools_numbers_and_predictions_with_a_score_are_scores(returned, expected):
    assert score(lambda example, prediction: returned) == expected


@pytest.mark.parametrize(
    "metric",
    [
        lambda e, p: 1.0,
        lambda e, p, trace: 1.0,
        lambda e, p, trace=None: 1.0,
        lambda gold, pred, trace, pred_name, pred_trace: 1.0,
        lambda *everything: 1.0,
    ],
)
def test_every_signature_dspy_knows_can_be_called(metric):
    assert score(metric) == 1.0


def test_the_trace_reaches_a_metric_that_takes_one():
    assert score(lambda e, p, trace=None: trace == ["step"], trace=["step"]) == 1.0


def test_an_exception_becomes_a_metric_error_with_its_cause():
    with pytest.raises(MetricError, match="'broken' raised ZeroDivisionError") as caught:
        score(broken)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def broken(example, prediction):
    return 1 / 0


@pytest.mark.parametrize("metric", ["exact", lambda: 1, lambda e: 1])
def test_what_cannot_be_called_as_a_metric_is_refused(metric):
    with pytest.raises(ConfigurationError, match="metric"):
        metric_arity(metric)
