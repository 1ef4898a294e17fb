"""What is kept on disk between runs: finished stages, deployable artifacts, accepted baselines.

Plain JSON and safetensors, checksummed, written whole or not at all. Names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "hash_json": "fingerprints",
    "hash_examples": "fingerprints",
    "hash_source": "fingerprints",
    "hash_file": "fingerprints",
    "StageStore": "stages",
    "Artifact": "artifacts",
    "save_artifact": "artifacts",
    "load_artifact": "artifacts",
    "Baseline": "baselines",
    "baseline_path": "baselines",
    "load_baseline": "baselines",
    "save_baseline": "baselines",
    "read_baseline": "baselines",
    "list_baselines": "baselines",
    "BaselineDiff": "baseline_diff",
    "diff_baselines": "baseline_diff",
    "baseline_text": "baseline_diff",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
