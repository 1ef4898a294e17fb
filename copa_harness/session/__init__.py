"""One session: settings in, runs and records out. Everything below is put together here; pytest is not known.

Names are loaded on first use.
"""

from __future__ import annotations

from copa_harness.lazy_imports import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "runs": ["CopaRun", "Score", "ScoredEvaluation"],
        "session": ["CopaSession"],
        "options": ["Setting", "Settings"],
    },
)
