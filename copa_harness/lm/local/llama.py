"""A Llama-like model's forward in plain torch on the CPU, for batches of several prefixes and several LoRA adapters.

Symbols: B rows, n new tokens each, T = B * n tokens, H query and K key-value heads of width D. What it does that the
library's does not: the projections that read one input are one matrix product, with weights laid out once for oneDNN
(small batches run two to three times as fast as with weights laid out anew at every call); rows of several adapters
share every product of the base, x W, and each adapter adds (x A) B to its own rows (Sheng et al. 2023, "S-LoRA",
arXiv:2311.03285); nothing of transformers is imported, which takes longer than reading a small model. The arithmetic is
the library's up to rounding.

Llama, Mistral, Qwen2, Qwen3 and Gemma 3 are one network with a few switches, which `LlamaShape` holds. `library_shape`
takes them from the configuration as transformers understood it: keys of a config.json that the model's configuration
class does not define shape nothing there, so they are not looked at; a setting the class defines and that is not known
here must have its default; and the weights must be exactly those that are used here. Whatever differs raises
`UnsupportedModel` with the reason, and transformers computes. `read_lora_tensors` does the same for LoRA folders, which
peft then serves.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copa_harness.lm.local.attention import CascadeCache, UnsupportedModel, cascade_attention
from copa_harness.lm.local.files import CONFIG_FILE, WEIGHTS_FILE, LoraFiles

PACK_LIMIT_BYTES = 1 << 30
"""More weights are used as they lie in memory: laid out anew, they are there twice."""

_FUSED = {"qkv": ("q", "k", "v"), "out": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
"""Products of a layer and the projections in each."""


@dataclass(frozen=True, slots=True)
class _Family:
    """How one architecture of transformers differs from Llama.

    Attributes:
        architecture: its class.
        normalizes_heads: queries and keys are normalized head by head before they are rotated.
        is_gemma: norms multiply by 1 + weight and stand behind attention and MLP as well, embeddings are scaled by the
            square root of their width, and the scale of the scores is a setting of its own.
    """

    architecture: str
    normalizes_heads: bool = False
    is_gemma: bool = False


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM"),
    "mistral": _Family("MistralForCausalLM"),
    "qwen2": _Family("Qwen2ForCausalLM"),
    "qwen3": _Family("Qwen3ForCausalLM", normalizes_heads=True),
    "gemma3_text": _Family("Gemma3ForCausalLM", normalizes_heads=True, is_gemma=True),
}

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

_READ = frozenset(
    """
    head_dim hidden_act hidden_activation hidden_size intermediate_size layer_types max_position_embeddings
    num_attention_heads num_hidden_layers num_key_value_heads query_pre_attn_scalar rms_norm_eps rope_parameters
    sliding_window tie_word_embeddings vocab_size
    """.split()  # noqa: SIM905 - a word list
)
"""Settings that shape the forward and are read here."""

_WITHOUT_EFFECT = frozenset(
    """
    attention_bias attention_dropout bos_token_id eos_token_id initializer_range max_window_layers mlp_bias
    model_type pad_token_id pretraining_tp use_cache use_sliding_window
    """.split()  # noqa: SIM905 - a word list
)
"""Settings that change no logits, or that the weights and the layers' types say as well."""

_LORA_WITHOUT_EFFECT = frozenset(
    """
    auto_mapping base_model_name_or_path bias ensure_weight_tying exclude_modules inference_mode init_lora_weights
    layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core peft_type peft_version
    qalora_group_size r revision target_modules task_type use_rslora
    """.split()  # noqa: SIM905 - a word list
)

_LORA_TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.([qkvo]|gate|up|down)_proj\.lora_([AB])\.weight"
)


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary positions: what a position is multiplied by for its angles, [D / 2], and a factor on cosine and sine."""

    frequencies: tuple[float, ...]
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What differs from layer to layer: rotary positions, and how many tokens back a token sees (None: all)."""

    rotary: Rotary
    window: int | None = None


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes and switches of a Llama-like model, the sizes under the names of its configuration.

    Attributes:
        architecture: its class in transformers.
        layers: what differs from layer to layer.
        activation: `silu` or `gelu_tanh`.
        scale: factor on the attention scores.
        embedding_scale: factor on the embeddings.
        norm_offset: added to the weights of the norms.
        normalizes_heads: queries and keys are normalized head by head.
        normalizes_outputs: what attention and MLP give is normalized before it is added.
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
    tie_word_embeddings: bool
    layers: tuple[LayerShape, ...]
    activation: str
    scale: float
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    normalizes_heads: bool = False
    normalizes_outputs: bool = False

    def tensor_names(self) -> tuple[set[str], set[str]]:
        """Names of the weights that the forward needs, and of those it uses if they are there."""
        places = [f"model.layers.{index}" for index in range(self.num_hidden_layers)]
        linear = [f"{place}.self_attn.{name}_proj" for place in places for name in "qkvo"]
        linear += [f"{place}.mlp.{name}_proj" for place in places for name in ("gate", "up", "down")]
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["self_attn.q_norm", "self_attn.k_norm"] if self.normalizes_heads else []
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if self.normalizes_outputs else []
        needed = {f"{name}.weight" for name in (*linear, *(f"{place}.{norm}" for place in places for norm in norms))}
        needed |= {"model.embed_tokens.weight", "model.norm.weight"}
        optional = {f"{name}.bias" for name in linear}
        (optional if self.tie_word_embeddings else needed).add("lm_head.weight")
        return needed, optional


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """(layer, projection `q`..`down`) -> (A [r, in], B times the adapter's scale [out, r])."""

    pairs: Mapping[tuple[int, str], tuple[Any, Any]]


def read_shape(directory: Path) -> LlamaShape:
    """The shape of a model from its config.json alone, which must name every setting; for the shipped model.

    Raises:
        UnsupportedModel: it has rotary positions of a special kind.
        KeyError: a setting is missing.
    """
    config = _read_json(directory / "config.json")

    def rotary(parameters: Mapping[str, Any], layer_type: str | None) -> Rotary:
        if parameters.get("rope_type", "default") != "default":
            raise UnsupportedModel(f"rotary positions of type {parameters['rope_type']!r}")
        return _plain_rotary(parameters["rope_theta"], int(config["head_dim"]))

    return _shape(config, rotary)


def library_shape(model: Any) -> LlamaShape:
    """The shape of a model in memory as transformers loaded it.

    Raises:
        UnsupportedModel: something about it is not computed here; the message says what.
    """
    import torch
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config, name = model.config, type(model).__name__
    family = _FAMILIES.get(config.model_type)
    if family is None or name != family.architecture:
        raise UnsupportedModel(f"{name} is not among {', '.join(one.architecture for one in _FAMILIES.values())}")
    settings = config.to_dict()
    own = type(config)().to_dict()
    known = _READ | _WITHOUT_EFFECT | set(transformers.PreTrainedConfig().to_dict())
    if special := [key for key, usual in own.items() if key not in known and settings.get(key) != usual]:
        raise UnsupportedModel(", ".join(f"{key}={settings.get(key)!r}" for key in special))

    def rotary(parameters: Mapping[str, Any], layer_type: str | None) -> Rotary:
        kind = parameters.get("rope_type", "default")
        if kind == "default":
            return _plain_rotary(parameters["rope_theta"], int(settings["head_dim"]))
        if kind in ("dynamic", "longrope") or kind not in ROPE_INIT_FUNCTIONS:
            raise UnsupportedModel(f"rotary positions of type {kind!r}")
        given = {} if layer_type is None else {"layer_type": layer_type}
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **given)
        return Rotary(tuple(frequencies.tolist()), float(factor))

    settings.setdefault("head_dim", config.hidden_size // config.num_attention_heads)
    shape = _shape(settings, rotary)
    tensors = model.state_dict()
    needed, optional = shape.tensor_names()
    if other := sorted((needed - set(tensors)) | (set(tensors) - needed - optional)):
        raise UnsupportedModel(f"weights that are missing or not known here: {', '.join(other[:3])}")
    if kinds := {str(tensor.dtype) for tensor in tensors.values()} - {"torch.float32"}:
        raise UnsupportedModel(f"weights in {', '.join(sorted(kinds))}")
    return shape


def _shape(config: Mapping[str, Any], rotary: Callable[[Mapping[str, Any], str | None], Rotary]) -> LlamaShape:
    """The shape that settings say; `rotary` makes rotary positions from their parameters and the layer type."""
    family = _FAMILIES[config["model_type"]]
    activation = config["hidden_activation" if family.is_gemma else "hidden_act"]
    if activation not in _ACTIVATIONS:
        raise UnsupportedModel(f"the activation {activation!r}")
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    width = int(config.get("head_dim") or hidden // heads)
    kinds = config.get("layer_types")
    if kinds is None:  # Llama knows none; Mistral has one window for all layers
        window = config.get("sliding_window") if config["model_type"] == "mistral" else None
        kinds = ["sliding_attention" if window else "full_attention"] * int(config["num_hidden_layers"])
    if other := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"layers of type {', '.join(sorted(map(str, other)))}")
    if "sliding_attention" in kinds:
        raise UnsupportedModel(f"a sliding window of {config.get('sliding_window')} tokens")
    rope = config["rope_parameters"]
    differs = any(isinstance(value, Mapping) for value in rope.values())
    rotaries = {kind: rotary(rope[kind], kind) if differs else rotary(rope, None) for kind in set(kinds)}
    if any(2 * len(one.frequencies) != width for one in rotaries.values()):
        raise UnsupportedModel("rotary positions of a part of each head")
    return LlamaShape(
        architecture=family.architecture,
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        num_hidden_layers=int(config["num_hidden_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=width,
        vocab_size=int(config["vocab_size"]),
        max_position_embeddings=int(config["max_position_embeddings"]),
        rms_norm_eps=float(config["rms_norm_eps"]),
        tie_word_embeddings=bool(config["tie_word_embeddings"]),
        layers=tuple(LayerShape(rotaries[kind]) for kind in kinds),
        activation=_ACTIVATIONS[activation],
        scale=float(config["query_pre_attn_scalar"] if family.is_gemma else width) ** -0.5,
        embedding_scale=hidden**0.5 if family.is_gemma else 1.0,
        norm_offset=1.0 if family.is_gemma else 0.0,
        normalizes_heads=family.normalizes_heads,
        normalizes_outputs=family.is_gemma,
    )


def _plain_rotary(theta: float, width: int) -> Rotary:
    import torch

    steps = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    return Rotary(tuple((1.0 / (float(theta) ** steps)).tolist()))


def read_special_ids(directory: Path) -> tuple[frozenset[int], int]:
    """Tokens that end an answer, and the padding token, as a model folder's files say."""
    return special_ids(*(_read_json(directory / name) for name in ("generation_config.json", "config.json")))


def special_ids(generation: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[frozenset[int], int]:
    """The same of a model's two configurations."""
    ends = [one.get("eos_token_id") for one in (generation, config)]
    eos = {end for value in ends for end in (value if isinstance(value, (list, tuple)) else [value]) if end is not None}
    pad = config.get("pad_token_id")
    return frozenset(eos), int(pad if pad is not None else min(eos, default=0))


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
    """One layer's products and norms; `head_norm` [H + K, D], and the norms of what is added, where it has them."""

    qkv: _Product
    out: _Product
    gate_up: _Product
    down: _Product
    attention_norm: Any
    mlp_norm: Any
    head_norm: Any = None
    attention_output_norm: Any = None
    mlp_output_norm: Any = None


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
        self._norm = tensors["model.norm.weight"] + shape.norm_offset

        def product(prefix: str, names: Sequence[str]) -> _Product:
            places = [f"{prefix}.{name}_proj" for name in names]
            biases = [tensors.get(f"{place}.bias") for place in places]
            return _Product([tensors[f"{place}.weight"] for place in places], biases, packs=packs)

        def norm(place: str) -> Any:
            return tensors[f"{place}.weight"] + shape.norm_offset

        self._layers = []
        for index in range(shape.num_hidden_layers):
            place = f"model.layers.{index}"
            attention, mlp = f"{place}.self_attn", f"{place}.mlp"
            more: dict[str, Any] = {}
            before_mlp = f"{place}.post_attention_layernorm"
            if shape.normalizes_heads:
                of_heads = [norm(f"{attention}.q_norm")] * shape.num_attention_heads
                of_heads += [norm(f"{attention}.k_norm")] * shape.num_key_value_heads
                more["head_norm"] = torch.stack(of_heads)
            if shape.normalizes_outputs:
                more["attention_output_norm"] = norm(before_mlp)
                more["mlp_output_norm"] = norm(f"{place}.post_feedforward_layernorm")
                before_mlp = f"{place}.pre_feedforward_layernorm"
            self._layers.append(
                _Layer(
                    product(attention, _FUSED["qkv"]),
                    product(attention, _FUSED["out"]),
                    product(mlp, _FUSED["gate_up"]),
                    product(mlp, _FUSED["down"]),
                    norm(f"{place}.input_layernorm"),
                    norm(before_mlp),
                    **more,
                )
            )
        self._rotaries = list(dict.fromkeys(layer.rotary for layer in shape.layers))
        self._rotary_of = [self._rotaries.index(layer.rotary) for layer in shape.layers]
        self._frequencies = [torch.tensor(rotary.frequencies) for rotary in self._rotaries]

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
        turns = [
            _turns(positions[..., None, None] * frequencies, rotary.factor)
            for rotary, frequencies in zip(self._rotaries, self._frequencies, strict=True)
        ]
        hidden = torch.nn.functional.embedding(ids.reshape(-1), self._embedding)
        if shape.embedding_scale != 1.0:
            hidden = hidden * shape.embedding_scale
        for index, layer in enumerate(self._layers):

            def run(name: str, x: Any, residual: Any = None, *, layer: _Layer = layer, index: int = index) -> Any:
                y = getattr(layer, name)(x, residual)
                for updates, start, stop in tokens:
                    if (index, name) in updates:
                        inner, outer = updates[index, name]
                        y[start:stop].addmm_(x[start:stop] @ inner, outer)
                return y

            def added(name: str, x: Any, residual: Any, norm: Any, *, run: Callable[..., Any] = run) -> Any:
                return run(name, x, residual) if norm is None else self._normed(run(name, x), norm).add_(residual)

            states = run("qkv", self._normed(hidden, layer.attention_norm)).view(n_rows, n_new, -1, shape.head_dim)
            turned = states[:, :, :n_rotated]
            if layer.head_norm is not None:
                turned = self._normed(turned, layer.head_norm)
            rotated = _rotate(turned, *turns[self._rotary_of[index]]).transpose(1, 2)
            keys, values = cascade.layers[index].update(
                rotated[:, shape.num_attention_heads :], states[:, :, n_rotated:].transpose(1, 2)
            )
            attended = cascade_attention(
                rotated[:, : shape.num_attention_heads],
                keys,
                values,
                bias=bias,
                scale=shape.scale,
                prefixes=cascade.prefixes(index),
            )
            hidden = added("out", attended.reshape(n_rows * n_new, -1), hidden, layer.attention_output_norm)
            gate, up = run("gate_up", self._normed(hidden, layer.mlp_norm)).chunk(2, dim=-1)
            hidden = added("down", self._activated(gate).mul_(up), hidden, layer.mlp_output_norm)
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

    def _activated(self, x: Any) -> Any:
        import torch

        if self.shape.activation == "silu":
            return torch.nn.functional.silu(x)
        return torch.nn.functional.gelu(x, approximate="tanh")

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


def _turns(angles: Any, factor: float) -> tuple[Any, Any]:
    """Cosine and sine of rotary positions."""
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


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
