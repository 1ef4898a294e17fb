"""Weights that somebody only has as a pickle.

Reading a pickle can run whatever its author wrote into it. So nothing here or elsewhere does, but for one case: a user
said `allow_pickled_weights`, and the folder holds no safetensors. Then torch's restricted unpickler
(`torch.load(weights_only=True)`, tensors and plain containers only) reads `pytorch_model*.bin` through transformers,
once, and a copy of the model in safetensors is kept. That copy is what is hashed, mapped into memory, served and
trained; the pickle is not opened again.
"""

from __future__ import annotations

import logging
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

from copa_harness import documents
from copa_harness.errors import ConfigurationError, OutOfMemoryError
from copa_harness.lm.local.files import SHAPING_FILES, hash_file
from copa_harness.lm.local.memory import is_out_of_memory, oom_message
from copa_harness.lm.local.sources.keeping import keep_folder

logger = logging.getLogger(__name__)

PICKLED = "pytorch_model*.bin"
"""Names under which transformers looks for pickled weights."""

CONVERSION_SCHEMA = 1
"""Raise when the same pickle comes to be rewritten differently."""


def convert_pickled(directory: Path, *, keep_in: Path) -> Path:
    """A model folder with safetensors: `directory` itself if it holds some, else its rewritten copy.

    Args:
        directory: the model folder.
        keep_in: where copies are kept, one folder per content of the originals.

    Raises:
        ConfigurationError: the pickle holds more than tensors, or transformers cannot load it.
        OutOfMemoryError: it does not fit in memory.
    """
    pickles = sorted(directory.glob(PICKLED))
    if any(directory.glob("*.safetensors")) or not pickles:
        return directory
    kept = [directory / name for name in SHAPING_FILES if (directory / name).is_file()]
    files = {file.name: hash_file(file) for file in [*pickles, *kept]}
    digest = documents.hash_json({"schema": CONVERSION_SCHEMA, "files": files})
    target = keep_in / f"{directory.name}-{digest[:16]}"
    if keep_folder(target, lambda folder: _rewrite(directory, kept, folder)):
        logger.warning(
            "read the pickled weights of %s with torch's restricted unpickler; kept as safetensors in %s",
            directory,
            target,
        )
    return target


def _rewrite(directory: Path, kept: list[Path], target: Path) -> None:
    import transformers

    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype="auto",
            use_safetensors=False,
            weights_only=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except pickle.UnpicklingError as error:
        raise ConfigurationError(
            f"the pickled weights of {directory} hold more than tensors ({_what_is_refused(error)}) and are refused; "
            "remedy: get them as safetensors from whoever made them"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, MemoryError) as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"memory does not suffice to rewrite the pickled weights of {directory} ({oom_message(error)}); "
                "remedy: rewrite them as safetensors on a larger machine"
            ) from error
        raise ConfigurationError(
            f"could not load the pickled weights of {directory} as a causal language model: {error}"
        ) from error
    model.generation_config = transformers.GenerationConfig()  # the folder's own comes with the files below
    model.save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)
    for file in kept:
        shutil.copyfile(file, target / file.name)
    if (directory / "additional_chat_templates").is_dir():
        shutil.copytree(directory / "additional_chat_templates", target / "additional_chat_templates")


def _what_is_refused(error: pickle.UnpicklingError) -> str:
    """What the unpickler would not take, without torch's advice to take it all the same."""
    text = str(error)
    if match := re.search(r"GLOBAL (\S+)", text):
        return f"it names {match[1]}"
    match = re.search(r"WeightsUnpickler error: (.{1,300})", text)
    return match[1].strip() if match else "the restricted unpickler refuses it"
