"""The final prompts as text: one file per predictor, a line with the role above every message."""

from __future__ import annotations

import re
from pprint import pformat

from copa_harness.export.writing import Export


def write(export: Export) -> list[str]:
    """Fill the folder."""
    prompts = export.prompts()
    texts = "\n".join(message["content"] for prompt in prompts.values() for message in prompt["messages"])
    head = "-----"
    while re.search(rf"^{head} \w+ {head}$", texts, re.MULTILINE):
        head += "-"
    for name, prompt in prompts.items():
        prompt["file"] = "prompt.txt" if len(prompts) == 1 else f"prompt-{name}.txt"
        lines = [f"{head} {one['role']} {head}\n{one['content']}\n" for one in prompt.pop("messages")]
        export.write(prompt["file"], "".join(lines))
    export.write_answer(
        source="text",
        head=repr(rf"^{head} (\w+) {head}\n"),
        prompts=pformat(prompts, width=110, sort_dicts=False),
    )
    return [f"the prompt: {', '.join(prompt['file'] for prompt in prompts.values())}"]
