"""The metered gateway to language models: engines, cache, budget, and the LM object DSPy programs hold.

Names load on first use (PEP 562), so importing this package loads neither dspy nor torch.
"""

from __future__ import annotations

from copa_harness.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "budget.ledger": ["whole_run"],
        "budget.scope": ["Scope", "booked_as", "current_scope", "open_scope"],
        "cache.store": ["ResponseCache"],
        "context": ["planning", "repeated"],
        "engine": ["Engine"],
        "factory": ["adapter_for", "build_lm"],
        "gateway": ["Gateway"],
        "metered": ["MeteredLM"],
        "scripted": ["ScriptedLM"],
    },
)
