"""What an optimization leaves behind of a program: its settings as JSON.

A finished optimization can be restored without a single call: `to_state` writes every predictor's instruction,
demonstrations and model name, `apply_state` puts them on a fresh copy of the program.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dspy

from copa_harness.errors import ConfigurationError
from copa_harness.optimize.search.candidate import model_name
from copa_harness.results import OptimizationResult

if TYPE_CHECKING:
    from copa_harness.optimize.adoption import Adoption
    from copa_harness.optimize.run import Run
    from copa_harness.optimize.search.candidate import Candidate

STATE_SCHEMA = 1


def result_of(
    run: Run, adoption: Adoption, *, strategy: str, returned: Candidate, credit: Mapping[str, Any]
) -> OptimizationResult:
    """The record of a finished run.

    Args:
        run: The run; the scores are those of its incumbent.
        adoption: What `conclude` gave.
        strategy: As parsed.
        returned: The incumbent, or what it became when its weights were trained once more.
        credit: What `credit_of` gave.
    """
    before, after = run.validation.mean(run.student), run.score
    return OptimizationResult(
        strategy=strategy,
        model=returned.model,
        phases=tuple(run.phases),
        score_before=None if math.isnan(before) else before,
        score_after=None if math.isnan(after) else after,
        n_validation=run.validation.n,
        stopped=run.stopped,
        exhausted=run.stopped == "budget",
        usage=run.scope.usage(),
        seed=run.settings.seed,
        budget_calls=run.scope.budget.calls,
        charged_calls=run.scope.charged_calls,
        n_trials=run.n_trials,
        notes=tuple(run.notes),
        headlines=tuple(run.headlines),
        reason=run.reason,
        front=adoption.front,
        credit=credit,
        evidence=adoption.evidence,
        learned=tuple(run.memory.report()),
        trials=tuple(run.memory.records),
        state=None if returned.structure else to_state(returned.program()),
    )


def to_state(program: dspy.Module) -> dict[str, Any]:
    """A program's optimized settings as JSON: instruction, demonstrations and model name of every predictor.

    Raises:
        ConfigurationError: A demonstration holds something that JSON cannot keep.
    """
    predictors = {}
    for name, predictor in program.named_predictors():
        state = predictor.dump_state(json_mode=True)
        predictors[name] = {
            "instruction": predictor.signature.instructions,
            "demos": state["demos"],
            "model": None if predictor.lm is None else model_name(predictor.lm),
        }
    state = {"schema": STATE_SCHEMA, "predictors": predictors}
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"a demonstration cannot be stored as JSON: {error}") from error
    return state


def apply_state(program: dspy.Module, state: Mapping[str, Any], *, lm: Any) -> dspy.Module:
    """A copy of `program` with stored settings.

    Args:
        program: The program as written; it is not changed.
        state: What `to_state` gave.
        lm: A model for every predictor without one of its own; where the state names another one, a copy of the
            predictor's under that name is used, so a fine-tuned model is found by its name.

    Raises:
        ConfigurationError: The state is of another version, or of a program with other predictors.
    """
    if state.get("schema") != STATE_SCHEMA:
        raise ConfigurationError(f"got program state of schema {state.get('schema')!r}; expected {STATE_SCHEMA}")
    copy = program.deepcopy()
    predictors = dict(copy.named_predictors())
    stored: Mapping[str, Any] = state["predictors"]
    if set(stored) != set(predictors):
        raise ConfigurationError(
            f"got state for the predictors {sorted(stored)}; the program has {sorted(predictors)}: it changed since"
        )
    models: dict[tuple[int, str], Any] = {}
    for name, settings in stored.items():
        predictor = predictors[name]
        predictor.signature = predictor.signature.with_instructions(settings["instruction"])
        predictor.demos = [dict(demo) for demo in settings["demos"]]
        own, model = predictor.lm or lm, settings["model"]
        if model is None or model == model_name(own):
            predictor.lm = own
            continue
        if (id(own), model) not in models:
            models[id(own), model] = own.copy(model=model)
        predictor.lm = models[id(own), model]
    return copy
