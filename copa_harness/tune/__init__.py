"""Fine-tuning: training rows rendered as they will be served, a LoRA trainer, and DSPy's provider over it.

Names load on first use (PEP 562), so importing this package loads neither dspy nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copa_harness.tune.adapter import LoraAdapter as LoraAdapter
    from copa_harness.tune.provider import LoraProvider as LoraProvider
    from copa_harness.tune.provider import attach_provider as attach_provider
    from copa_harness.tune.provider import finetune as finetune
    from copa_harness.tune.provider import train_lora as train_lora
    from copa_harness.tune.rows import TrainingRow as TrainingRow
    from copa_harness.tune.rows import describe_demos as describe_demos
    from copa_harness.tune.rows import render_rows as render_rows
    from copa_harness.tune.settings import LoraSettings as LoraSettings
    from copa_harness.tune.traces import TraceRows as TraceRows
    from copa_harness.tune.traces import rows_from_traces as rows_from_traces
    from copa_harness.tune.trainer import LoraTrainer as LoraTrainer

_HOME = {
    "LoraProvider": "provider",
    "attach_provider": "provider",
    "finetune": "provider",
    "train_lora": "provider",
    "TrainingRow": "rows",
    "describe_demos": "rows",
    "render_rows": "rows",
    "LoraSettings": "settings",
    "TraceRows": "traces",
    "rows_from_traces": "traces",
    "LoraAdapter": "adapter",
    "LoraTrainer": "trainer",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
