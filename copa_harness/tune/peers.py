"""Processes that share one training: which rows are whose, and sums over all of them.

Every process holds the whole model and the same LoRA weights. Of a batch each takes the rows whose turn it is, and the
gradients of the summed loss, divided by the answer tokens of the *whole* batch, are added up:

    gradient = sum over processes p of  d/dw [ sum over the rows of p of their loss ] / answer tokens in the batch

which is the gradient one process computes, up to the order of the additions. The sum is the same bits everywhere, so
clipping, steps and stops are too, and weights are never sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from copa_harness.tune.rows import EncodedRow


class PeerLost(Exception):
    """A sum over all processes did not come about: another one is gone, or too late."""


class Peers(Protocol):
    """The processes of a training, seen from one of them."""

    index: int
    """This one's place, from 0."""
    n: int
    """How many there are."""

    def add_up(self, tensor: Any) -> None:
        """Replace `tensor`, of the same shape in every process, by its sum over all of them.

        Raises:
            PeerLost: another process is gone.
        """

    def add_up_number(self, value: float) -> float:
        """The sum of every process's `value`, in float64.

        Raises:
            PeerLost: another process is gone.
        """


class AcceleratePeers:
    """Peers by accelerate's process state: gloo on CPUs, NCCL on NVIDIA GPUs.

    Args:
        state: an `accelerate.PartialState` of at least one process.
    """

    def __init__(self, state: Any) -> None:
        self.index, self.n, self._device = int(state.process_index), int(state.num_processes), state.device

    def add_up(self, tensor: Any) -> None:
        """See `Peers`."""
        import torch

        try:
            torch.distributed.all_reduce(tensor)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise PeerLost(str(error)) from error

    def add_up_number(self, value: float) -> float:
        """See `Peers`."""
        import torch

        tensor = torch.tensor([value], dtype=torch.float64, device=self._device)
        self.add_up(tensor)
        return float(tensor)


def share_of(rows: Sequence[EncodedRow], peers: Peers | None) -> Sequence[EncodedRow]:
    """The rows this process computes, short and long ones as evenly as may be; all of them without peers."""
    if peers is None:
        return rows
    return sorted(rows, key=lambda row: len(row.ids))[peers.index :: peers.n]


def add_up_gradients(peers: Peers, parameters: Sequence[Any], loss: float) -> float:
    """Add every parameter's gradient up over all processes, and `loss`, whose sum is returned.

    Processes without a row in this batch count as zeros; a parameter without a gradient in every process keeps none,
    so that the optimizer passes it over as it does in one process.
    """
    import torch

    parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    told = torch.tensor([loss, *(float(each.grad is not None) for each in parameters)], device=parts[0].device)
    whole = torch.cat([told, *(part.reshape(-1) for part in parts)])
    peers.add_up(whole)
    sums = whole[len(told) :].split([part.numel() for part in parts])
    known = whole[: len(told)].tolist()
    for parameter, part, total, n_with in zip(parameters, parts, sums, known[1:], strict=True):
        parameter.grad = part.copy_(total.view_as(part)) if n_with else None
    return float(known[0])
