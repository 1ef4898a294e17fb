"""Muon for the matrices inside the layers: momentum, then the nearest orthogonal matrix by five Newton-Schulz
steps.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers", 2024. Matrices of one size are orthogonalised
together, which is what makes it cheap on a CPU. This module knows nothing of the network.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon:
    """Muon over parameters that are matrices or stacks of matrices.

    Args:
        parameters: Tensors of shape (out, in) or (n, out, in).
        momentum: Decay of the gradient average; Nesterov's form is used.
        weight_decay: Decoupled, per unit of learning rate.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], *, weight_decay: float, momentum: float = 0.95) -> None:
        self._parameters = parameters
        self._momentum, self._weight_decay = momentum, weight_decay
        self.buffers = [torch.zeros_like(parameter) for parameter in parameters]
        self._groups: dict[tuple[int, int], list[int]] = {}
        for i, parameter in enumerate(parameters):
            rows, columns = parameter.shape[-2:]
            self._groups.setdefault((min(rows, columns), max(rows, columns)), []).append(i)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update from the gradients in place."""
        for indices in self._groups.values():
            updates: list[Tensor] = []
            for i in indices:
                gradient = self._parameters[i].grad
                assert gradient is not None
                self.buffers[i].lerp_(gradient, 1 - self._momentum)
                update = gradient.lerp(self.buffers[i], self._momentum)
                update = update.view(-1, *update.shape[-2:])
                updates.append(update.mT if update.shape[-2] > update.shape[-1] else update)
            orthogonal = _orthogonalised(torch.cat(updates))
            start = 0
            for i in indices:
                parameter = self._parameters[i]
                n = parameter.numel() // (parameter.shape[-1] * parameter.shape[-2])
                update = orthogonal[start : start + n]
                start += n
                rows, columns = parameter.shape[-2:]
                update = (update.mT if rows > columns else update).reshape(parameter.shape)
                parameter.mul_(1 - learning_rate * self._weight_decay)
                parameter.add_(update, alpha=-learning_rate * max(1.0, rows / columns) ** 0.5)


def _orthogonalised(x: Tensor) -> Tensor:
    """Stack of (rows <= columns) matrices with all singular values drawn towards 1, in bfloat16 inside."""
    a, b, c = _COEFFICIENTS
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-9)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()
