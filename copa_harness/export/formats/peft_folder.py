"""The LoRA adapter as PEFT loads it, with its prompt and a function that asks both by transformers."""

from __future__ import annotations

from copa_harness.errors import ConfigurationError
from copa_harness.export.writing import ADAPTER, Export


def write(export: Export) -> list[str]:
    """Fill the folder."""
    if export.artifact.lora_directory is None:
        raise ConfigurationError("got base weights only; expected an artifact with a LoRA adapter, or another --to")
    if not export.is_local:
        raise ConfigurationError("got an adapter that a vLLM server serves; expected --to vllm")
    export.write_answer(needs="Needs torch, transformers and peft.")
    return [f"the adapter: {ADAPTER}, for PeftModel.from_pretrained", f"its base model: {export.base_place()}"]
