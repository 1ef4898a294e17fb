"""The metered door to language models: engines, cache, budget, and the LM object DSPy programs hold.

Names load on first use (PEP 562), so importing this package loads neither dspy nor torch. Knows nothing of
programs, examples, metrics or optimizers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copa_harness.lm.build import adapter_for as adapter_for
    from copa_harness.lm.build import build_lm as build_lm
    from copa_harness.lm.cache import ResponseCache as ResponseCache
    from copa_harness.lm.door import Door as Door
    from copa_harness.lm.engines import Engine as Engine
    from copa_harness.lm.ledger import whole_run as whole_run
    from copa_harness.lm.metered import MeteredLM as MeteredLM
    from copa_harness.lm.planning import planning as planning
    from copa_harness.lm.repeats import repeated as repeated
    from copa_harness.lm.scope import Scope as Scope
    from copa_harness.lm.scope import booked_as as booked_as
    from copa_harness.lm.scope import current_scope as current_scope
    from copa_harness.lm.scope import open_scope as open_scope
    from copa_harness.lm.scripted import ScriptedLM as ScriptedLM

_HOME = {
    "adapter_for": "build",
    "build_lm": "build",
    "ResponseCache": "cache",
    "Door": "door",
    "Engine": "engines",
    "MeteredLM": "metered",
    "whole_run": "ledger",
    "planning": "planning",
    "repeated": "repeats",
    "Scope": "scope",
    "booked_as": "scope",
    "current_scope": "scope",
    "open_scope": "scope",
    "ScriptedLM": "scripted",
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
