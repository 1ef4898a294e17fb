"""Judgement: intervals, paired comparisons and gates over per-example scores.

Pure functions of numbers (numpy, scipy): no model, no file, no pytest. Names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "wilson_interval": "intervals",
    "mean_interval": "intervals",
    "PairedDifference": "paired",
    "paired_difference": "paired",
    "Pairs": "paired",
    "pair_up": "paired",
    "Noninferiority": "noninferiority",
    "rows_to_decide": "noninferiority",
    "smallest_visible_drop": "noninferiority",
    "exact_share_p_value": "exact",
    "bounded_mean_p_value": "exact",
    "attribute_gains": "attribution",
    "Attribution": "attribution",
    "compare_strategies": "comparison",
    "StrategyComparison": "comparison",
    "find_leakage": "leakage",
    "no_leakage": "leakage",
    "LeakageReport": "leakage",
    "SequentialJudge": "early",
    "SequentialAnswer": "early_answers",
    "random_order": "sequential",
    "ThresholdMonitor": "sequential",
    "RegressionMonitor": "sequential",
    "mcnemar_power": "power",
    "rows_needed": "power",
    "smallest_detectable_drop": "power",
    "sequential_power": "power",
    "MeanAbove": "betting",
    "MeanBelow": "betting",
    "merge_repeats": "repeats",
    "repeats_of": "repeats",
    "repeated_mean": "repeats",
    "flaky_report": "flaky",
    "holm_adjusted": "multiple",
    "holm_over_suite": "multiple",
    "better_than": "superiority",
    "judge_spending": "spending",
    "cost_per_answer": "spending",
    "Gates": "gates",
    "Reference": "regression",
    "judge": "gates",
    "overall": "gates",
    "is_failure": "gates",
    "format_failure": "messages",
    "format_gates": "messages",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
