"""An artifact as a program that answers, in any process: `copa_harness.load(".copa_cache/artifacts/...")`.

The program is made again, given its optimized prompts and its models, and shows the prompts it was scored with; if not,
it is refused. Answers are neither cached nor counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy

from copa_harness.errors import ArtifactError, ConfigurationError
from copa_harness.export.annotations import imported_class, type_of
from copa_harness.export.scored import PredictorKept, Scored, prompt_of, read_scored
from copa_harness.lm.answer_ceiling import DERIVED
from copa_harness.lm.local.sources.names import is_local_name

if TYPE_CHECKING:
    from copa_harness.store.artifacts import Artifact


def load(artifact: Path | str, *, program: dspy.Module | None = None, lm: Any = None) -> dspy.Module:
    """The optimized program of an artifact, with its model.

    Args:
        artifact: The artifact's folder, as the report names it.
        program: The program as written, where it cannot be made from the artifact alone (its class takes arguments, or
            lies in no module); it is not changed.
        lm: Another model, for every predictor.

    Raises:
        ArtifactError: The folder is no whole artifact, or its program was never scored.
        ConfigurationError: The program or its model cannot be made here, or the program is another one by now.
    """
    from copa_harness.store.artifacts import load_artifact

    found = load_artifact(Path(artifact))
    kept = read_scored(found)
    made = _new_program(kept) if program is None else program.deepcopy()
    try:
        made.load_state(found.program_state)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{_other(kept)}: its state does not fit ({type(error).__name__}: {error})") from error
    _check_prompts(made, kept)
    models = {} if lm is not None else {one.model: _model(one.model, found, kept) for one in kept.predictors}
    names = {one.name: one.model for one in kept.predictors}
    for name, predictor in made.named_predictors():
        predictor.lm = lm if lm is not None else models[names[name]]
    return made


def _other(kept: Scored) -> str:
    return (
        f"the program is not the one of task {kept.task!r} that was scored; expected it as it was then, as load(..., "
        "program=...)"
    )


def _new_program(kept: Scored) -> dspy.Module:
    if kept.kind in ("Predict", "ChainOfThought"):
        predictor = kept.predictors[0]
        signature = signature_of(predictor)
        if kept.kind == "Predict":
            return dspy.Predict(signature)
        return dspy.ChainOfThought(signature.delete("reasoning"))
    remedy = "remedy: give the program as written: load(..., program=...)"
    if not kept.kind:
        raise ConfigurationError(f"the program of task {kept.task!r} is of a class that cannot be imported; {remedy}")
    kind = imported_class(kept.kind)
    if not issubclass(kind, dspy.Module):
        raise ConfigurationError(f"got {kept.kind}, which is no dspy.Module; {remedy}")
    try:
        return kind()
    except TypeError as error:
        raise ConfigurationError(f"{kept.kind} is not made without arguments ({error}); {remedy}") from error


def signature_of(predictor: PredictorKept) -> Any:
    """The signature that was kept.

    Raises:
        ConfigurationError: A type of it cannot be imported, or it was not kept.
    """
    if predictor.problem:
        raise ConfigurationError(f"the predictor {predictor.name!r} was not kept: {predictor.problem}")
    fields = {}
    for one in predictor.fields:
        make = dspy.InputField if one.is_input else dspy.OutputField
        field = make(**({"desc": one.desc} if one.desc else {}))
        if one.constraints:
            field.json_schema_extra["constraints"] = one.constraints
        fields[one.name] = (type_of(one.type), field)
    return dspy.Signature(fields, predictor.instructions)


def _check_prompts(program: dspy.Module, kept: Scored) -> None:
    predictors = dict(program.named_predictors())
    if set(predictors) != {one.name for one in kept.predictors}:
        raise ConfigurationError(f"{_other(kept)}: its predictors are {', '.join(predictors)}")
    for one in kept.predictors:
        if one.messages and prompt_of(predictors[one.name])[0] != one.messages:
            raise ConfigurationError(f"{_other(kept)}: {one.name} has another prompt")


def _model(name: str, artifact: Artifact, kept: Scored) -> Any:
    from copa_harness.lm.factory import build_lm
    from copa_harness.lm.gateway import Gateway
    from copa_harness.lm.local.files import split_model_name

    base, digits = split_model_name(name)
    if digits is not None and not is_local_name(base):
        raise ConfigurationError(
            f"got the model {name}, a LoRA adapter beside a vLLM server; expected load(..., lm=...): `copa export --to "
            "vllm` says how to serve it"
        )
    if not is_local_name(base) and not kept.is_endpoint:
        raise ConfigurationError(f"got the model {name}, which is nobody's name; expected load(..., lm=...)")
    settings = dict(next(one.settings for one in kept.predictors if one.model == name))
    lm = build_lm(
        base,
        gateway=Gateway(cache=None),
        cache_dir=artifact.directory.absolute().parents[1],
        constrain=kept.constrained,
        answer_tokens=None if kept.answer_tokens == DERIVED else kept.answer_tokens or 0,
        api_base=kept.api_base or None,
        **settings,
    )
    if digits is None:
        return lm
    if artifact.lora_directory is None or lm.engine.add_lora(artifact.lora_directory) != name:  # type: ignore[attr-defined]
        raise ArtifactError(f"artifact {artifact.directory}: it does not hold the LoRA adapter of {name}")
    return lm.copy(model=name)
