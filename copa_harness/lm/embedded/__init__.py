"""The embedded model's files: a very small Llama with its tokenizer, made by `pretrain`.

Loads with plain ``AutoModelForCausalLM`` and ``AutoTokenizer``. This module only says where the files are; it imports
neither torch nor transformers.
"""

from __future__ import annotations

import importlib.resources
import pathlib


def embedded_model_path() -> pathlib.Path:
    """The folder of the shipped model.

    Raises:
        FileNotFoundError: The package lies in a zip file or its model files are missing.
    """
    folder = pathlib.Path(str(importlib.resources.files(__name__)))
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no model.safetensors in {folder}: expected the embedded model's files there; "
            "reinstall copa-harness as a plain folder (not a zip), or make them with "
            "`python -m copa_harness.lm.embedded.pretrain`"
        )
    return folder
