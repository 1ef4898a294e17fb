"""Reflection: what the incumbent answers wrong, which predictor is to blame, and how that reads to a prompt LM.

Source: GEPA (Agrawal et al. 2025, arXiv 2507.19457): an LM that sees inputs, outputs and the metric's feedback in words
proposes better than one that sees scores. Mistakes are looked for on training examples, never on validation. Blame goes
along the trace: a predictor whose own outputs are labelled is to blame when they are wrong and cleared when they are
right; predictors without labels before the first wrong one stay suspects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import dspy
import numpy as np

from copa_harness.evaluate.examples import input_values, label_values
from copa_harness.evaluate.metrics import Metric, metric_arity, takes_arguments
from copa_harness.evaluate.runner import ExampleRun
from copa_harness.lm.call_context import booked_as
from copa_harness.optimize.propose.render import Failure, short
from copa_harness.optimize.propose.schema import strata_of, stratified_order, text_of
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.step_budget import CallBudget
from copa_harness.results import Phase

if TYPE_CHECKING:
    from copa_harness.optimize.search_context import SearchContext


def find_failures(
    context: SearchContext, incumbent: Candidate, *, allowance: CallBudget, generator: np.random.Generator
) -> dict[str, list[Failure]]:
    """What the incumbent gets wrong on a few training examples, by the predictors that may be to blame.

    Args:
        context: Where the examples are drawn from, how many, and from which score on an answer passes.
        incumbent: Program to run.
        allowance: Without enough for all of them nothing is run.
        generator: Draws the examples.

    Returns:
        Failures by predictor name; empty when nothing was run or nothing is wrong.
    """
    settings = context.settings
    order = stratified_order(strata_of(context.trainset), generator)[: settings.n_reflected]
    if not order or not allowance.can_afford(len(order) * context.validation.calls_per_example(incumbent)):
        return {}
    examples, program = [context.trainset[i] for i in order], incumbent.program()
    runs = context.run_on_training(program, order, phase=Phase.INSTRUCTIONS, candidate=incumbent)
    found: dict[str, list[Failure]] = {}
    for example, run in zip(examples, runs, strict=True):
        if run.result.score is None or run.result.score >= settings.pass_score:
            continue
        for name in suspects(program, example, run):
            found.setdefault(name, []).append(_failure(program, example, run, name, context.metric))
    return found


def suspects(program: dspy.Module, example: dspy.Example, run: ExampleRun) -> list[str]:
    """The predictors that may be to blame for a wrong answer, in the order they ran.

    Args:
        program: The very program object that was run.
        example: With its labels.
        run: What came out.
    """
    names = {id(predictor): name for name, predictor in program.named_predictors()}
    traced = [(names[id(predictor)], outputs) for predictor, _, outputs in run.trace if id(predictor) in names]
    labels = label_values(example)
    blamed: list[str] = []
    for name, outputs in traced:
        known = [key for key in outputs if key in labels]
        if known and all(text_of(outputs[key]) == text_of(labels[key]) for key in known):
            continue
        if name not in blamed:
            blamed.append(name)
        if known:
            return blamed
    if run.prediction is None:  # stopped on an answer nobody could use: the next in line, or the last that answered
        later = [name for name in names.values() if name not in {traced_name for traced_name, _ in traced}]
        return [*blamed, *later[:1]] or list(names.values())[-1:]
    return blamed or [name for name, _ in traced[-1:]]


def _failure(program: dspy.Module, example: dspy.Example, run: ExampleRun, name: str, metric: Metric) -> Failure:
    predictor = dict(program.named_predictors())[name]
    mine = [step for step in run.trace if step[0] is predictor]
    inputs = dict(mine[-1][1]) if mine else dict(input_values(example))
    outputs = dict(mine[-1][2].items()) if mine else {}
    if run.prediction is None:
        return Failure(inputs, outputs, run.result.error or "the answer could not be used")
    said = metric_feedback(metric, example, run.prediction, trace=run.trace, predictor=name, own_trace=mine)
    answered = dict(run.prediction.items())
    ending = {} if all(outputs.get(key) == value for key, value in answered.items()) else answered
    return Failure(inputs, outputs, said or expected_feedback(example, run.result.score or 0.0), ending)


def metric_feedback(
    metric: Metric,
    example: dspy.Example,
    prediction: Any,
    *,
    trace: Any = None,
    predictor: str | None = None,
    own_trace: Any = None,
) -> str:
    """What the metric says in words, for a predictor if it takes GEPA's five arguments; "" when it says nothing.

    The metric is called once more, booked as `Phase.METRIC`; it scored this prediction before, so it does not raise.
    """
    arguments = (example, prediction, trace, predictor, own_trace)
    n = 5 if takes_arguments(metric, 5) else metric_arity(metric)
    with booked_as(Phase.METRIC):
        # Without the trace: metrics are stricter with one, and this is feedback on the answer that was scored.
        returned = metric(*(arguments if n == 5 else (example, prediction, None, None)[:n]))
    return feedback_in(returned)


def feedback_in(returned: Any) -> str:
    """The words in what a metric returned; "" when there are none."""
    if isinstance(returned, (dspy.Prediction, Mapping)):
        return str(returned.get("feedback", "") or "")
    return str(getattr(returned, "feedback", "") or "")


def expected_feedback(example: dspy.Example, score: float, *, say: Callable[[Any], str] = short) -> str:
    """The score and the right answer, for metrics that say nothing in words.

    Args:
        example: With its labels.
        score: 0..1.
        say: Puts a value into words; shortened by default.
    """
    said = ", ".join(f"{key} = {say(value)}" for key, value in label_values(example).items())
    return f"Score {score:g} of 1. The right answer: {said}."
