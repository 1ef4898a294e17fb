"""Language models: the gateway all calls go through, its cache and budget, the engines, and what a DSPy program holds.

Read `metered`, `call_context`, `gateway` and `engine` in that order; then `budget` and `cache`, which the gateway uses,
and an engine: `scripted`, `endpoint` or `local`. `factory` makes a model from its name. Names load on first use (PEP
562), so importing this package loads neither dspy nor torch.
"""

from __future__ import annotations

from copa_harness.lazy_imports import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "budget.ledger": ["whole_run"],
        "budget.scope": ["Scope"],
        "cache.store": ["ResponseCache"],
        "call_context": ["booked_as", "current_scope", "dry_run", "in_context", "observing", "open_scope", "repeated"],
        "engine": ["Engine"],
        "factory": ["ModelSettings", "adapter_for", "build_lm"],
        "gateway": ["Gateway"],
        "metered": ["MeteredLM"],
        "scripted": ["ScriptedLM"],
    },
)
