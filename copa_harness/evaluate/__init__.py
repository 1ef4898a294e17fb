"""Running a program over examples: scores per example, with failures kept apart from wrong answers.

Names are loaded on first use, so importing the package imports neither DSPy nor numpy.
"""

from __future__ import annotations

from copa_harness.lazy_imports import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "examples": ["example_id", "example_ids"],
        "runner": ["ExampleRun", "evaluate", "run_examples"],
    },
)
