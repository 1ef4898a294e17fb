"""A function over the OpenAI client, in one file without anything of DSPy or this package."""

from __future__ import annotations

from copa_harness.errors import ConfigurationError
from copa_harness.export.writing import Export


def write(export: Export) -> list[str]:
    """Fill the folder."""
    if export.artifact.lora_directory is not None:
        raise ConfigurationError(
            "got tuned weights, without which the prompt is not what was scored; expected --to vllm, which serves "
            "both, or --to peft"
        )
    model = export.the_only_model()
    name = model if export.is_local else model.partition("/")[2]
    url = export.scored.api_base or ("http://localhost:8080/v1" if export.is_local else "")
    export.write_answer(engine="openai", model=name, base_url=url, needs="Needs the package openai.")
    if export.is_local:
        return [f"{model} ran in the suite's process; serve it (OPENAI_BASE_URL, by default {url}) for this function"]
    return ["the function: answer.answer"]
