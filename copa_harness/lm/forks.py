"""Which fork of the process this is: what must not cross a fork asks, without a system call each time.

Knows nothing else.
"""

from __future__ import annotations

import os

_generation = 0


def generation() -> int:
    """A number that changes in a forked child."""
    return _generation


def _forked() -> None:
    global _generation
    _generation += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
