"""Task definitions: a program, a metric and three splits that never overlap.

Importing this package loads neither DSPy nor scikit-learn; the first call of a ready-made task does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copa_harness.tasks.staged import staged_wine
    from copa_harness.tasks.tabular import breast_cancer, exact_match, iris, wine
    from copa_harness.tasks.task import Task

__all__ = ["Task", "breast_cancer", "exact_match", "iris", "staged_wine", "wine"]


def __getattr__(name: str) -> Any:
    if name == "Task":
        from copa_harness.tasks.task import Task

        return Task
    if name == "staged_wine":
        from copa_harness.tasks.staged import staged_wine

        return staged_wine
    if name in __all__:
        from copa_harness.tasks import tabular

        return getattr(tabular, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
