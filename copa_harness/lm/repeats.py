"""Repeats of a whole run: the same program on the same examples several times, each time with answers of its own.

    for index in range(5):
        with repeated(index):
            evaluate(program, examples, ...)

Every call inside is stored and sampled under its repeat, so repeats are independent, and each is cached: running the
five again asks nothing. Repeat 0 is the plain run and shares its answers. Knows nothing of programs or metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from copa_harness.errors import ConfigurationError

SETTING = "copa_repeat"
"""Name under which the index stands in DSPy's settings, which DSPy carries into its worker threads."""


@contextmanager
def repeated(index: int) -> Iterator[None]:
    """Make every call inside the block, in whatever thread DSPy runs it, belong to repeat `index`.

    Args:
        index: From 0; 0 is the plain run.

    Raises:
        ConfigurationError: Not a whole number of at least 0.
    """
    import dspy

    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ConfigurationError(f"got the repeat {index!r}, expected a whole number from 0 up")
    with dspy.context(**{SETTING: index}):
        yield


def current_repeat() -> int:
    """The repeat calls belong to here and now; 0 outside every `repeated` block."""
    import dspy

    return int(dspy.settings.get(SETTING) or 0)
