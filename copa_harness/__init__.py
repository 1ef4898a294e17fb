"""copa-harness: evaluate, gate and improve DSPy programs by optimizing weights and prompts together.

Public names are loaded on first use, so importing the package (and so the pytest plugin in it) loads neither
torch nor DSPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from copa_harness.lazy_imports import attach

if TYPE_CHECKING:
    from copa_harness.export.loading import load as load
    from copa_harness.lm.call_context import open_scope as open_scope
    from copa_harness.lm.factory import build_lm as build_lm
    from copa_harness.lm.metered import MeteredLM as MeteredLM
    from copa_harness.lm.scripted import ScriptedLM as ScriptedLM
    from copa_harness.optimize.copa import COPA as COPA
    from copa_harness.results import Budget as Budget
    from copa_harness.results import EvaluationResult as EvaluationResult
    from copa_harness.results import Phase as Phase
    from copa_harness.results import Usage as Usage
    from copa_harness.results import Verdict as Verdict
    from copa_harness.tasks.task import Task as Task

_load, __dir__, __all__ = attach(
    __name__,
    {
        "export.loading": ["load"],
        "lm.call_context": ["open_scope"],
        "lm.factory": ["build_lm"],
        "lm.metered": ["MeteredLM"],
        "lm.scripted": ["ScriptedLM"],
        "optimize.copa": ["COPA"],
        "results": ["Budget", "EvaluationResult", "Phase", "Usage", "Verdict"],
        "tasks.task": ["Task"],
    },
)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("copa-harness")
    return _load(name)
