"""The training-time network: the maths of ``LlamaForCausalLM`` with fewer operations and with taps for supervision.

Symbols: B rows, T tokens, L layers, d width, H heads, h = d / H, f feed-forward width, V vocabulary, N number tokens.
The embedding table is E = E0 + scatter(features @ P): rows of number tokens are a learned function of the printed value
plus a residual. ``to_hf`` materialises everything into a plain ``LlamaForCausalLM``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from copa_harness.lm.embedded.pretrain.recipe import Recipe

NORM_EPSILON = 1e-5
MAX_POSITIONS = 2048
ROPE_THETA = 1_000_000.0

_HF_NAMES = {
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "attention_norm": "input_layernorm",
    "feed_norm": "post_attention_layernorm",
}


class TrainingNetwork(nn.Module):
    """A Llama decoder whose projections of one input are computed together.

    Args:
        recipe: Its sizes.
        n_tokens: V.
        number_ids: (N,) ids of the number tokens.
        number_features: (N, n_features) their fixed features.
        generator: Source of the initial weights.
    """

    number_ids: Tensor
    number_features: Tensor

    def __init__(
        self,
        recipe: Recipe,
        *,
        n_tokens: int,
        number_ids: npt.NDArray[Any],
        number_features: npt.NDArray[Any],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        d, f, n_layers = recipe.width, recipe.feed_forward, recipe.n_layers

        def normal(*size: int, std: float) -> Tensor:
            return torch.randn(*size, generator=generator) * std

        self.register_buffer("number_ids", torch.as_tensor(number_ids), persistent=False)
        self.register_buffer("number_features", torch.as_tensor(number_features), persistent=False)
        n_number_features = number_features.shape[1]
        embedding = normal(n_tokens, d, std=0.1)
        embedding[self.number_ids] *= 0.15
        self.embedding = nn.Parameter(embedding)
        self.number_projection = nn.Parameter(normal(n_number_features, d, std=0.1 / math.sqrt(n_number_features / 3)))
        self.layers = nn.ModuleList()
        for layer in range(n_layers):
            q, k, v, o = (normal(d, d, std=1 / math.sqrt(d)) for _ in range(4))
            o = o / math.sqrt(2 * n_layers)
            if layer > 0:
                # keys that resemble queries and outputs that resemble values: matching and copying are nearly there
                k = 0.8 * q + 0.6 * k
                gain = 0.5 if layer < n_layers // 2 else 2.0
                o = gain * 0.8 * v.T / math.sqrt(2 * n_layers) + 0.3 * o
            gate, up = normal(2, f, d, std=1 / math.sqrt(d)).unbind()
            down = normal(d, f, std=0.3 / math.sqrt(f) / math.sqrt(2 * n_layers))
            attended, fed = torch.ones(d), torch.ones(d)
            named = zip(_HF_NAMES, (q, k, v, o, gate, up, down, attended, fed), strict=True)
            self.layers.append(nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in named}))
        self.final_norm = nn.Parameter(torch.ones(d))

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weight matrices inside the layers, (d_out, d_in)."""
        return [parameter for parameter in self.layers.parameters() if parameter.ndim == 2]

    def other_parameters(self) -> list[nn.Parameter]:
        """Embedding, number projection and norms."""
        norms = [parameter for parameter in self.layers.parameters() if parameter.ndim == 1]
        return [self.embedding, self.number_projection, *norms, self.final_norm]

    def table(self) -> Tensor:
        """E, (V, d)."""
        rows = (self.number_features @ self.number_projection).float()
        return self.embedding.index_add(0, self.number_ids, rows)

    def rotary_tables(self) -> tuple[Tensor, Tensor]:
        """Cos and signed sin for every position, each (MAX_POSITIONS, h)."""
        h = self.recipe.width // self.recipe.n_heads
        frequency = 1.0 / ROPE_THETA ** (torch.arange(0, h, 2).float() / h)
        angle = torch.arange(MAX_POSITIONS).float()[:, None] * frequency
        return torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)

    def forward(
        self, table: Tensor, tokens: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Final hidden states (B, T, d) and every layer's input, queries and keys.

        Args:
            table: E from ``table()``.
            tokens: (B, T).
            cos: (B, T, 1, h) rotary cosines at the tokens' positions.
            sin: (B, T, 1, h) rotary sines, the first half negated.
        """
        b, t = tokens.shape
        d, n_heads = self.recipe.width, self.recipe.n_heads
        h = d // n_heads
        x = F.embedding(tokens, table)
        taps: list[tuple[Tensor, Tensor, Tensor]] = []
        for layer in self.layers:
            y = F.rms_norm(x, (d,), layer["attention_norm"], NORM_EPSILON)
            z = F.linear(y, torch.cat([layer["q"], layer["k"], layer["v"]])).view(b, t, 3, n_heads, h)
            qk = z[:, :, :2].reshape(b, t, 2 * n_heads, h)
            qk = qk * cos + torch.cat([qk[..., h // 2 :], qk[..., : h // 2]], -1) * sin
            q, k = qk[:, :, :n_heads].transpose(1, 2), qk[:, :, n_heads:].transpose(1, 2)
            v = z[:, :, 2].transpose(1, 2)
            taps.append((x, q, k))
            a = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
            x = x + F.linear(a.transpose(1, 2).reshape(b, t, d), layer["o"])
            y = F.rms_norm(x, (d,), layer["feed_norm"], NORM_EPSILON)
            gate, up = F.linear(y, torch.cat([layer["gate"], layer["up"]])).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        return F.rms_norm(x, (d,), self.final_norm, NORM_EPSILON), taps

    def to_hf(self, *, pad_id: int, end_id: int) -> LlamaForCausalLM:
        """A plain Hugging Face model with the same weights, in evaluation mode."""
        recipe = self.recipe
        config = LlamaConfig(
            vocab_size=len(self.embedding),
            hidden_size=recipe.width,
            intermediate_size=recipe.feed_forward,
            num_hidden_layers=recipe.n_layers,
            num_attention_heads=recipe.n_heads,
            num_key_value_heads=recipe.n_heads,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            rms_norm_eps=NORM_EPSILON,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            pad_token_id=pad_id,
            bos_token_id=None,
            eos_token_id=end_id,
        )
        model = LlamaForCausalLM(config)
        state = self._hf_state() | {"model.embed_tokens.weight": self.table(), "lm_head.weight": self.table()}
        model.load_state_dict({name: value.detach().float().clone() for name, value in state.items()})
        return model.eval()

    @torch.no_grad()
    def from_hf(self, state: Mapping[str, Tensor]) -> None:
        """Take over the layers and the last norm of an exported model."""
        for name, parameter in self._hf_state().items():
            parameter.copy_(state[name])

    def _hf_state(self) -> dict[str, Tensor]:
        """The parameters but for the embeddings by their Hugging Face names."""
        inside = {
            f"model.layers.{index}.{name}.weight": layer[ours]
            for index, layer in enumerate(self.layers)
            for ours, name in _HF_NAMES.items()
        }
        return inside | {"model.norm.weight": self.final_norm}
