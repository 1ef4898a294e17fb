"""A script that serves base model and LoRA adapter by vLLM, and the function that asks it with the prompt."""

from __future__ import annotations

import json
import shlex

from copa_harness.errors import ConfigurationError
from copa_harness.export.writing import ADAPTER, Export


def write(export: Export) -> list[str]:
    """Fill the folder."""
    if export.artifact.lora_directory is None and not export.is_local:
        raise ConfigurationError(
            "got base weights behind an endpoint, where nothing is to be served; expected --to openai"
        )
    base = export.base_place()
    # `<model>@<digits>` of the scored model, without what a shell or URL would read otherwise.
    name = export.the_only_model().replace("/", "-").replace(":", "-")
    command = ["vllm", "serve", base, "--dtype", "float32"]
    if export.copy_adapter():
        rank = json.loads((export.folder / ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        command += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{name}=./{ADAPTER}"]
    else:
        command += ["--served-model-name", name]
    line = " ".join(map(shlex.quote, command))
    export.write("serve.sh", f'#!/bin/sh\ncd "$(dirname "$0")" && exec {line} "$@"\n')
    export.write_answer(
        engine="openai",
        model=name,
        base_url="http://localhost:8000/v1",
        needs="Needs the package openai, and `sh serve.sh` running.",
    )
    return [line]
