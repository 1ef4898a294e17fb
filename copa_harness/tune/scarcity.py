"""A training that memory does not hold: one error that says where, how much at once, and what takes less.

Knows nothing of how training works.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from copa_harness.errors import TrainingMemoryError
from copa_harness.lm.local_memory import is_out_of_memory, last_words
from copa_harness.tune.encoding import EncodedRow
from copa_harness.tune.progress import Progress
from copa_harness.tune.settings import LoraSettings

LESS_MEMORY = "a smaller micro_batch_size, a smaller max_length (longer rows are left out), or fewer demonstrations"
"""What makes a training take less."""


@contextmanager
def memory_named(
    recipe: str, *, device: Any, rows: Sequence[EncodedRow], settings: LoraSettings, progress: Progress
) -> Iterator[None]:
    """Turns whatever torch, numpy or Python say when memory runs out into one error.

    Args:
        recipe: the training's content address.
        device: it runs on.
        rows: it trains on.
        settings: of it.
        progress: of it.

    Raises:
        TrainingMemoryError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        n_rows = settings.micro_batch_size or settings.batch_size
        raise TrainingMemoryError(
            f"memory on {device} does not suffice for the LoRA training {recipe}: step {progress.n_done + 1}, up to "
            f"{n_rows} rows at once of up to {max(len(row.ids) for row in rows)} tokens ({last_words(error)}); what "
            f"was trained up to the last epoch is kept for these settings; remedy: {LESS_MEMORY}, "
            "lora={'precision': 'bfloat16'}, another --copa-device, or less else in that memory"
        ) from error
