"""Robustness: changes that should not change an answer, as rows to ask again and as Hypothesis strategies.

Read `perturbations` first (what can be changed, step by step), then `strategies`. Who asks the changed rows: a search
with `robust=True` (`optimize.search.scoring`) and the gate `max_violation_rate` (`session.violations`,
`judge.violations`).
"""

from __future__ import annotations

from copa_harness.lazy_imports import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "perturbations": ["Forms", "NAMES", "case", "distractor", "shuffled", "typos", "white_space"],
        "strategies": ["changed_examples", "changed_programs", "smallest"],
    },
)
