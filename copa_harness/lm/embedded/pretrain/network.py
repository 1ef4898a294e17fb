"""The training-time network: the maths of ``LlamaForCausalLM`` with fewer operations and with taps for supervision.

Symbols: B rows, T tokens, L layers, d width, H heads, h = d / H, f feed-forward width, V vocabulary, N number tokens.
The embedding table is E = E0 + scatter(features @ P): rows of number tokens are a learned function of the printed value
plus a residual. ``to_hf`` materialises everything into a plain ``LlamaForCausalLM``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

NORM_EPSILON = 1e-5
MAX_POSITIONS = 2048


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """Sizes of the network."""

    vocabulary: int
    width: int = 128
    n_layers: int = 6
    n_heads: int = 4
    feed_forward: int = 320
    rope_theta: float = 1_000_000.0


class TrainingNetwork(nn.Module):
    """A Llama decoder with stacked projections.

    Args:
        shape: Sizes.
        number_ids: (N,) ids of the number tokens.
        number_features: (N, n_features) their fixed features.
        tapped_layers: Layers whose input, queries and keys ``forward`` returns.
        generator: Source of the initial weights.
    """

    number_ids: Tensor
    number_features: Tensor

    def __init__(
        self,
        shape: NetworkShape,
        *,
        number_ids: npt.NDArray[Any],
        number_features: npt.NDArray[Any],
        tapped_layers: tuple[int, ...],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.shape, self.tapped_layers = shape, tapped_layers
        d, f, n_layers = shape.width, shape.feed_forward, shape.n_layers

        def normal(*size: int, std: float) -> Tensor:
            return torch.randn(*size, generator=generator) * std

        self.register_buffer("number_ids", torch.as_tensor(number_ids), persistent=False)
        self.register_buffer("number_features", torch.as_tensor(number_features), persistent=False)
        n_number_features = number_features.shape[1]
        embedding = normal(shape.vocabulary, d, std=0.1)
        embedding[self.number_ids] *= 0.15
        self.embedding = nn.Parameter(embedding)
        self.number_projection = nn.Parameter(normal(n_number_features, d, std=0.1 / math.sqrt(n_number_features / 3)))
        self.attention_in, self.attention_out = nn.ParameterList(), nn.ParameterList()
        self.feed_in, self.feed_out = nn.ParameterList(), nn.ParameterList()
        self.attention_norm, self.feed_norm = nn.ParameterList(), nn.ParameterList()
        for layer in range(n_layers):
            q, k, v, o = (normal(d, d, std=1 / math.sqrt(d)) for _ in range(4))
            o = o / math.sqrt(2 * n_layers)
            if layer > 0:
                # keys that resemble queries and outputs that resemble values: matching and copying are nearly there
                k = 0.8 * q + 0.6 * k
                gain = 0.5 if layer < n_layers // 2 else 2.0
                o = gain * 0.8 * v.T / math.sqrt(2 * n_layers) + 0.3 * o
            self.attention_in.append(nn.Parameter(torch.stack([q, k, v])))
            self.attention_out.append(nn.Parameter(o))
            self.feed_in.append(nn.Parameter(normal(2, f, d, std=1 / math.sqrt(d))))
            self.feed_out.append(nn.Parameter(normal(d, f, std=0.3 / math.sqrt(f) / math.sqrt(2 * n_layers))))
            self.attention_norm.append(nn.Parameter(torch.ones(d)))
            self.feed_norm.append(nn.Parameter(torch.ones(d)))
        self.final_norm = nn.Parameter(torch.ones(d))

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weight matrices inside the layers, (d_out, d_in) or stacks of them."""
        return [*self.attention_in, *self.attention_out, *self.feed_in, *self.feed_out]

    def other_parameters(self) -> list[nn.Parameter]:
        """Embedding, number projection and norms."""
        return [self.embedding, self.number_projection, *self.attention_norm, *self.feed_norm, self.final_norm]

    def table(self) -> Tensor:
        """E, (V, d)."""
        rows = (self.number_features @ self.number_projection).float()
        return self.embedding.index_add(0, self.number_ids, rows)

    def rotary_tables(self) -> tuple[Tensor, Tensor]:
        """Cos and signed sin for every position, each (MAX_POSITIONS, h)."""
        h = self.shape.width // self.shape.n_heads
        frequency = 1.0 / self.shape.rope_theta ** (torch.arange(0, h, 2).float() / h)
        angle = torch.arange(MAX_POSITIONS).float()[:, None] * frequency
        return torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)

    def forward(self, table: Tensor, tokens: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Final hidden states (B, T, d) and, per tapped layer, its input, queries and keys.

        Args:
            table: E from ``table()``.
            tokens: (B, T).
            cos: (B, T, 1, h) rotary cosines at the tokens' positions.
            sin: (B, T, 1, h) rotary sines, the first half negated.
        """
        b, t = tokens.shape
        d, n_heads = self.shape.width, self.shape.n_heads
        h = d // n_heads
        x = F.embedding(tokens, table)
        taps: list[Tensor] = []
        for layer in range(self.shape.n_layers):
            y = F.rms_norm(x, (d,), self.attention_norm[layer], NORM_EPSILON)
            z = F.linear(y, self.attention_in[layer].view(3 * d, d)).view(b, t, 3, n_heads, h)
            qk = z[:, :, :2].reshape(b, t, 2 * n_heads, h)
            qk = qk * cos + torch.cat([qk[..., h // 2 :], qk[..., : h // 2]], -1) * sin
            q, k = qk[:, :, :n_heads].transpose(1, 2), qk[:, :, n_heads:].transpose(1, 2)
            v = z[:, :, 2].transpose(1, 2)
            if layer in self.tapped_layers:
                taps += [x, q, k]
            a = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
            x = x + F.linear(a.transpose(1, 2).reshape(b, t, d), self.attention_out[layer])
            y = F.rms_norm(x, (d,), self.feed_norm[layer], NORM_EPSILON)
            gate, up = F.linear(y, self.feed_in[layer].view(-1, d)).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, self.feed_out[layer])
        return F.rms_norm(x, (d,), self.final_norm, NORM_EPSILON), taps

    def to_hf(self, *, pad_id: int, end_id: int) -> LlamaForCausalLM:
        """A plain Hugging Face model with the same weights, in evaluation mode."""
        shape, d = self.shape, self.shape.width
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=d,
            intermediate_size=shape.feed_forward,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_heads,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            rms_norm_eps=NORM_EPSILON,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            pad_token_id=pad_id,
            bos_token_id=None,
            eos_token_id=end_id,
        )
        model = LlamaForCausalLM(config)
        table = self.table()
        state: dict[str, Tensor] = {
            "model.embed_tokens.weight": table,
            "lm_head.weight": table,
            "model.norm.weight": self.final_norm,
        }
        for layer in range(shape.n_layers):
            prefix = f"model.layers.{layer}."
            for i, name in enumerate("qkv"):
                state[f"{prefix}self_attn.{name}_proj.weight"] = self.attention_in[layer][i]
            state[f"{prefix}self_attn.o_proj.weight"] = self.attention_out[layer]
            state[f"{prefix}mlp.gate_proj.weight"] = self.feed_in[layer][0]
            state[f"{prefix}mlp.up_proj.weight"] = self.feed_in[layer][1]
            state[f"{prefix}mlp.down_proj.weight"] = self.feed_out[layer]
            state[f"{prefix}input_layernorm.weight"] = self.attention_norm[layer]
            state[f"{prefix}post_attention_layernorm.weight"] = self.feed_norm[layer]
        model.load_state_dict({name: value.detach().float().clone() for name, value in state.items()})
        return model.eval()
