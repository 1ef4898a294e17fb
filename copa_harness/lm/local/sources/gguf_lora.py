"""A trained LoRA adapter as a GGUF file, for llama.cpp beside a base model in GGUF (`llama-server --lora FILE`).

Of a weight W (d_out x d_in) an adapter holds A (rank x d_in) and B (d_out x rank); the tuned weight is
W + scale * B A with scale = alpha / rank. llama.cpp keeps both as `<weight>.lora_a` and `.lora_b`. It rotates
neighbouring pairs of a query's or key's numbers where transformers rotates its halves, so that in files of Llama's
architecture the rows of these weights, and therefore of their B, stand in another order.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from copa_harness.atomic_files import temporary_name
from copa_harness.errors import ConfigurationError
from copa_harness.lm.local.files import CONFIG_FILE, WEIGHTS_FILE, read_lora
from copa_harness.lm.local.sources.gguf import GgufHeader, check_gguf, is_gguf
from copa_harness.lm.local.sources.names import is_local_name, named_place

_REORDERED = {"llama": ("attn_q", "attn_k"), "qwen2": (), "qwen3": ()}
"""Architecture -> weights whose rows stand in llama.cpp's order."""

_PLAIN: dict[str, Any] = {
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
}
"""What an adapter's configuration has to say; a file of llama.cpp has no place for anything else."""


def write_gguf_lora(lora: Path, file: Path, *, base: Path | None = None) -> None:
    """Write a LoRA adapter as a GGUF file.

    Args:
        lora: the adapter's folder.
        file: where to.
        base: the base model in GGUF, in any quantization; its header says how the weights are called and ordered. By
            default the file that the adapter was trained on, if it was one.

    Raises:
        ConfigurationError: the adapter, or the base, is of a kind that cannot be written, they do not fit together, or
            the file cannot be written.
        ArtifactError: the adapter's folder is damaged.
    """
    import gguf
    from safetensors.numpy import load_file

    trained_on = str(read_lora(lora).details.get("base", ""))
    base = base or _file_of(trained_on)
    header = check_gguf(base)
    if header.architecture not in _REORDERED:
        raise ConfigurationError(
            f"got the base {base} of the architecture {header.architecture!r}; expected {', '.join(_REORDERED)}: the "
            "order of the others' weights is not known here"
        )
    settings = json.loads((lora / CONFIG_FILE).read_text(encoding="utf-8"))
    if odd := {name: settings[name] for name, value in _PLAIN.items() if settings.get(name, value) != value}:
        raise ConfigurationError(f"got the LoRA adapter {lora} with {odd}; expected low-rank updates of one rank only")
    rank = settings["r"]
    partial = temporary_name(file)
    writer = gguf.GGUFWriter(partial, header.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = settings["lora_alpha"] * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    places = _Places(header)
    for name, values in load_file(lora / WEIGHTS_FILE).items():
        place, part = places.of(name, values.shape)
        if part == "b" and place.endswith(_REORDERED[header.architecture]):
            n_heads = places.n_heads(place)
            values = values.reshape(n_heads, 2, -1, rank).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{place}.weight.lora_{part}", values)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.rename(file)
    except OSError as error:
        raise ConfigurationError(f"cannot write {file} ({error}); expected a path in a folder that takes it") from error
    finally:
        partial.unlink(missing_ok=True)


def _file_of(name: str) -> Path:
    place = named_place(name, option="base model")[0] if is_local_name(name) else name
    if isinstance(place, str) or not is_gguf(place):
        raise ConfigurationError(
            f"got a LoRA adapter of {name!r}, which is no GGUF file here; expected that model in GGUF too (--base)"
        )
    return place


class _Places:
    """Where the weights of an adapter belong in the base model."""

    def __init__(self, header: GgufHeader) -> None:
        import gguf

        self._header = header
        architecture = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture)
        self._names = gguf.get_tensor_name_map(architecture, self._setting("block_count"))
        self._shapes = {tensor.name: tensor.shape for tensor in header.tensors}

    def _setting(self, name: str, default: int = 0) -> int:
        return int(self._header.settings.get(f"{self._header.architecture}.{name}", default))

    def of(self, name: str, shape: tuple[int, ...]) -> tuple[str, str]:
        """llama.cpp's name of the weight, without `.weight`, and `a` or `b`."""
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        place: Any = match and self._names.get_name(match[1])
        found = self._shapes.get(f"{place}.weight", (0, 0))
        if match is None or place is None or found["AB".index(match[2])] != shape[1 - "AB".index(match[2])]:
            raise ConfigurationError(
                f"got {name} of shape {list(shape)} in the LoRA adapter, and the base in GGUF has no weight it fits; "
                "expected the model that the adapter was trained on"
            )
        return str(place), match[2].lower()

    def n_heads(self, place: str) -> int:
        """Heads of a query or key weight."""
        n_heads = self._setting("attention.head_count")
        return n_heads if place.endswith("attn_q") else self._setting("attention.head_count_kv", n_heads)
