"""One session: settings in, runs and records out. Everything below is put together here; pytest is not known.

Names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "CopaRun": "runs",
    "CopaSession": "copa_session",
    "MarkerArguments": "marker",
    "Score": "runs",
    "ScoredEvaluation": "runs",
    "Setting": "settings",
    "Settings": "settings",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
