"""A plain DSPy script: signature, instructions, demonstrations and model, without anything of this package."""

from __future__ import annotations

from typing import Any

from copa_harness.errors import ConfigurationError
from copa_harness.export.annotations import imports_of, source_of
from copa_harness.export.writing import Export


def write(export: Export) -> list[str]:
    """Fill the folder."""
    scored = export.scored
    if not scored.kind:
        raise ConfigurationError(
            "got a program of a class that no module offers; expected one that can be imported: define it outside of "
            "tests and functions"
        )
    if scored.adapter not in ("ChatAdapter", "JSONAdapter", "XMLAdapter"):
        raise ConfigurationError(f"got prompts of {scored.adapter}; expected a prompt adapter of DSPy")
    for one in scored.predictors:
        if one.problem:
            raise ConfigurationError(f"the predictor {one.name!r} cannot be written down: {one.problem}")
    model, first = export.the_only_model(), scored.predictors[0]
    plain = scored.kind in ("Predict", "ChainOfThought")
    fields = [
        {"name": one.name, "is_input": one.is_input, "desc": one.desc, "source": source_of(one.type)}
        for one in first.fields
        if scored.kind != "ChainOfThought" or one.name != "reasoning"
    ]
    module, _, name = scored.kind.partition(":")
    imports = (
        {line for one in first.fields for line in imports_of(one.type)} if plain else {f"from {module} import {name}"}
    )
    state: dict[str, Any] = export.artifact.program_state
    if export.is_local:
        export.write_answer(needs="Needs torch and transformers.")
    export.render(
        "program.py",
        needs=f"Needs dspy{', torch and transformers' if export.is_local else ''}.",
        local=export.is_local,
        imports=sorted(imports),
        kind=scored.kind,
        **{"class": name},
        fields=fields,
        first=first.name,
        instructions={one.name: one.instructions for one in scored.predictors},
        demos={
            one.name: state[one.name]["demos"] if one.name in state else state["demos"] for one in scored.predictors
        },
        settings={one.name: {**one.settings, **one.bounds} for one in scored.predictors},
        model=model,
        base_url=scored.api_base,
        adapter=scored.adapter,
    )
    export.write_check(whole_program=True)
    return ["the program: program.program; program.ask(...) answers as it was scored"]
