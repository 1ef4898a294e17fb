"""A rule-based stand-in for the language model that writes instructions inside GEPA and MIPROv2.

The embedded model cannot write. So that those optimizers are not judged by that, their prompt LM is a script which
knows exactly the instructions COPA proposes without a model (the labels, and rules learned from the training rows by
a shallow decision tree) and returns one of them, other than the current one, chosen by the hash of the question. Its
calls are counted like any other's.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize.propose.instructions import rule_based

_CURRENT = r"\[\[ ## (?:current_instruction|basic_instruction) ## \]\]\n(.*?)(?:\n\n\[\[|\n\nRespond with|\Z)"
"""Where GEPA's and MIPROv2's questions state the instruction to be improved."""


def rule_writer(task: Any, *, seed: int) -> ScriptedLM:
    """The prompt LM for a task."""
    options = {
        predictor.signature.instructions: [
            proposal.option.text
            for proposal in rule_based(
                name, predictor.signature, predictor.signature.instructions, trainset=task.trainset, seed=seed
            )
        ]
        for name, predictor in task.program.named_predictors()
    }

    def answer(messages: Any, *, seed: int) -> dict[str, str] | str:
        prompt = messages[-1]["content"]
        asked = int(hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest(), 16)
        stated = re.search(_CURRENT, prompt, flags=re.DOTALL)
        current = stated.group(1).strip() if stated else ""
        plain = next((one for one in options if current.startswith(one.strip())), next(iter(options)))
        others = [text for text in options[plain] if text.strip() != current] or [plain]
        fields = {name: others[asked % len(others)] for name in ("new_instruction", "proposed_instruction")}
        fields |= {"observations": "COMPLETE", "summary": "Rows of measurements with a label."}
        fields |= dict.fromkeys(("program_description", "module_description"), "Classifies rows of measurements.")
        return json.dumps(fields) if "JSON object" in prompt.rpartition("\n")[2] else fields

    return ScriptedLM(answer, model="scripted/rule-writer")
