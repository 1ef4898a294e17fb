"""Optimization: strategies over weights and prompts, one racing study, and DSPy's optimizers by name.

Names are loaded on first use, so importing the package imports neither DSPy nor Optuna.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copa_harness.optimize.budgets import LEVELS, describe_budget, parse_budget
    from copa_harness.optimize.copa import COPA
    from copa_harness.optimize.outcome import OptimizationResult, apply_state, to_state
    from copa_harness.optimize.strategy import OPTIMIZER_NAMES, Step, parse_strategy

_HOMES = {
    "COPA": "copa",
    "LEVELS": "budgets",
    "OPTIMIZER_NAMES": "strategy",
    "OptimizationResult": "outcome",
    "Step": "strategy",
    "apply_state": "outcome",
    "describe_budget": "budgets",
    "parse_budget": "budgets",
    "parse_strategy": "strategy",
    "to_state": "outcome",
}

__all__ = [
    "COPA",
    "LEVELS",
    "OPTIMIZER_NAMES",
    "OptimizationResult",
    "Step",
    "apply_state",
    "describe_budget",
    "parse_budget",
    "parse_strategy",
    "to_state",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
