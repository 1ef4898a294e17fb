"""Keeps the chatter of DSPy's optimizers (prints, progress bars, loggers) out of the user's log.

What they print goes to the `copa_harness` logger at level DEBUG, where it can be had. Knows nothing of optimizers.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator

logger = logging.getLogger("copa_harness")

NOISY = ("dspy", "optuna", "gepa")
"""Loggers silenced meanwhile; their records go to our logger at DEBUG."""

_CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\r")


class _Lines(io.TextIOBase):
    """A text stream whose complete lines become DEBUG records."""

    def __init__(self, source: str) -> None:
        self._source, self._rest = source, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text.replace("\r", "\n")).split("\n")
        for line in lines:
            clean = _CONTROL.sub("", line).strip()
            if clean:
                logger.debug("%s: %s", self._source, clean)
        return len(text)


class _Forward(logging.Handler):
    """Hands records on to our logger at DEBUG."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.debug("%s: %s", record.name, _CONTROL.sub("", record.getMessage()))


@contextlib.contextmanager
def quiet(source: str) -> Iterator[None]:
    """Within the block, what is printed or logged by others goes to our logger at DEBUG.

    Args:
        source: Name put before every line.
    """
    kept = []
    forward = _Forward()
    for name in NOISY:
        noisy = logging.getLogger(name)
        kept.append((noisy, list(noisy.handlers), noisy.propagate))
        noisy.handlers, noisy.propagate = [forward], False
    try:
        with (
            contextlib.redirect_stdout(_Lines(source)),
            contextlib.redirect_stderr(_Lines(source)),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for noisy, handlers, propagate in kept:
            noisy.handlers, noisy.propagate = handlers, propagate
