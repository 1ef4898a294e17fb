"""What is kept on disk between runs: finished stages, deployable artifacts, accepted baselines.

Plain JSON and safetensors, checksummed, written whole or not at all. Names are loaded on first use.
"""

from __future__ import annotations

from copa_harness.lazy_imports import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "artifacts": ["Artifact", "load_artifact", "save_artifact"],
        "baselines": [
            "Baseline",
            "BaselineDiff",
            "baseline_path",
            "baseline_text",
            "diff_baselines",
            "list_baselines",
            "load_baseline",
            "read_baseline",
            "save_baseline",
        ],
        "fingerprints": ["hash_examples", "hash_source"],
        "stages": ["StageStore"],
    },
)
