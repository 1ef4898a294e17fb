"""A Llama-like model's forward in plain torch on the CPU, for batches of several prefixes and several LoRA adapters.

Symbols: B rows, n new tokens each, T = B * n tokens, H query and K key-value heads of width D. What it does that the
library's does not: the projections that read one input are one matrix product, with weights laid out once for oneDNN
(small batches run two to three times as fast as with weights laid out anew at every call); rows of several adapters
share every product of the base, x W, and each adapter adds (x A) B to its own rows (Sheng et al. 2023, "S-LoRA",
arXiv:2311.03285); nothing of transformers is imported, which takes longer than reading a small model. The arithmetic is
the library's up to rounding.

`read_shape` and `read_lora_tensors` say which model folders and LoRA folders are computed here: those in which every
setting that could change the arithmetic has a value known here. All others are answered by transformers and peft.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copa_harness.lm.local.attention import CascadeCache, cascade_attention
from copa_harness.lm.local.files import CONFIG_FILE, WEIGHTS_FILE, LoraFiles

PACK_LIMIT_BYTES = 1 << 30
"""More weights are used as they lie in memory: laid out anew, they are there twice."""

_FUSED = {"qkv": ("q", "k", "v"), "out": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
"""Products of a layer and the projections in each."""

_KINDS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

_WITHOUT_EFFECT = frozenset(
    {
        "architectures",
        "attention_bias",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "mlp_bias",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "pretraining_tp",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_sliding_window",
        "vocab_size",
    }
)
"""Settings of a configuration that are read here, or that change no logits; any other one that is set is refused."""

_LORA_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)

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
    """The sizes of the model in a folder; None if it is not plain enough to be computed here."""
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


@dataclass(frozen=True, slots=True)
class LoraRows:
    """Rows `start` to `stop` (exclusive) of a batch and the adapter that answers them."""

    start: int
    stop: int
    lora: FusedLora


class FusedLora:
    """One adapter's updates: for every (layer, product) A' [in, r'] and B' [r', out], r' the sum over its projections.

    B' is block diagonal, so one pair serves a product of several projections.
    """

    def __init__(self, tensors: LoraTensors, shape: LlamaShape) -> None:
        import torch

        widths = {"q": shape.num_attention_heads * shape.head_dim, "k": shape.num_key_value_heads * shape.head_dim}
        widths |= {"v": widths["k"], "o": shape.hidden_size, "down": shape.hidden_size}
        widths |= {"gate": shape.intermediate_size, "up": shape.intermediate_size}
        self.updates: dict[tuple[int, str], tuple[Any, Any]] = {}
        for layer in range(shape.num_hidden_layers):
            for product, parts in _FUSED.items():
                pairs = {part: tensors.pairs[layer, part] for part in parts if (layer, part) in tensors.pairs}
                if not pairs:
                    continue
                inner = torch.cat([a for a, _ in pairs.values()]).t().contiguous()
                outer = torch.zeros(inner.shape[1], sum(widths[part] for part in parts))
                row = column = 0
                for part in parts:
                    if part in pairs:
                        b = pairs[part][1]
                        outer[row : row + b.shape[1], column : column + b.shape[0]] = b.t()
                        row += b.shape[1]
                    column += widths[part]
                self.updates[layer, product] = (inner, outer)


class _Product:
    """x [W1 | W2 | ..] + bias for T tokens: one product of weights laid out for oneDNN, or one of each as it lies."""

    __slots__ = ("biases", "packed", "weights")

    def __init__(self, weights: Sequence[Any], biases: Sequence[Any], *, packs: bool) -> None:
        import torch

        self.weights, self.biases, self.packed = list(weights), list(biases), None
        if packs:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(self.weights), 32)
            self.biases = [None if self.biases[0] is None else torch.cat(self.biases)]
            self.weights = []

    def __call__(self, x: Any, residual: Any = None) -> Any:
        import torch

        if self.packed is None:
            parts = [torch.nn.functional.linear(x, w, b) for w, b in zip(self.weights, self.biases, strict=True)]
            product = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
            return product if residual is None else product.add_(residual)
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.biases[0], "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.biases[0], "add")


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: _Product
    out: _Product
    gate_up: _Product
    down: _Product
    attention_norm: Any
    mlp_norm: Any


class LlamaDecoder:
    """A Llama-like model in float32 on the CPU, of `n_layers` layers and `n_parameters` weights.

    Args:
        shape: its sizes.
        tensors: its weights by the names of the model's file; read, never changed.
    """

    def __init__(self, shape: LlamaShape, tensors: dict[str, Any]) -> None:
        import torch

        self.shape, self.n_layers = shape, shape.num_hidden_layers
        self.n_parameters = sum({tensor.data_ptr(): tensor.numel() for tensor in tensors.values()}.values())
        packs = 4 * self.n_parameters <= PACK_LIMIT_BYTES and _packs()
        self._embedding = tensors["model.embed_tokens.weight"]
        head = self._embedding if shape.tie_word_embeddings else tensors["lm_head.weight"]
        self._head = _Product([head], [None], packs=packs)
        self._norm = tensors["model.norm.weight"]

        def product(prefix: str, names: Sequence[str]) -> _Product:
            places = [f"{prefix}.{name}_proj" for name in names]
            biases = [tensors.get(f"{place}.bias") for place in places]
            return _Product([tensors[f"{place}.weight"] for place in places], biases, packs=packs)

        self._layers = []
        for index in range(shape.num_hidden_layers):
            place = f"model.layers.{index}"
            attention, mlp = f"{place}.self_attn", f"{place}.mlp"
            self._layers.append(
                _Layer(
                    product(attention, _FUSED["qkv"]),
                    product(attention, _FUSED["out"]),
                    product(mlp, _FUSED["gate_up"]),
                    product(mlp, _FUSED["down"]),
                    tensors[f"{place}.input_layernorm.weight"],
                    tensors[f"{place}.post_attention_layernorm.weight"],
                )
            )
        steps = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
        self._frequencies = 1.0 / (shape.rope_theta**steps)

    def read(
        self, ids: Any, *, positions: Any, bias: Any, cascade: CascadeCache, n_kept: int, loras: Sequence[LoraRows] = ()
    ) -> Any:
        """Append new tokens to a batch.

        Args:
            ids: [B, n].
            positions: of the new tokens, [B, n].
            bias: added to the scores of the new tokens over all own tokens, [B, 1, n, own]; None for none, then a
                token sees all own tokens before it.
            cascade: the batch's states, extended here.
            n_kept: last tokens of each row to give logits for.
            loras: which rows are answered by which adapter, in order; rows in none by the base.

        Returns:
            Logits [B, n_kept, vocabulary].
        """
        import torch

        shape = self.shape
        n_rows, n_new = ids.shape
        n_rotated = shape.num_attention_heads + shape.num_key_value_heads
        tokens = [(rows.lora.updates, rows.start * n_new, rows.stop * n_new) for rows in loras]
        angles = positions[..., None, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        hidden = torch.nn.functional.embedding(ids.reshape(-1), self._embedding)
        for index, layer in enumerate(self._layers):

            def run(name: str, x: Any, residual: Any = None, *, layer: _Layer = layer, index: int = index) -> Any:
                y = getattr(layer, name)(x, residual)
                for updates, start, stop in tokens:
                    if (index, name) in updates:
                        inner, outer = updates[index, name]
                        y[start:stop].addmm_(x[start:stop] @ inner, outer)
                return y

            states = run("qkv", self._normed(hidden, layer.attention_norm)).view(n_rows, n_new, -1, shape.head_dim)
            rotated = _rotate(states[:, :, :n_rotated], cos, sin).transpose(1, 2)
            keys, values = cascade.layers[index].update(
                rotated[:, shape.num_attention_heads :], states[:, :, n_rotated:].transpose(1, 2)
            )
            attended = cascade_attention(
                rotated[:, : shape.num_attention_heads],
                keys,
                values,
                bias=bias,
                scale=shape.head_dim**-0.5,
                prefixes=cascade.prefixes(index),
            )
            hidden = run("out", attended.reshape(n_rows * n_new, -1), hidden)
            gate, up = run("gate_up", self._normed(hidden, layer.mlp_norm)).chunk(2, dim=-1)
            hidden = run("down", torch.nn.functional.silu(gate).mul_(up), hidden)
        last = hidden.view(n_rows, n_new, -1)[:, -n_kept:].reshape(n_rows * n_kept, -1)
        return self._head(self._normed(last, self._norm)).view(n_rows, n_kept, -1)

    def prefill(self, ids: Sequence[int], lora: FusedLora | None = None) -> PrefixStates:
        """Keys and values of a prefix."""
        import torch

        cascade = CascadeCache(self.n_layers, [()], room=len(ids))
        rows = [] if lora is None else [LoraRows(0, 1, lora)]
        self.read(
            torch.tensor([ids]),
            positions=torch.arange(len(ids))[None],
            bias=None,
            cascade=cascade,
            n_kept=1,
            loras=rows,
        )
        return PrefixStates([LayerStates(*layer.buffers) for layer in cascade.layers])

    def _normed(self, x: Any, weight: Any) -> Any:
        scale = x.pow(2).mean(-1, keepdim=True).add_(self.shape.rms_norm_eps).rsqrt_()
        return (x * scale).mul_(weight)


@dataclass(frozen=True)
class LayerStates:
    """Keys and values of one layer, [1, K, tokens, D]."""

    keys: Any
    values: Any


@dataclass(frozen=True, slots=True)
class PrefixStates:
    """States of a prefix, one entry a layer, as `RowGroup` wants them."""

    layers: list[LayerStates]


def _rotate(states: Any, cos: Any, sin: Any) -> Any:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) in Llama's layout: halves, not pairs."""
    import torch

    first, second = states.chunk(2, dim=-1)
    rotated = torch.empty_like(states, memory_format=torch.contiguous_format)
    half = first.shape[-1]
    torch.mul(first, cos, out=rotated[..., :half]).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=rotated[..., half:]).addcmul_(first, sin)
    return rotated


def _packs() -> bool:
    """Whether this torch has oneDNN's linear layers with weights laid out beforehand, and they work here."""
    import torch

    if not torch.backends.mkldnn.is_available():
        return False
    try:
        product = _Product([torch.ones(8, 8)], [None], packs=True)
        return bool((product(torch.ones(2, 8), torch.ones(2, 8)) == 9).all())
    except (AttributeError, RuntimeError, NotImplementedError):
        return False  # another build of torch: plain products do as well
