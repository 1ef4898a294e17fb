"""Model folders and LoRA folders that `local_llama` computes exactly: which they are, and their tensors.

A folder is taken only when every setting that could change the arithmetic has a value known here; all others are
answered by transformers and peft. Knows nothing of how a forward runs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copa_harness.lm.local_lora import CONFIG_FILE, WEIGHTS_FILE, LoraFiles

_KINDS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_WITHOUT_EFFECT = frozenset(
    {
        "architectures", "attention_bias", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "head_dim",
        "hidden_act", "hidden_size", "initializer_range", "intermediate_size", "layer_types", "max_position_embeddings",
        "max_window_layers", "mlp_bias", "model_type", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "pad_token_id", "pretraining_tp", "rms_norm_eps", "rope_parameters", "rope_scaling",
        "rope_theta", "sliding_window", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
        "use_sliding_window", "vocab_size",
    }
)  # fmt: skip
"""Settings of a configuration that are read here, or that change no logits; any other one that is set is refused."""

_LORA_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules", "inference_mode",
        "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
        "peft_type", "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type", "use_rslora",
    }
)  # fmt: skip
_LORA_TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.([qkvo]|gate|up|down)_proj\.lora_([AB])\.weight"
)


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes of a Llama-like model, under the names of its configuration.

    `eos_ids` and `pad_id` are its special tokens, `rope_theta` the base of its rotary positions.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    eos_ids: frozenset[int]
    pad_id: int


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """(layer, projection `q`..`down`) -> (A [r, in], B times the adapter's scale [out, r])."""

    pairs: Mapping[tuple[int, str], tuple[Any, Any]]


def read_shape(directory: Path) -> LlamaShape | None:
    """The sizes of the model in a folder; None if it is not plain enough to be computed by `local_llama`."""
    config = _read_json(directory / "config.json")
    kind = str(config.get("model_type"))
    is_plain = (
        kind in _KINDS
        and config.get("architectures") == [_KINDS[kind]]
        and config.get("hidden_act") == "silu"
        and not (config.get("use_sliding_window") or (kind == "llama" and config.get("sliding_window")))
        and set(config.get("layer_types") or ()) <= {"full_attention"}
        and not any(value for name, value in config.items() if name not in _WITHOUT_EFFECT)
        and (directory / "model.safetensors").is_file()
    )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if not is_plain or theta is None or set(rope) - {"rope_theta", "rope_type"}:
        return None
    if rope.get("rope_type", "default") != "default":
        return None
    ends = [_read_json(directory / "generation_config.json").get("eos_token_id"), config.get("eos_token_id")]
    eos = {end for value in ends for end in (value if isinstance(value, list) else [value]) if end is not None}
    pad = config.get("pad_token_id")
    try:
        heads = int(config["num_attention_heads"])
        return LlamaShape(
            architecture=_KINDS[kind],
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope_theta=float(theta),
            tie_word_embeddings=bool(config["tie_word_embeddings"]),
            eos_ids=frozenset(eos),
            pad_id=int(pad if pad is not None else min(eos, default=0)),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_hidden_layers=int(config["num_hidden_layers"]),
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=int(config["max_position_embeddings"]),
        )
    except KeyError:
        return None  # a setting left to the library's default is the library's to know


def read_tensors(directory: Path) -> dict[str, Any]:
    """All tensors of a model folder in float32, by name; memory-mapped where the file holds float32."""
    return _tensors(directory / "model.safetensors")


def read_lora_tensors(lora: LoraFiles) -> LoraTensors | None:
    """A LoRA adapter's tensors; None if it is more than low-rank updates of attention and MLP projections."""
    config = _read_json(lora.directory / CONFIG_FILE)
    if (
        config.get("peft_type") != "LORA"
        or config.get("bias") != "none"
        or config.get("init_lora_weights") not in (True, False, "gaussian")
        or any(value for name, value in config.items() if name not in _LORA_WITHOUT_EFFECT)
    ):
        return None
    rank = int(config["r"])
    scale = float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    halves: dict[tuple[int, str], dict[str, Any]] = {}
    for name, tensor in _tensors(lora.directory / WEIGHTS_FILE).items():
        found = _LORA_TENSOR.fullmatch(name)
        if found is None:
            return None
        halves.setdefault((int(found[1]), found[2]), {})[found[3]] = tensor
    if any(set(half) != {"A", "B"} for half in halves.values()):
        return None
    return LoraTensors({place: (half["A"], half["B"] * scale) for place, half in halves.items()})


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor.float() for name, tensor in load_file(path).items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # the library says better what is wrong with it
    return found if isinstance(found, dict) else {}
