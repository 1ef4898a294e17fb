"""LoRA layers with fewer passes over memory than peft's.

peft computes W x + (B (A x)) * s as written, each term a tensor of its own; on small models those passes take as long
as the products. Here, for z = A x (r numbers per token),

    forward     y = W x;  y += s B z                      (added by the product that makes it)
    backward    g = s B' dy;  dx = W' dy;  dx += A' g;  dA = g x';  dB = s dy z'

The same arithmetic to rounding. Only the forward of one training's own module tree is replaced; weights, names and
files stay peft's.
"""

from __future__ import annotations

import functools
from typing import Any


def speed_up(model: Any) -> int:
    """Let every plain float32 LoRA layer of `model` compute as above; returns how many there were."""
    import peft
    import torch

    n_layers = 0
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear) and _is_plain(module, torch):
            module.forward = functools.partial(_forward, module)
            n_layers += 1
    return n_layers


def _is_plain(layer: Any, torch: Any) -> bool:
    """One adapter without dropout or variants on an ordinary linear layer, all in float32."""
    base = layer.base_layer
    return (
        type(base) is torch.nn.Linear
        and list(layer.lora_A) == ["default"]
        and isinstance(layer.lora_dropout["default"], torch.nn.Identity)
        and not layer.lora_variant
        and not layer.fan_in_fan_out
        and layer.lora_B["default"].bias is None
        and base.weight.dtype == layer.lora_A["default"].weight.dtype == torch.float32
    )


def _forward(layer: Any, x: Any) -> Any:
    base = layer.base_layer
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    flat = x.reshape(-1, x.shape[-1])
    y = _function().apply(flat, base.weight, base.bias, first, second, layer.scaling["default"])
    return y.view(*x.shape[:-1], y.shape[-1])


@functools.cache
def _function() -> Any:
    """The autograd function; made at the first use, since torch is not imported with this module."""
    import torch

    class LowRankLinear(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Any, weight: Any, bias: Any, first: Any, second: Any, scale: float) -> Any:
            inner = x @ first.T
            y = torch.nn.functional.linear(x, weight, bias)
            y.addmm_(inner, second.T, alpha=scale)
            context.save_for_backward(x, inner, weight, first, second)
            context.scale = scale
            return y

        @staticmethod
        def backward(context: Any, dy: Any) -> Any:
            x, inner, weight, first, second = context.saved_tensors
            d_inner = dy @ (second * context.scale)
            dx = None
            if context.needs_input_grad[0]:
                dx = dy @ weight
                dx.addmm_(d_inner, first)
            return dx, None, None, d_inner.T @ x, (dy.T @ inner).mul_(context.scale), None

    return LowRankLinear
