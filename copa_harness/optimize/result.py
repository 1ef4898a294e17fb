"""What an optimization leaves behind: the record on the program, and the program's settings as JSON.

A finished optimization can be restored without a single call: `to_state` writes every predictor's instruction,
demonstrations and model name, `apply_state` puts them on a fresh copy of the program.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import dspy

from copa_harness.errors import ConfigurationError
from copa_harness.evaluate.examples import plain
from copa_harness.optimize.search.candidate import model_name
from copa_harness.results import PhaseRecord, Usage

if TYPE_CHECKING:
    from copa_harness.optimize.adoption import Adoption
    from copa_harness.optimize.run import Run

STATE_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class OptimizationResult:
    """The record of one optimization; the optimized program carries it as `program.copa_result`.

    Attributes:
        strategy: As parsed, e.g. "p -> w -> p".
        model: Name of the model(s) the program ends on; a fine-tuned one contains its fingerprint.
        phases: What each step spent and did to the validation score.
        score_before: Mean validation score of the student, 0..1, None when the budget did not reach that far.
        score_after: The same for the returned program; never below `score_before`.
        n_validation: Validation examples behind both.
        stopped: Why it ended: "completed", "budget", "perfect score", "converged", "max_cycles", ...
        reason: The same in words: the budget's numbers, how the last study ended.
        exhausted: Whether the budget cut the search short.
        usage: Everything the run spent.
        seed: Of all random choices.
        budget_calls: The ceiling in distinct calls, `inf` for none.
        charged_calls: Distinct calls used, bought or replayed.
        n_trials: Candidates looked at.
        notes: Sentences worth telling: what was adopted or refused, and why.
        headlines: Those of them that nobody should have to look for: what `auto` chose, what limits and preferences
            did.
        front: The front of score and cost, cheapest first, when a preference asked for it: what each answer costs, and
            which entry was returned.
        credit: Which part of which stage earned the gain on validation (`credit.assign_credit`); empty without one.
        evidence: What speaks for the returned program against the one that came in (`adoption.Adoption`).
        learned: What every kind of proposal gained (`ProposalBandit.report`).
        trials: What every trial used and gained, shortened (`SearchMemory.records`).
        state: The program's settings as JSON (see `apply_state`); None when an optimizer changed the program itself.
    """

    strategy: str
    model: str
    phases: tuple[PhaseRecord, ...]
    score_before: float | None
    score_after: float | None
    n_validation: int
    stopped: str
    exhausted: bool
    usage: Usage
    seed: int
    budget_calls: float
    charged_calls: int
    n_trials: int = 0
    notes: tuple[str, ...] = ()
    headlines: tuple[str, ...] = ()
    reason: str = ""
    front: tuple[Mapping[str, Any], ...] = ()
    credit: Mapping[str, Any] = field(default_factory=dict, repr=False)
    evidence: Mapping[str, Any] = field(default_factory=dict, repr=False)
    learned: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    trials: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    state: Mapping[str, Any] | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types; `from_json` reads it back."""
        record: dict[str, Any] = plain(asdict(self))
        record["budget_calls"] = None if self.budget_calls == float("inf") else self.budget_calls
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> OptimizationResult:
        """The record `to_json` wrote."""
        fields = dict(record)
        fields["usage"] = Usage(**fields["usage"])
        fields["phases"] = tuple(PhaseRecord(**{**p, "usage": Usage(**p["usage"])}) for p in fields["phases"])
        fields |= {name: tuple(fields.get(name, ())) for name in ("notes", "headlines", "front", "learned", "trials")}
        fields["budget_calls"] = float("inf") if fields["budget_calls"] is None else fields["budget_calls"]
        return cls(**fields)


def result_of(
    run: Run, adoption: Adoption, *, strategy: str, program: dspy.Module, credit: Mapping[str, Any]
) -> OptimizationResult:
    """The record of a finished run.

    Args:
        run: The run, its incumbent being what is returned.
        adoption: What `conclude` gave.
        strategy: As parsed.
        program: The incumbent as a program.
        credit: What `credit_of` gave.
    """
    before, after = run.validation.mean(run.student), run.score
    return OptimizationResult(
        strategy=strategy,
        model=run.incumbent.model,
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
        state=None if run.incumbent.structure else to_state(program),
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
