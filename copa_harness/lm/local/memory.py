"""How much memory a batch needs and how much there is, so that a batch too large is split before it is tried.

Needs are upper estimates from a model's configuration: key-value states of prompt and answer, and the widest layer's
intermediate values while the prompts are read. Also which exceptions say that memory did not suffice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH_LIMIT_BYTES = 2 << 30
"""A batch of several requests stays below this even where there is more: larger ones are no faster."""

FREE_SHARE = 0.8
"""Share of the free memory that one batch may take."""

_OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "alloc_failed",
)
"""What torch says on CPUs (Linux, Windows), CUDA with its libraries, and MPS."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes per token of one row.

    Attributes:
        states: keys and values of all layers, for every token of prompt and answer.
        reading: intermediate values of one layer, for every token that is read at once.
    """

    states: int
    reading: int

    @classmethod
    def of(cls, config: Any, *, item_bytes: int) -> Footprint:
        """From the text configuration of a model and the bytes of one number."""
        n_heads = int(getattr(config, "num_attention_heads", None) or 1)
        n_kv_heads = int(getattr(config, "num_key_value_heads", None) or n_heads)
        hidden = int(config.hidden_size)
        width = int(getattr(config, "head_dim", None) or hidden // n_heads)
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
        return cls(
            states=2 * int(config.num_hidden_layers) * n_kv_heads * width * item_bytes,
            reading=(6 * hidden + 3 * int(inner) + 4 * n_heads * width) * item_bytes,
        )

    def batch_bytes(self, *, n_rows: int, n_shared: int, n_own: int, n_new: int) -> int:
        """Bytes a batch needs at its peak.

        Args:
            n_rows: requests in it.
            n_shared: tokens kept once for all of them.
            n_own: tokens of each row's prompt beyond those, padding included.
            n_new: tokens each row may generate.
        """
        kept = (n_shared + n_rows * (n_own + n_new)) * self.states
        mask = 6 * n_own * (n_own + n_new)
        return kept + n_rows * (n_own * self.reading + mask) + n_shared * self.reading


def free_bytes(device: Any) -> int | None:
    """Memory that is free on a torch device now; None when the system does not say."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    limits = [limit for limit in (_system_free(), _container_free()) if limit is not None]
    return min(limits, default=None)


def _system_free() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass  # not Linux: the caller tries without knowing
    return None


def _container_free() -> int | None:
    """What the process's control group still allows (cgroup v2)."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = (folder / "memory.current").read_text(encoding="ascii").strip()
        return None if limit == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch, numpy or Python says that memory did not suffice, on whatever device."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):  # torch's own class is one; most devices only have words for it
        return False
    said = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or any(words in said for words in _OUT_OF_MEMORY)


def oom_message(error: BaseException) -> str:
    """The first line of what an exception says: torch adds C++ stacks and advice on its own settings."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
