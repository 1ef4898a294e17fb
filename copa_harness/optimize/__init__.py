"""Optimization: strategies over weights and prompts, one racing study, and DSPy's optimizers by name.

Names are loaded on first use, so importing the package imports neither DSPy nor Optuna.
"""

from __future__ import annotations

from copa_harness.lazy_imports import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "copa": ["COPA"],
        "options": ["LEVELS", "SearchOptions", "parse_budget"],
        "result": ["apply_state", "to_state"],
    },
)
