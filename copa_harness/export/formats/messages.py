"""The final prompts as chat messages with slots, how outputs are read and with which settings they were asked for."""

from __future__ import annotations

import json

from copa_harness.export.writing import Export


def write(export: Export) -> list[str]:
    """Fill the folder."""
    export.write("messages.json", json.dumps(export.prompts(), indent=2, ensure_ascii=False) + "\n")
    export.write_answer(source="json")
    return ["the messages: messages.json"]
