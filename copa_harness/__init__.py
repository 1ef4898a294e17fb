"""copa-harness: evaluate, gate and improve DSPy programs by optimizing weights and prompts together.

Public names are loaded on first use, so importing the package (and so the pytest plugin in it) loads neither
torch nor DSPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copa_harness.lm.build import build_lm
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.lm.scope import open_scope
    from copa_harness.lm.scripted import ScriptedLM
    from copa_harness.optimize.copa import COPA
    from copa_harness.results import Budget, EvaluationResult, Phase, Usage, Verdict
    from copa_harness.tasks.task import Task

_HOMES = {
    "Budget": "results",
    "COPA": "optimize.copa",
    "EvaluationResult": "results",
    "MeteredLM": "lm.metered",
    "Phase": "results",
    "ScriptedLM": "lm.scripted",
    "Task": "tasks.task",
    "Usage": "results",
    "Verdict": "results",
    "build_lm": "lm.build",
    "open_scope": "lm.scope",
}

__all__ = [
    "Budget",
    "COPA",
    "EvaluationResult",
    "MeteredLM",
    "Phase",
    "ScriptedLM",
    "Task",
    "Usage",
    "Verdict",
    "build_lm",
    "open_scope",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("copa-harness")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
