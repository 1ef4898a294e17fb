"""Training rows from the program's own passing answers: run it, keep the traces whose metric passes, render them.

One bad example costs one example: an answer that does not parse, a provider that fails and a wrong answer are counted
apart and left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from copa_harness.errors import MetricError, ProviderError
from copa_harness.formatting import visible
from copa_harness.lm.call_context import in_threads
from copa_harness.tune.rows import PredictorCall, RowDemos, TrainingRow, filled_inputs, render_calls

if TYPE_CHECKING:
    import dspy

logger = logging.getLogger(__name__)

_Outcome = Literal["passed", "wrong", "unparsed", "failed"]


@dataclass(frozen=True, slots=True)
class TraceRows:
    """Rows by predictor name, and what became of the examples they came from.

    `n_passed + n_wrong + n_unparsed + n_failed` is the number of examples; `errors` are the failures' messages.
    """

    rows: dict[str, tuple[TrainingRow, ...]]
    n_passed: int
    n_wrong: int
    n_unparsed: int
    n_failed: int
    errors: tuple[str, ...] = ()


def rows_from_traces(
    program: dspy.Module,
    examples: Sequence[dspy.Example],
    *,
    metric: Callable[..., Any],
    demos: RowDemos,
    pass_score: float = 1.0,
    adapter: Any = None,
    lm: Any = None,
    threads: int = 8,
) -> TraceRows:
    """Run `program` over `examples` and render every predictor call of the runs that pass.

    Args:
        program: the program as it stands; its demonstrations are used for running, `demos` for rendering.
        examples: with inputs set.
        metric: `metric(example, prediction, trace)`; a score of at least `pass_score` passes.
        demos: which demonstrations the rows carry; `resample` draws from the passing calls.
        pass_score: 0..1.
        adapter: DSPy prompt adapter of the rows; see `render_rows`.
        lm: the model to run on; by default the predictors' own or DSPy's configured one.
        threads: examples run at once.

    Raises:
        MetricError: the metric raised, or gave no number.
        BudgetExhausted: as soon as a call is refused.
    """
    names = {id(predictor): name for name, predictor in program.named_predictors()}
    jobs = [partial(_run_one, program, example, metric, pass_score, lm) for example in examples]
    results = in_threads(jobs, threads=max(1, threads))
    counts = {kind: sum(result[0] == kind for result in results) for kind in ("passed", "wrong", "unparsed", "failed")}
    errors = tuple(result[2] for result in results if result[0] == "failed")
    if errors:
        logger.warning(
            "%d of %d examples failed and give no training row; the first: %s",
            len(errors),
            len(results),
            visible(errors[0]),
        )
    calls: dict[str, list[PredictorCall]] = {name: [] for name in names.values()}
    predictors = dict(program.named_predictors())
    for kind, trace, _ in results:
        for predictor, inputs, prediction in trace if kind == "passed" else ():
            if id(predictor) not in names:
                continue  # made on the fly inside the program: nothing to fine-tune it by
            calls[names[id(predictor)]].append(call_of(predictor, inputs, prediction))
    rows = {name: render_calls(predictors[name], own, demos=demos, adapter=adapter) for name, own in calls.items()}
    return TraceRows(rows, counts["passed"], counts["wrong"], counts["unparsed"], counts["failed"], errors)


def call_of(predictor: Any, inputs: Mapping[str, Any], prediction: Any) -> PredictorCall:
    """A step of a trace as a call that rows are rendered from."""
    signature = predictor.signature
    given = filled_inputs(signature, inputs)
    outputs = {field: prediction[field] for field in signature.output_fields}
    return PredictorCall(given, outputs, {**given, **outputs})


def _run_one(
    program: Any, example: Any, metric: Callable[..., Any], pass_score: float, lm: Any
) -> tuple[_Outcome, list[Any], str]:
    import dspy
    from dspy.utils.exceptions import AdapterParseError, LMError

    settings: dict[str, Any] = {"trace": []}
    if lm is not None:
        settings["lm"] = lm
    with dspy.context(**settings):
        try:
            prediction = program(**example.inputs())
        except AdapterParseError:
            return "unparsed", [], ""
        except (ProviderError, LMError) as error:
            return "failed", [], f"{type(error).__name__}: {error}"
        trace = list(dspy.settings.trace)
        try:
            score = metric(example, prediction, trace)
            value = float(getattr(score, "score", score))
        except Exception as error:
            raise MetricError(
                f"the metric failed on an example with the fields {', '.join(example.keys())}: {error!r}"
            ) from error
    return ("passed" if value >= pass_score else "wrong"), trace, ""
