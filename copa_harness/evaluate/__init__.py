"""Running a program over examples: scores per example, with failures kept apart from wrong answers.

Names are loaded on first use, so importing the package imports neither DSPy nor numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copa_harness.evaluate.examples import example_id, example_ids
    from copa_harness.evaluate.runner import ExampleRun, evaluate, run_examples

_HOMES = {
    "evaluate": "runner",
    "run_examples": "runner",
    "ExampleRun": "runner",
    "example_id": "examples",
    "example_ids": "examples",
}

__all__ = ["ExampleRun", "evaluate", "example_id", "example_ids", "run_examples"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
