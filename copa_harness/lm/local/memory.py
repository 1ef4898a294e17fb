"""How much memory a batch needs and how much there is, so that a batch too large is split before it is tried.

Needs are upper estimates from a model's configuration: key-value states of prompt and answer, the widest layer's
intermediate values while tokens are read, and logits. How many tokens go through the model at once follows from the
same numbers and from the memory that is free. Also which exceptions say that memory did not suffice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH_LIMIT_BYTES = 2 << 30
"""A batch of several requests stays below this even where there is more: larger ones are no faster."""

FREE_SHARE = 0.8
"""Share of the free memory that one batch may take."""

AT_ONCE_BYTES = 256 << 20
"""Intermediate values, or logits, of the tokens that go through a model at once: with more it is no faster."""

AT_ONCE_SHARE = 0.25
"""Most of the free memory that those may take."""

LEAST_READ, MOST_READ = 256, 8192
"""Tokens at once with which even a small product is fast, and with which none gains any more."""

_OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "alloc_failed",
)
"""What torch says on CPUs (Linux, Windows), CUDA with its libraries, and MPS."""


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """Most tokens, padding included, that go through a model at once, unless a single row has more.

    Attributes:
        read: where only a row's last token has logits.
        scored: where every token has.
    """

    read: int = LEAST_READ
    scored: int = LEAST_READ


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes per token of one row.

    Attributes:
        states: keys and values of all layers, for every token of prompt and answer.
        reading: intermediate values of one layer, for every token that is read at once.
        mask: for every pair of a token that is read and one it may look at.
        scores: logits and what is made of them, for every token that has any.
    """

    states: int
    reading: int
    mask: int
    scores: int

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
            mask=(n_heads // n_kv_heads + 1) * item_bytes + 1,
            scores=4 * int(config.vocab_size) * item_bytes,
        )

    def limits(self, free: int | None) -> TokenLimits:
        """How many tokens go through the model at once with so many bytes free (None: unknown)."""
        at_once = AT_ONCE_BYTES if free is None else min(AT_ONCE_BYTES, AT_ONCE_SHARE * free)
        read = min(MOST_READ, max(LEAST_READ, int(at_once // self.reading)))
        return TokenLimits(read, max(1, min(read, int(at_once // self.scores))))

    def batch_bytes(self, *, n_rows: int, n_shared: int, n_own: int, n_new: int, limits: TokenLimits | None) -> int:
        """Bytes a batch needs at its peak.

        Args:
            n_rows: requests in it.
            n_shared: tokens kept once for all of them.
            n_own: tokens of each row's prompt beyond those, padding included.
            n_new: tokens each row may generate.
            limits: of what goes through the model at once; None where all of it does.
        """
        n_together = n_rows if limits is None else min(n_rows, max(1, limits.read // max(1, n_own)))
        kept = (n_shared + n_rows * (n_own + n_new)) * self.states
        read = max(n_shared, n_together * n_own) * self.reading
        return kept + read + n_together * n_own * (n_own + n_new) * self.mask + n_rows * self.scores

    def scoring_bytes(self, *, limits: TokenLimits, n_longest: int, n_branches: int = 0) -> int:
        """Bytes that scoring continuations of up to `n_longest` tokens needs beyond their prompts.

        Args:
            limits: of what goes through the model at once.
            n_longest: tokens of the longest.
            n_branches: continuations that are read token by token together.
        """
        at_once = max(limits.scored, n_longest) * (self.states + self.reading + self.scores)
        return at_once + n_branches * n_longest * self.states


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
