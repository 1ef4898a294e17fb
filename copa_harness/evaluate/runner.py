"""Runs a program over examples in threads and keeps what happened to each example apart.

Not `dspy.Evaluate`: that one recomputes all scores per item for its progress bar (quadratic), scores failures as
zeros nobody can tell from wrong answers, and re-runs slow stragglers. Here every example ends in one of four outcomes:

* ``ok``: the metric gave a score.
* ``unparsed`` (score 0): the model answered, unusably. Either DSPy's adapter could not parse the answer, or the
  program's own code raised while working on it (the usual cause is an answer it did not expect; the error is kept).
* ``provider_error`` (no score): the model gave no answer.
* ``metric_error`` (no score): the metric raised, or returned no number in 0..1.

A failure of *every* example is no measurement but a broken program, metric or provider, and is raised as such. Results
come in the order of the examples and do not depend on the number of threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import dspy
from dspy.utils.exceptions import (
    AdapterParseError,
    ContextWindowExceededError,
    LMConfigurationError,
    LMError,
    LMUnsupportedFeatureError,
)

from copa_harness.credentials import mask_text
from copa_harness.documents import digest_of
from copa_harness.errors import (
    ConfigurationError,
    ContextOverflowError,
    CopaError,
    MetricError,
    ProviderError,
    TaskError,
)
from copa_harness.evaluate.examples import check_examples, example_ids, input_values, label_scores_of, plain
from copa_harness.evaluate.metrics import Metric, call_metric, metric_arity
from copa_harness.evaluate.progress import current_listener, telling
from copa_harness.formatting import visible
from copa_harness.judge.intervals import mean_interval
from copa_harness.lm.call_context import current_context, current_scope, in_context, in_threads
from copa_harness.lm.dspy_internals import prompt_adapter
from copa_harness.results import EvaluationResult, ExampleResult, Phase, Usage

logger = logging.getLogger("copa_harness")

DEFAULT_THREADS = 32
"""Enough concurrent examples for a local engine to batch; remote endpoints cope with as many."""


MAX_ANSWER_CHARACTERS = 200
"""Of an answer that does not parse, what is kept: enough to see what the model takes the task for."""


@dataclass(frozen=True, slots=True)
class ExampleRun:
    """One example run through a program: its scored result, the raw prediction, and the trace of predictor calls.

    `prediction` is None and `trace` holds the calls made until then when the program did not finish; `too_long` says
    that it was because a prompt did not fit the model's context.
    """

    result: ExampleResult
    prediction: Any = None
    trace: tuple[Any, ...] = field(default=(), repr=False)
    too_long: bool = False


def users_adapter() -> Any:
    """The prompt adapter that the user chose (`dspy.settings.adapter`), None for the default one."""
    return dspy.settings.adapter


def default_adapter() -> Any:
    """The prompt adapter of this context: the user's (`dspy.settings.adapter`), else a ChatAdapter.

    That one makes one call per answer. DSPy's default asks a second time in JSON when an answer does not parse;
    a metered run must not pay twice for an answer that is simply wrong, unless it is asked to (`json_fallback`).
    """
    asks_again = current_context().json_fallback
    return users_adapter() or prompt_adapter(use_json_adapter_fallback=asks_again)


def program_lms(program: dspy.Module) -> tuple[Any, ...]:
    """The distinct LMs the program's predictors use in this context, in the order of the predictors.

    Raises:
        ConfigurationError: A predictor has no LM.
    """
    lms: list[Any] = []
    for name, predictor in program.named_predictors():
        lm = predictor.lm or dspy.settings.lm
        if lm is None:
            raise ConfigurationError(
                f"got no language model for predictor {name!r}; pass lm=..., call program.set_lm(...) "
                "or dspy.configure(lm=...)"
            )
        if not any(lm is other for other in lms):
            lms.append(lm)
    return tuple(lms) if lms else tuple(lm for lm in (dspy.settings.lm,) if lm is not None)


def evaluate(
    program: dspy.Module,
    examples: Sequence[dspy.Example],
    *,
    metric: Metric,
    split: str,
    lm: Any = None,
    phase: Phase = Phase.EVALUATE,
    threads: int = DEFAULT_THREADS,
) -> EvaluationResult:
    """Scores of a program on a split, with an interval and what they cost.

    Args:
        program: Any DSPy module. It is not changed.
        examples: The split, at least one example with declared inputs.
        metric: DSPy metric, ``metric(example, prediction, trace=None)``, giving a bool or a number in 0..1.
        split: The split's name, for the record ("train", "validation", "test").
        lm: Model for every predictor without one of its own; default `dspy.settings.lm`.
        phase: What the calls are for; stamped on each.
        threads: Examples in flight at once. Results do not depend on it.

    Returns:
        Per-example results in the order of `examples`; `usage` is what this evaluation added to the current scope.

    Raises:
        TaskError: The split is empty or malformed, or the program itself fails on every example.
        MetricError: The metric fails on every example.
        ProviderError: No example got an answer.
        BudgetExhausted: The scope's budget refused a call; examples not yet started are dropped.
    """
    scope = current_scope()
    before, started = scope.usage(), time.perf_counter()
    with in_context(label_scores=True):
        runs = run_examples(program, examples, metric=metric, split=split, lm=lm, phase=phase, threads=threads)
    raise_if_nothing_worked(runs, split=split)
    usage = usage_since(before, scope.usage(), wall_s=time.perf_counter() - started)
    results = results_of(program, runs)
    scores = [result.score for result in results if result.score is not None]
    with dspy.context(**({} if lm is None else {"lm": lm})):
        names = dict.fromkeys(str(getattr(one, "model", one)) for one in program_lms(program))
    return EvaluationResult(
        split=split, lm=", ".join(names), results=results, interval=mean_interval(scores), usage=usage
    )


def results_of(program: dspy.Module, runs: Sequence[ExampleRun]) -> tuple[ExampleResult, ...]:
    """The results of runs, with what every predictor of the program was given and answered."""
    names = {id(predictor): name for name, predictor in program.named_predictors()}
    return tuple(
        replace(
            run.result,
            calls=tuple(
                {"predictor": names[id(predictor)], "inputs": plain(inputs), "outputs": _outputs(prediction)}
                for predictor, inputs, prediction in run.trace
                if id(predictor) in names
            ),
        )
        for run in runs
    )


def _outputs(prediction: Any) -> dict[str, Any]:
    return {name: value for name, value in _fields(prediction).items() if name != "logprobs"}


def usage_since(before: Usage, after: Usage, *, wall_s: float) -> Usage:
    """What was spent between two readings of a scope's meter, with the seconds that passed."""
    return replace(after - before, wall_s=wall_s)


def run_examples(
    program: dspy.Module,
    examples: Sequence[dspy.Example],
    *,
    metric: Metric,
    split: str,
    lm: Any = None,
    phase: Phase = Phase.EVALUATE,
    threads: int = DEFAULT_THREADS,
    ids: Sequence[str] | None = None,
) -> tuple[ExampleRun, ...]:
    """Like `evaluate`, but returns predictions and traces too (what bootstrapping needs).

    That every example failed is not raised: in a search one hopeless candidate (say, a prompt longer than the context
    window) must not end it. Where it is no candidate, `raise_if_nothing_worked` looks at the runs.

    Arguments as for `evaluate`, and `ids` of the examples, by default `example_ids(examples)`. In `Phase.BOOTSTRAP`
    the metric sees the trace, as in DSPy's bootstrapping (many metrics are stricter then).

    Raises:
        TaskError: The split is empty or malformed.
        BudgetExhausted: As `evaluate`.
    """
    check_examples(examples, split=split)
    arity = metric_arity(metric)
    if threads < 1:
        raise ConfigurationError(f"got threads={threads}; expected at least 1")
    names = tuple(ids) if ids is not None else example_ids(examples)
    if len(names) != len(examples):
        raise ConfigurationError(f"got {len(names)} ids for {len(examples)} examples; expected one each")
    settings: dict[str, Any] = {"adapter": default_adapter(), "disable_history": True}
    if lm is not None:
        settings["lm"] = lm
    listener = current_listener()

    def run_one(example: dspy.Example, name: str) -> ExampleRun:
        run = _run_one(program, example, name, metric=metric, arity=arity, trace_to_metric=phase is Phase.BOOTSTRAP)
        if listener is not None:
            listener(run.result)
        return run

    # Evaluations that a metric or a program makes are its own affair.
    with current_scope().phase(phase), dspy.context(**settings), telling(None):
        if program.named_predictors():
            program_lms(program)
        jobs = [partial(run_one, example, name) for example, name in zip(examples, names, strict=True)]
        return in_threads(jobs, threads=threads)


def _run_one(
    program: dspy.Module, example: dspy.Example, name: str, *, metric: Metric, arity: int, trace_to_metric: bool
) -> ExampleRun:
    """One example, never raising an ordinary exception: failures become outcomes."""
    asked: list[str] = []
    with in_context(requests=asked):
        run = _attempted(program, example, name, metric=metric, arity=arity, trace_to_metric=trace_to_metric)
    # In order of the keys: a program's own threads ask in any order.
    return replace(run, result=replace(run.result, requests=digest_of(asked)))


def _attempted(
    program: dspy.Module, example: dspy.Example, name: str, *, metric: Metric, arity: int, trace_to_metric: bool
) -> ExampleRun:
    inputs = input_values(example)
    expected = {key: value for key, value in example.items() if key not in inputs}
    trace: list[Any] = []
    base = ExampleResult(name, None, inputs=plain(inputs), expected=plain(expected))
    try:
        with dspy.context(trace=trace):
            prediction = program(**inputs)
    except AdapterParseError as error:
        answer = mask_text(str(error.lm_response))[:MAX_ANSWER_CHARACTERS]
        failed = replace(base, score=0.0, outcome="unparsed", error=_said(error), answer=answer)
        return ExampleRun(failed, trace=tuple(trace))
    except (LMConfigurationError, LMUnsupportedFeatureError) as error:
        raise ConfigurationError(f"the model cannot be asked like this: {_said(error)}") from error
    except (LMError, ProviderError) as error:
        failed = replace(base, outcome="provider_error", error=_said(error))
        too_long = isinstance(error, (ContextOverflowError, ContextWindowExceededError))
        return ExampleRun(failed, trace=tuple(trace), too_long=too_long)
    except CopaError:
        raise
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything; it is recorded, never dropped
        said = f"the program raised {_said(error)}"
        return ExampleRun(replace(base, score=0.0, outcome="unparsed", error=said), trace=tuple(trace))
    fields, label_scores = _fields(prediction), label_scores_of(trace)
    if label_scores:
        fields.pop("logprobs", None)  # the same in DSPy's shape, and long
    base = replace(base, predicted=fields, label_scores=label_scores)
    try:
        score = call_metric(
            metric, example, prediction=prediction, trace=trace if trace_to_metric else None, arity=arity
        )
    except MetricError as error:
        return ExampleRun(replace(base, outcome="metric_error", error=str(error)), prediction, tuple(trace))
    return ExampleRun(replace(base, score=score), prediction, tuple(trace))


def _fields(prediction: Any) -> dict[str, Any]:
    """A prediction's fields as plain JSON types."""
    if isinstance(prediction, (dspy.Example, Mapping)):
        return {str(key): plain(value) for key, value in prediction.items()}
    return {"output": plain(prediction)}


def _said(error: BaseException) -> str:
    """An error in one paragraph: its class and message, shortened."""
    text = f"{type(error).__name__}: {error}".strip()
    return text if len(text) <= 600 else text[:600] + " ..."


def raise_if_nothing_worked(runs: Sequence[ExampleRun], *, split: str) -> None:
    """Raise when every example failed in the same way that no score can express.

    Raises:
        TaskError: The program failed on every example.
        MetricError: The metric failed on every example.
        ProviderError: No example got an answer.
    """
    results = [run.result for run in runs]
    first = results[0].error
    if all(result.outcome == "metric_error" for result in results):
        raise MetricError(
            f"the metric failed on all {len(results)} examples of the {split!r} split; the first: {first}"
        )
    if all(result.outcome == "provider_error" for result in results):
        raise ProviderError(
            f"no answer from the model on any of the {len(results)} examples of the {split!r} split; the first: {first}"
        )
    if all((result.error or "").startswith("the program raised ") for result in results):
        raise TaskError(
            f"the program failed on all {len(results)} examples of the {split!r} split; the first: {first}. "
            "Check that the examples have every input field the program needs"
        )
    failed = [result for result in results if result.score is None]
    if failed:
        logger.warning(
            "%d of %d examples of the %s split have no score: %s",
            len(failed),
            len(results),
            split,
            visible(str(failed[0].error)),
        )
