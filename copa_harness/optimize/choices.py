"""What a user may choose among by name in a search, and the one message for a name that is none of them.

Plain words, so that a wrong one is refused where it is written, before anything heavy is loaded. Knows no search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from copa_harness.errors import ConfigurationError

SAMPLERS: tuple[str, ...] = ("tpe", "random", "gp")
"""Optuna's samplers; see `samplers`."""

GROUNDINGS: tuple[str, ...] = ("all", "data", "program", "examples", "history", "weighty", "none")
"""What the writer of instructions is shown beside the step and its current instruction: everything, one thing, or
nothing; see `writing`."""


def check_sampler(name: Any) -> None:
    """Raise `ConfigurationError` unless `name` is a sampler's."""
    if name not in SAMPLERS:
        raise ConfigurationError(f"got {name!r} as the sampler; expected one of {', '.join(SAMPLERS)}")


def check_groundings(names: Any) -> None:
    """Raise `ConfigurationError` unless `names` are one or more groundings, each once."""
    listed = list(names) if isinstance(names, Sequence) and not isinstance(names, str) else []
    if not listed or len(set(map(str, listed))) < len(listed) or any(name not in GROUNDINGS for name in listed):
        raise ConfigurationError(
            f"got groundings={names!r}; expected a list of one or more of {', '.join(GROUNDINGS)}, each once"
        )
