"""Judgement: intervals, paired comparisons and gates over per-example scores, as pure functions of numbers.

In the order to read: `intervals` of one mean, `paired_tests` of two runs, `exact_tests` behind `noninferiority`, then
`paired_gates` and `gates`, which say in words what these found. Names are loaded on first use.
"""

from __future__ import annotations

from copa_harness.lazy_imports import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "attribution": ["Attribution", "attribute_gains"],
        "ranking": ["StrategyComparison", "compare_strategies", "holm_adjusted"],
        "paired_gates": ["JudgedRun", "Reference", "better_than"],
        "exact_tests": ["bounded_mean_p_value", "exact_share_p_value"],
        "flaky": ["flaky_report", "merge_repeats", "repeated_mean", "repeats_of"],
        "gates": ["cost_per_answer", "is_failure", "judge", "judge_spending", "overall"],
        "human_scores": ["HumanScores", "human_scores"],
        "intervals": ["mean_interval", "wilson_interval"],
        "leakage": ["LeakageReport", "find_leakage", "no_leakage"],
        "explanations": ["format_failure", "format_gates"],
        "options": ["Gates"],
        "noninferiority": ["Noninferiority"],
        "paired_tests": ["PairedDifference", "PairedScores", "pair_up", "paired_difference"],
        "power": ["chance_to_fail", "chance_to_pass", "drop_to_see", "rows_to_pass"],
        "sequential.betting": ["MeanAbove", "MeanBelow"],
        "sequential.monitors": ["RegressionMonitor", "ThresholdMonitor", "random_order"],
        "sequential.stopping": ["SequentialAnswer", "SequentialJudge"],
    },
)
