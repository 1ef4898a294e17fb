"""Where a model's files come from: a folder, a GGUF file, or an id of the Hugging Face hub.

`ModelSource.check` says early what can be told without the network, transformers or the weights; `directory` gives the
folder that is read, fetched or rewritten now if need be, the small files and their chat template before the weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from copa_harness.errors import ConfigurationError
from copa_harness.lm.local.chat_template import no_chat_template
from copa_harness.lm.local.files import shaping_files
from copa_harness.lm.local.sources.gguf import check_gguf, convert_gguf, is_gguf
from copa_harness.lm.local.sources.pickled import PICKLED, convert_pickled

_SMALL = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
"""Files of the hub beside the weights."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A place that a model may come from.

    Attributes:
        place: a folder, a GGUF file, or a Hugging Face id.
        name: the model's name, for messages; the place by default.
        keep_in: where weights in other formats are kept as safetensors; None for nowhere, then they are refused.
        allows_pickled: whether weights that come as a pickle only may be read, restrictedly (see `pickled`).
        brings_template: whether somebody gives a chat template, so that the model needs none.
        remedy: what else helps where an id cannot be fetched.
    """

    place: Path | str
    name: str = ""
    keep_in: Path | None = None
    allows_pickled: bool = False
    brings_template: bool = False
    remedy: str = ""

    @property
    def is_file(self) -> bool:
        """Whether it is a single file."""
        return is_gguf(self.place)

    def check(self) -> None:
        """Refuse what is known to be of no use, from the files at hand.

        Raises:
            ConfigurationError: no usable GGUF file, no weights in a folder, or no chat template.
        """
        path = Path(self.place).expanduser()
        if self.is_file:
            if not check_gguf(path).has_chat_template:
                self._need_template()
        elif path.is_dir():
            self._check_template(path)
            if not (self.allows_pickled and any(path.glob(PICKLED))):
                shaping_files(path)
        elif (cached := _cached(os.fspath(self.place), _SMALL)) is not None:
            self._check_template(cached)

    def directory(self) -> Path:
        """The folder in safetensors.

        An id that is not in the Hugging Face cache yet is fetched (safetensors, tokenizer and configuration only),
        unless `HF_HUB_OFFLINE=1`; that is the one place where this package may use the network.

        Raises:
            ConfigurationError: neither a model folder nor a GGUF file nor an id that can be had; a pickle that holds
                more than tensors; no chat template.
            OutOfMemoryError: weights that have to be rewritten do not fit.
        """
        path = Path(self.place).expanduser()
        if self.is_file:
            self.check()
            if self.keep_in is None:
                raise ConfigurationError(f"got the GGUF file {path} and no folder to keep its weights in")
            return convert_gguf(path.resolve(), keep_in=self.keep_in)
        if path.is_dir():
            self.check()
            directory = path.resolve()
        else:
            directory = self._snapshot(("*.safetensors",))
            if self.allows_pickled and not any(directory.glob("*.safetensors")):
                directory = self._snapshot(("*.safetensors", PICKLED), last=PICKLED)
        if not self.allows_pickled or self.keep_in is None:
            return directory
        return convert_pickled(directory, keep_in=self.keep_in)

    def _snapshot(self, weights: Sequence[str], *, last: str = "*.safetensors") -> Path:
        """The local copy of an id with such weights, fetched unless it is whole: with all of the `last` ones."""
        spec = os.fspath(self.place)
        if Path(spec).expanduser().is_absolute() or spec.count("/") != 1 or spec.startswith("."):
            raise ConfigurationError(
                f"got hf:{spec}, which is not a folder; expected a folder with config.json and *.safetensors, "
                "or a Hugging Face id such as hf:HuggingFaceTB/SmolLM2-135M-Instruct"
            )
        found = _cached(spec, (*_SMALL, *weights))
        if found is not None and has_all_weights(found, (last,)):
            self._check_template(found)
            return found
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            self._check_template(Path(snapshot_download(spec, allow_patterns=list(_SMALL))))
            return Path(snapshot_download(spec, allow_patterns=[*_SMALL, *weights]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigurationError(
                f"got {self.name or f'hf:{spec}'}, which is not, or not completely, in the Hugging Face cache and "
                f"could not be fetched ({said}); remedy: check the id and the connection, or download it and give the "
                f"folder as hf:<path>{self.remedy and f'; or {self.remedy}'}"
            ) from error

    def _check_template(self, directory: Path) -> None:
        if _lacks_template(directory):
            self._need_template()

    def _need_template(self) -> None:
        if not self.brings_template:
            raise no_chat_template(self.name or os.fspath(self.place))


def has_all_weights(directory: Path, patterns: Sequence[str]) -> bool:
    """Whether a folder has weights of such names and every file that an index of theirs lists."""
    if not any(any(directory.glob(pattern)) for pattern in patterns):
        return False
    for pattern in patterns:
        for index in directory.glob(f"{pattern}.index.json"):
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            if not all((directory / name).exists() for name in set(listed)):
                return False
    return True


def _cached(spec: str, patterns: Sequence[str]) -> Path | None:
    """The folder of an id in the Hugging Face cache, whole or not; None if there is nothing of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec, allow_patterns=list(patterns), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _lacks_template(directory: Path) -> bool:
    """Whether a folder's files show that its tokenizer has no chat template; False where they do not tell."""
    try:
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    places = ("chat_template*", "additional_chat_templates/*.jinja")
    return not settings.get("chat_template") and not any(any(directory.glob(place)) for place in places)
