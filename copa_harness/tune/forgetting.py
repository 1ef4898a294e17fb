"""What a training costs elsewhere: the loss on a handful of general answers, before it and after every epoch.

The rows carry no task, only what any model that talks can say; the untrained adapter's loss on them is the base
model's. A rise in nats per token is a factor of exp(rise) on how unlikely such answers have become. It is measured for
large models alone (see `suited`): a small one is not made for talk, and has nothing of the kind to forget.
"""

from __future__ import annotations

from pathlib import Path

from copa_harness.lm.local.chat_template import ChatTemplate
from copa_harness.tune.options import is_large
from copa_harness.tune.rows import EncodedRow, TrainingRow, encode_row

GENERAL = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Translate to Spanish: Good morning, my friend.", "Buenos días, mi amigo."),
    ("Write one sentence about the sea.", "The sea stretched out to the horizon, calm and blue under the morning sun."),
    ("Why do we have seasons?", "We have seasons because the Earth's axis is tilted as it moves around the Sun."),
    ("Name three fruits.", "Three fruits are apples, bananas, and oranges."),
    ("What is 12 plus 30?", "12 plus 30 is 42."),
    ("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("How do I make tea?", "Boil water, pour it over a tea bag in a cup, and let it steep for three to five minutes."),
)
"""Questions and answers, short enough that all of them cost less than a row of training."""


def general_rows(directory: Path, *, chat: ChatTemplate, eos_ids: frozenset[int]) -> list[EncodedRow]:
    """The rows for a model in a folder; none for a small one."""
    if not is_large(directory):
        return []
    asked = [
        TrainingRow(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))
        for question, answer in GENERAL
    ]
    return [encode_row(chat, row, eos_ids=eos_ids) for row in asked]
