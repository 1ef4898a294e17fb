"""What one takes away: an optimized program outside of the suite that made it.

Read `scored` (what an artifact keeps of its program and its scored answers), `annotations` (types as JSON), `loading`
(`copa_harness.load`), `writing` (`copa export`: the folder, its rows and its check), then the modules of `formats`, one
per form.
"""

from __future__ import annotations

from copa_harness.lazy_imports import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {"loading": ["load"], "scored": ["Scored", "read_scored", "scored_of"], "writing": ["export_artifact"]},
)
