"""Records of optimizations for the tables."""

from __future__ import annotations

from typing import Any

from copa_harness.results import OptimizationResult, PhaseRecord, Usage


def optimization(**told: Any) -> OptimizationResult:
    """What an optimization says; an optimization of one phase, completed, unless told otherwise."""
    usual: dict[str, Any] = {
        "strategy": "p",
        "model": "m",
        "phases": (PhaseRecord("p", Usage()),),
        "score_before": None,
        "score_after": None,
        "n_validation": 25,
        "stopped": "completed",
        "exhausted": False,
        "usage": Usage(),
        "seed": 0,
        "charged_calls": 0,
    }
    return OptimizationResult(**usual | told)
