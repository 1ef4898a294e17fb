"""Fine-tuning: training rows rendered as they will be served, a LoRA trainer, and DSPy's provider over it.

Read `trainer` first: `rows` (and `traces`) is what it is given, `epochs` and `checkpoints` how a training is charged,
kept and taken up again, `loop` the training itself, over `batches` and `low_rank`. `dspy_provider` is DSPy's way in.

Names load on first use (PEP 562), so importing this package loads neither dspy nor torch.
"""

from __future__ import annotations

from copa_harness.lazy_imports import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "dspy_provider": ["LoraProvider", "attach_provider", "finetune", "train_lora"],
        "rows": ["RowDemos", "TrainingRow", "render_rows"],
        "options": ["LoraSettings"],
        "traces": ["TraceRows", "rows_from_traces"],
        "trainer": ["LoraAdapter", "LoraTrainer"],
    },
)
