"""Models in GGUF, llama.cpp's file format: weights (quantized or not), tokenizer and chat template in one file.

`read_header` reads what stands before the weights, by itself and in a fraction of a second, so that a file that cannot
be used is refused before anything is loaded. `convert_gguf` lets transformers dequantize the weights, once, and keeps
them as an ordinary model folder: float32 safetensors, tokenizer, chat template, configuration. From then on the file is
only hashed. What a GGUF says and transformers does not take over is put right here: further tokens that end an answer,
and scaled rotary positions.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import mmap
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copa_harness import documents
from copa_harness.errors import ConfigurationError, OutOfMemoryError
from copa_harness.lm.local.files import hash_file, remembered
from copa_harness.lm.local.memory import is_out_of_memory, oom_message
from copa_harness.lm.local.sources.keeping import keep_folder

logger = logging.getLogger(__name__)

CONVERSION_SCHEMA = 1
"""Raise when the same file comes to be rewritten differently."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
"""Types of settings in a GGUF header."""

_USUAL = frozenset({"llama", "qwen2", "qwen3", "gemma3"})
"""Architectures that every transformers since 5.0 reads."""

_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")

_PASSING = frozenset({"transformers_version", "_model_name_or_path", "_name_or_path"})
"""Keys of a configuration that say who wrote it."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's place in the file: `shape` as GGUF counts it, `kind` the number of its quantization."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def n_values(self) -> int:
        """Numbers in it."""
        product = 1
        for length in self.shape:
            product *= length
        return product


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What stands before the weights.

    Attributes:
        settings: by name; of lists only the length.
        tensors: in the order of the file.
        data_start: where the weights begin, in bytes.
    """

    settings: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    data_start: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.settings.get("general.architecture", ""))

    @property
    def has_chat_template(self) -> bool:
        """Whether the file brings a chat template."""
        return bool(self.settings.get("tokenizer.chat_template"))


def is_gguf(place: Path | str) -> bool:
    """Whether a path is meant as a GGUF file."""
    return os.fspath(place).lower().endswith(".gguf")


def read_header(file: Path) -> GgufHeader:
    """The header of a GGUF file.

    Raises:
        ConfigurationError: there is no such file, or it is no GGUF, or not a whole one.
    """
    try:
        return remembered(("gguf", file), [file], lambda: _read_header(file))
    except FileNotFoundError as error:
        raise ConfigurationError(f"got {file}, where there is no file; expected a model in GGUF") from error
    except OSError as error:
        raise ConfigurationError(f"got {file}, which cannot be read ({error}); expected a model in GGUF") from error
    except (struct.error, IndexError, KeyError, MemoryError, OverflowError) as error:
        raise _broken(file, "its header does not end") from error


def check_gguf(file: Path) -> GgufHeader:
    """The header of a GGUF file that may be converted, as far as can be told without reading its weights.

    Raises:
        ConfigurationError: it cannot be; the message says why and what helps.
    """
    header = read_header(file)
    if importlib.util.find_spec("gguf") is None:
        raise ConfigurationError(
            f"got the GGUF file {file}, and the package gguf, which reads them, is not installed; remedy: pip install "
            "gguf (or copa-harness[gguf])"
        )
    kind = header.settings.get("general.type", "model")
    if kind != "model":
        raise ConfigurationError(f"got the GGUF file {file}, which holds a thing of type {kind!r}; expected a model")
    if (n_files := int(header.settings.get("split.count", 1))) > 1:
        raise ConfigurationError(
            f"got the GGUF file {file}, one of {n_files} that make up a model; expected a single file; remedy: join "
            "them with llama.cpp's `llama-gguf-split --merge`"
        )
    _check_readable(file, header)
    needed, there = header.data_start + _data_bytes(header), file.stat().st_size
    if there < needed:
        raise _broken(file, f"it has {there:,} bytes, and its tensors reach to {needed:,}")
    return header


def convert_gguf(file: Path, *, keep_in: Path) -> Path:
    """The model folder made of a GGUF file, now or earlier.

    Args:
        file: the file.
        keep_in: where such folders are kept, one per content of the file.

    Raises:
        ConfigurationError: the file cannot be used, or the disk is full.
        OutOfMemoryError: the dequantized weights do not fit in memory.
    """
    header = check_gguf(file)
    digest = documents.hash_json({"schema": CONVERSION_SCHEMA, "file": hash_file(file)})
    target = keep_in / f"{file.stem}-{digest[:16]}"
    n_bytes = 4 * sum(tensor.n_values for tensor in header.tensors)
    if keep_folder(target, lambda folder: _write(file, header, folder), n_bytes=n_bytes):
        logger.info("dequantized %s; kept in %s", file, target)
    return target


def _read_header(file: Path) -> GgufHeader:
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ConfigurationError(
                f"got {file}, which is no GGUF file (it does not begin with the letters GGUF); expected a model in "
                "GGUF, or 'hf:' and a folder of transformers"
            )
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(data)
            version = reader.number("I")
            if version not in (2, 3):
                raise ConfigurationError(
                    f"got {file} in version {version} of GGUF; expected 2 or 3, little-endian; remedy: convert the "
                    "model again with a current llama.cpp"
                )
            n_tensors, n_settings = reader.number("Q"), reader.number("Q")
            settings = {}
            for _ in range(n_settings):
                name = reader.text()
                settings[name] = reader.value(reader.number("I"))
            tensors = []
            for _ in range(n_tensors):
                name, n_dimensions = reader.text(), reader.number("I")
                shape = tuple(reader.number("Q") for _ in range(n_dimensions))
                tensors.append(GgufTensor(name, shape, reader.number("I"), reader.number("Q")))
            alignment = int(settings.get("general.alignment", 32))
            return GgufHeader(settings, tuple(tensors), -(-reader.place // alignment) * alignment)


class _Reader:
    """Reads a GGUF header value by value."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.place = data, 4

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self._data, self.place)
        self.place += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        end = self.number("Q") + self.place
        if end > len(self._data):
            raise IndexError(end)
        found = self._data[self.place : end].decode("utf-8", errors="replace")
        self.place = end
        return found

    def value(self, kind: int) -> Any:
        """A setting; of a list its length."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        kind, length = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            self.place += length * struct.calcsize(f"<{_SCALARS[kind]}")
        else:
            for _ in range(length):
                if kind == _STRING:
                    self.place += 8 + struct.unpack_from("<Q", self._data, self.place)[0]
                else:
                    self.value(kind)
        return length


def _check_readable(file: Path, header: GgufHeader) -> None:
    """Refuse an architecture that transformers does not read, and a quantization that is not undone."""
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if header.architecture not in _USUAL:  # transformers takes a second to import, and a cached answer needs none
        from transformers import integrations

        known = {name.replace("_", "") for name in getattr(integrations, "GGUF_CONFIG_MAPPING", ())}
        if known and header.architecture.replace("-", "").replace("_", "") not in known:
            raise ConfigurationError(
                f"got the GGUF file {file} of the architecture {header.architecture!r}, which the installed "
                "transformers does not read from GGUF; remedy: the model's folder in safetensors, as 'hf:<path or id>'"
            )
    for kind, tensor in {tensor.kind: tensor for tensor in header.tensors}.items():
        try:
            known_kind = GGMLQuantizationType(kind)
            dequantize(np.zeros(GGML_QUANT_SIZES[known_kind][1], np.uint8), known_kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise ConfigurationError(
                f"got the GGUF file {file}, whose tensor {tensor.name} has a quantization that the installed package "
                f"gguf does not undo ({error}); remedy: pip install -U gguf, or the model in another quantization, "
                "such as Q8_0 or Q4_K_M"
            ) from error


def _data_bytes(header: GgufHeader) -> int:
    """Bytes from the first tensor to the end of the last."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    end = 0
    for tensor in header.tensors:
        n_block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
        end = max(end, tensor.offset + tensor.n_values // n_block * n_bytes)
    return end


def _broken(file: Path, what: str) -> ConfigurationError:
    return ConfigurationError(f"got the GGUF file {file}, which is not whole: {what}; remedy: fetch it again")


def _write(file: Path, header: GgufHeader, target: Path) -> None:
    """The model folder of a file, by transformers."""
    try:
        model, tokenizer = _load(file, header)
        rotary = _scaled_rotary(file, header, model.config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, MemoryError) as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"memory does not suffice to dequantize {file} ({oom_message(error)}); remedy: a smaller model, or "
                "less else in memory"
            ) from error
        raise ConfigurationError(
            f"transformers could not read the GGUF file {file} ({type(error).__name__}: {error}); expected a causal "
            "language model it has a reader for; remedy: the model's folder in safetensors, as 'hf:<path or id>'"
        ) from error
    from safetensors.torch import save_file

    target.mkdir()
    tensors: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        if not any(tensor.data_ptr() == other.data_ptr() for other in tensors.values()):  # tied weights stand once
            tensors[name] = tensor.contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(target)
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _PASSING}
    settings.pop("quantization_config", None)
    found = (header.settings.get(f"tokenizer.ggml.{name}") for name in _END_TOKENS)
    ends = sorted({int(token) for token in found if token is not None})
    # A class has its own default for what the file leaves open, and that would be any other token here.
    settings |= {"architectures": [type(model).__name__], "dtype": "float32", "eos_token_id": ends or None, **rotary}
    _write_json(target / "config.json", settings)
    _write_json(target / "generation_config.json", {"eos_token_id": ends} if ends else {})


def _load(file: Path, header: GgufHeader) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer, as transformers reads the file with nothing beside it."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").symlink_to(file.resolve())
        given = {"gguf_file": "model.gguf", "local_files_only": True, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(folder, **given)
        tokenizer = _tokenizer(folder, **given)
        if hasattr(transformers, "GgufConfig"):  # else weights of some architectures stay quantized
            given["quantization_config"] = transformers.GgufConfig(gguf_file="model.gguf", dequantize=True)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, **given
        )
    lost = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if lost or report["error_msgs"]:
        what = ", ".join(lost[:3]) or str(report["error_msgs"][0])
        raise ValueError(f"the architecture {header.architecture!r} is not filled by its tensors: {what}")
    return model, tokenizer


def _tokenizer(folder: str, **given: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **given)
    except BaseException as error:  # tokenizers raises a bare Exception, and where its Rust code panics not even that
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"its vocabulary makes no tokenizer: {error}") from error


def _scaled_rotary(file: Path, header: GgufHeader, config: Any) -> dict[str, Any]:
    """`rope_parameters` where a file scales rotary positions: transformers' readers leave that out.

    llama.cpp keeps Llama 3's scaling as a tensor of divisors, one a frequency; a linear one as a setting.

    Raises:
        ValueError: they are scaled in a way that cannot be said in the configuration.
    """
    plain = getattr(config, "rope_parameters", None) or {}
    kind = header.settings.get(f"{header.architecture}.rope.scaling.type", "none")
    divisors = next((tensor for tensor in header.tensors if tensor.name == "rope_freqs.weight"), None)
    if divisors is not None:
        return {"rope_parameters": _llama3_rotary(file, header, divisors, config)}
    if kind == "none" or plain.get("rope_type", "default") != "default":
        return {}
    factor = header.settings.get(f"{header.architecture}.rope.scaling.factor")
    if kind != "linear" or factor is None:
        raise ValueError(f"rotary positions scaled by {kind!r}")
    scaled = {"rope_type": "linear", "factor": float(factor)}
    if "full_attention" in plain:
        return {"rope_parameters": {**plain, "full_attention": {**plain["full_attention"], **scaled}}}
    return {"rope_parameters": {**plain, **scaled}}


def _llama3_rotary(file: Path, header: GgufHeader, divisors: GgufTensor, config: Any) -> dict[str, Any]:
    """The parameters of Llama 3's scaling that give these divisors."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    with file.open("rb") as stream:
        stream.seek(header.data_start + divisors.offset)
        given = struct.unpack(f"<{divisors.n_values}f", stream.read(4 * divisors.n_values))
    parameters = {
        "rope_type": "llama3",
        "rope_theta": config.rope_parameters["rope_theta"],
        "factor": round(max(given), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled = type(config).from_dict({**config.to_dict(), "rope_parameters": parameters})
    width = 2 * len(given)
    base = 1.0 / parameters["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    if len(frequencies) != len(given) or not torch.allclose(frequencies, base / torch.tensor(given), rtol=1e-3):
        raise ValueError("rotary positions scaled frequency by frequency, in another way than Llama 3's")
    return parameters


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
