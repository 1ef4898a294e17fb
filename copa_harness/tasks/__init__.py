"""Task definitions: a program, a metric and three splits that never overlap.

Importing this package loads neither DSPy nor scikit-learn; the first call of a ready-made task does.
"""

from __future__ import annotations

from copa_harness.lazy_imports import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "agent": ["agent"],
        "classification": ["classification"],
        "clinc150": ["clinc150"],
        "extraction": ["extraction"],
        "gsm8k": ["gsm8k"],
        "hotpotqa": ["hotpotqa"],
        "order_emails": ["order_emails"],
        "staged": ["staged_wine"],
        "tabular": ["breast_cancer", "exact_match", "iris", "wine"],
        "task": ["Task"],
    },
)
