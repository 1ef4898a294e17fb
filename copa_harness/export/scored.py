"""What an artifact keeps of its scored program, so that it can be taken elsewhere and checked there.

The prompt of every predictor as messages with a slot for each input, how its outputs are read, with which settings it
was asked; how the program is made again; and every test row with what each predictor was given and answered. Test rows
are data: an artifact is to be shared with whom one would show them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import dspy

from copa_harness.credentials import mask_secrets, mask_text
from copa_harness.documents import from_json, to_jsonable
from copa_harness.errors import ArtifactError
from copa_harness.evaluate.runner import default_adapter
from copa_harness.export.annotations import class_name, described
from copa_harness.lm.answer_ceiling import answer_bounds
from copa_harness.lm.local.files import split_model_name
from copa_harness.results import SCHEMA, EvaluationResult, ExampleResult

if TYPE_CHECKING:
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.store.artifacts import Artifact


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldKept:
    """A field of a signature: what a prompt says of it, and its type as `annotations.described` has it."""

    name: str
    is_input: bool
    type: Any
    desc: str = ""
    constraints: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorKept:
    """A predictor as it was asked.

    Attributes:
        name: As the program calls it.
        model: What answered.
        settings: The model's: temperature and the like.
        bounds: What this predictor's calls have besides: most tokens, where an answer stops, its own configuration.
        instructions: The optimized ones.
        fields: In their order.
        messages: Role and content; the last one has the slots.
        slots: What stands for each input in the last message.
        problem: Why it has no messages or no fields, where it has none.
    """

    name: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    bounds: Mapping[str, Any] = field(default_factory=dict)
    instructions: str = ""
    fields: tuple[FieldKept, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()
    slots: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowKept:
    """A test row; `calls` are (predictor, inputs, outputs) in their order."""

    id: str
    inputs: Mapping[str, Any]
    outcome: str
    score: float | None
    predicted: Mapping[str, Any] = field(default_factory=dict)
    calls: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A program and its scored answers.

    Attributes:
        task: Of the suite.
        strategy: What made it.
        score: Mean test score.
        model: What answered; a tuned one contains its fingerprint.
        base: The model without its LoRA adapter.
        is_endpoint: Whether somebody else's API answers.
        api_base: Its URL, where one was named.
        constrained: Whether answers were chosen among the allowed values.
        answer_tokens: As `MeteredLM` has it.
        adapter: The prompt adapter's class.
        kind: `Predict`, `ChainOfThought`, or `module:Class` that is made without arguments; empty if neither.
        predictors: In their order.
        rows: Of the test split.
    """

    task: str
    strategy: str
    score: float
    model: str
    base: str
    is_endpoint: bool
    api_base: str = ""
    constrained: bool = False
    answer_tokens: int | str | None = None
    adapter: str
    kind: str
    predictors: tuple[PredictorKept, ...]
    rows: tuple[RowKept, ...]
    schema: int = SCHEMA


def scored_of(
    program: dspy.Module, lm: MeteredLM, evaluation: EvaluationResult, *, task: str, strategy: str, api_base: str = ""
) -> Scored:
    """What to keep of an evaluation.

    `lm` answers for every predictor without one of its own; `api_base` is where the endpoint is, if somebody named
    it.
    """
    return Scored(
        task=task,
        strategy=strategy,
        score=evaluation.score,
        model=lm.model,
        base=split_model_name(lm.model)[0],
        is_endpoint=lm.engine.is_endpoint,
        api_base=mask_text(api_base) if lm.engine.is_endpoint else "",
        constrained=lm.constrain,
        answer_tokens=lm.answer_tokens,
        adapter=type(default_adapter()).__name__.replace("PromptAdapter", "ChatAdapter"),
        kind=_kind_of(program),
        predictors=tuple(_predictor(name, one, one.lm or lm) for name, one in program.named_predictors()),
        rows=tuple(map(_row, evaluation.results)),
    )


def read_scored(artifact: Artifact) -> Scored:
    """What an artifact keeps.

    Raises:
        ArtifactError: It keeps nothing, since its program was never scored; or it is of another version.
    """
    if artifact.scored is None:
        raise ArtifactError(
            f"artifact {artifact.directory}: it has no scored answers. Next: run the suite with a test that takes "
            "copa_run; what was answered before is cached and free."
        )
    try:
        return from_json(Scored, artifact.scored)
    except ValueError as error:
        raise ArtifactError(
            f"artifact {artifact.directory}: its scored answers cannot be read ({error}). Next: run the suite again."
        ) from error


def _kind_of(program: dspy.Module) -> str:
    if type(program) in (dspy.Predict, dspy.ChainOfThought):
        return type(program).__name__
    try:
        return class_name(type(program))
    except ValueError:
        return ""


def _predictor(name: str, predictor: Any, lm: MeteredLM) -> PredictorKept:
    signature = predictor.signature
    given = {name: value for name, value in lm.kwargs.items() if value is not None and name != "rollout_id"}
    settings = mask_secrets(to_jsonable(given))
    try:
        messages, slots = prompt_of(predictor)
        fields = tuple(
            FieldKept(
                name=key,
                is_input=key in signature.input_fields,
                type=described(one.annotation),
                desc=one.json_schema_extra.get("desc") or "",
                constraints=one.json_schema_extra.get("constraints") or "",
            )
            for key, one in signature.fields.items()
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return PredictorKept(name=name, model=lm.model, settings=settings, problem=f"{type(error).__name__}: {error}")
    with dspy.context(caller_modules=[predictor]):
        bounds = answer_bounds(
            lm.engine,
            lm.model,
            answer_tokens=lm.answer_tokens,
            settings={**lm.kwargs, **predictor.config},
            messages=messages,
            constrained=False,
        )
    return PredictorKept(
        name=name,
        model=lm.model,
        settings=settings,
        bounds=bounds | mask_secrets(to_jsonable(predictor.config)),
        instructions=signature.instructions,
        fields=fields,
        messages=messages,
        slots=slots,
    )


def prompt_of(predictor: Any) -> tuple[tuple[dict[str, str], ...], dict[str, str]]:
    """The messages of a predictor, and the slots of its inputs in the last one.

    Raises:
        ValueError: A message is more than text, or an input does not stand in the last one as it is.
    """
    signature, demos = predictor.signature, predictor.demos
    plain = _rendered(signature, demos, dict.fromkeys(signature.input_fields, ""))
    mark = "{{%s}}"
    while any(mark % name in plain[-1]["content"] for name in signature.input_fields):
        mark = f"{{{mark}}}"
    slots = {name: mark % name for name in signature.input_fields}
    messages = _rendered(signature, demos, slots)
    last = messages[-1]["content"]
    if any(last.count(slot) != 1 for slot in slots.values()) or [*messages[:-1]] != [*plain[:-1]]:
        raise ValueError("the inputs do not stand as text in the last message")
    return messages, slots


def _rendered(signature: Any, demos: Sequence[Any], inputs: dict[str, str]) -> tuple[dict[str, str], ...]:
    messages = default_adapter().format(signature, demos, inputs)
    if not all(isinstance(message["content"], str) for message in messages):
        raise ValueError("a message is more than text")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _row(result: ExampleResult) -> RowKept:
    return RowKept(
        id=result.example_id,
        inputs=result.inputs,
        outcome=result.outcome,
        score=result.score,
        predicted=result.predicted,
        calls=result.calls,
    )
