"""How far a training is: a bar on a terminal, elsewhere a log line now and then, with the time still to go.

Log lines are plain text without control characters, since they end up in files.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from copa_harness.formatting import duration

logger = logging.getLogger(__name__)

LOG_EVERY_S = 10.0

_listener: ContextVar[Callable[[str], None] | None] = ContextVar("copa_training_progress", default=None)


@contextmanager
def report_progress_to(listener: Callable[[str], None]) -> Iterator[None]:
    """Call `listener` as trainings of this thread begin and after each step: `LoRA step 3 of 16, 20 s to go`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Progress:
    """Reports optimizer steps.

    Args:
        n_total: steps of the whole training.
        n_done: steps done before (of a training taken up again).
    """

    def __init__(self, n_total: int, *, n_done: int = 0) -> None:
        self._n_total, self._n_before, self._n = n_total, n_done, n_done
        self._bar: Any = None
        self._began_s = self._logged_s = time.monotonic()

    @property
    def n_done(self) -> int:
        """Steps done, those before included."""
        return self._n

    def __enter__(self) -> Progress:
        self._began_s = self._logged_s = time.monotonic()
        if (listener := _listener.get()) is not None:
            listener(f"LoRA step {self._n:,} of {self._n_total:,}")
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._n_total, initial=self._n, desc="LoRA", unit="step", leave=False)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, epoch: int, loss: float) -> None:
        """One optimizer step is done; `loss` is its batch's, in nats per answer token."""
        self._n += 1
        now_s = time.monotonic()
        if (listener := _listener.get()) is not None:
            listener(f"LoRA step {self._n:,} of {self._n_total:,}, {duration(self._remaining_s(now_s))} to go")
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix_str(f"epoch {epoch}, loss {loss:.3f}")
        elif now_s - self._logged_s > LOG_EVERY_S:
            self._logged_s = now_s
            logger.info(
                "LoRA step %d of %d, epoch %d, loss %.3f, %s to go",
                self._n,
                self._n_total,
                epoch,
                loss,
                duration(self._remaining_s(now_s)),
            )

    def _remaining_s(self, now_s: float) -> float:
        return (now_s - self._began_s) / (self._n - self._n_before) * (self._n_total - self._n)
