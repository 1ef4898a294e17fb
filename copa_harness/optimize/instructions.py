"""Proposals of instructions: the plain one, with the labels, with a rule learned from the rows, and a prompt LM's.

The first three need no model. The prompt LM is shown a summary of the data, the current instruction and past
instructions with their scores; its proposals are drawn under rollout ids, so they are repeatable. Knows signatures and
examples; knows nothing of how proposals are scored.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.utils.exceptions import AdapterParseError, LMConfigurationError, LMError

from copa_harness.evaluate.runner import default_adapter
from copa_harness.lm.scope import current_scope
from copa_harness.optimize.rules import learn_rules
from copa_harness.optimize.schema import columns_of, labelled_field, text_of
from copa_harness.results import Phase

logger = logging.getLogger("copa_harness")


@dataclass(frozen=True, slots=True)
class InstructionOption:
    """An instruction for one predictor, and the name it goes by in the study."""

    name: str
    text: str


def joined(instruction: str, sentence: str) -> str:
    """The sentence appended to the instruction as its next sentence (or line, when the instruction has several)."""
    text = instruction.strip()
    if not text:
        return sentence
    if "\n" in text:
        return f"{text}\n{sentence}"
    return f"{text} {sentence}" if text[-1] in ".!?:;" else f"{text}. {sentence}"


def rule_based(
    predictor: str, signature: Any, plain: str, *, trainset: Sequence[dspy.Example], seed: int
) -> tuple[InstructionOption, ...]:
    """The plain instruction and what the data add to it without any model: the labels, and rules in words.

    Args:
        predictor: The predictor's name.
        signature: Its signature.
        plain: The instruction everything is appended to.
        trainset: The rows the labels and rules are learned from.
        seed: For ties between equally good splits.
    """
    options = [InstructionOption("plain", plain)]
    field = labelled_field(predictor, signature, trainset)
    if field is None or not field.categories:
        return tuple(options)
    labels = f"Answer with one of: {', '.join(field.categories)}."
    columns = columns_of(trainset, tuple(signature.input_fields))
    rules = learn_rules(columns, [text_of(example[field.name]) for example in trainset], seed=seed)
    for i, rule in enumerate(rules):
        options.append(InstructionOption("rule" if i == 0 else f"rule {i + 1}", joined(plain, rule.text)))
    options.append(InstructionOption("labels", joined(plain, labels)))
    return tuple(options)


class ProposeInstruction(dspy.Signature):
    """Write one better instruction for a step of a language-model program.

    The instruction is put before the step's input, and its output is scored automatically. Say what the step has to do,
    what decides between the possible answers, and how the answer must look. Do not repeat the data.
    """

    program_step: str = dspy.InputField(desc="name, inputs and outputs of the step")
    data_summary: str = dspy.InputField(desc="what the training data look like")
    current_instruction: str = dspy.InputField()
    past_instructions: str = dspy.InputField(desc="instructions tried before, with their mean scores (0 to 1)")
    tip: str = dspy.InputField(desc="how to go about it")
    proposed_instruction: str = dspy.OutputField(desc="the instruction alone")


TIPS: tuple[str, ...] = (
    "Be plain and short.",
    "State the decision criteria that separate the answers, with the numbers or words that matter.",
    "Describe the task step by step.",
    "Say what is commonly mistaken, and how to avoid it.",
    "Give the role of an expert whose knowledge the step needs.",
    "Be precise about the form of the answer.",
)
"""One per proposal, in turn: variety without a higher temperature."""


def data_summary(signature: Any, trainset: Sequence[dspy.Example], *, n_rows: int = 5) -> str:
    """The training data in a few lines, from counting alone: fields, ranges, categories and the first rows."""
    lines = [f"{len(trainset)} examples."]
    names = [name for name in signature.fields if all(name in example for example in trainset)]
    for name in names:
        values = [text_of(example[name]) for example in trainset]
        counts = Counter(values)
        if len(counts) <= 12:
            said = ", ".join(f"{value} ({count})" for value, count in sorted(counts.items()))
            lines.append(f"{name}: one of {said}")
        else:
            lines.append(f"{name}: {len(counts)} different values, for example {values[0][:80]}")
    for example in trainset[:n_rows]:
        lines.append("; ".join(f"{name}={text_of(example[name])[:80]}" for name in names))
    return "\n".join(lines)


def proposed_by_lm(
    prompt_lm: Any,
    *,
    predictor: str,
    signature: Any,
    current: str,
    trainset: Sequence[dspy.Example],
    past: Sequence[tuple[str, float]],
    n: int,
    first_rollout: int = 1,
) -> tuple[InstructionOption, ...]:
    """Instructions written by the prompt LM; proposals that do not parse, repeat or are empty are left out.

    Args:
        prompt_lm: The model that writes.
        predictor: The predictor's name.
        signature: Its signature.
        current: The instruction in use.
        trainset: Rows to summarize.
        past: Instructions tried before with their mean scores, 0..1.
        n: Proposals asked for, one call each.
        first_rollout: Rollout id of the first; the others follow.

    Raises:
        BudgetExhausted: The budget ended.
    """
    best_last = sorted(past, key=lambda one: one[1])[-8:]
    history = "\n".join(f"{score:.2f}: {text}" for text, score in best_last) or "none yet"
    fields = f"{predictor}: {', '.join(signature.input_fields)} -> {', '.join(signature.output_fields)}"
    writer = dspy.Predict(ProposeInstruction)
    options: list[InstructionOption] = []
    seen = {text for text, _ in past} | {current}
    with current_scope().phase(Phase.INSTRUCTIONS), dspy.context(
        lm=prompt_lm, adapter=default_adapter(), disable_history=True, trace=None
    ):
        for i in range(n):
            try:
                answer = writer(
                    program_step=fields,
                    data_summary=data_summary(signature, trainset),
                    current_instruction=current,
                    past_instructions=history,
                    tip=TIPS[i % len(TIPS)],
                    config={"rollout_id": first_rollout + i, "temperature": 1.0},
                )
            except LMConfigurationError:
                raise
            except (AdapterParseError, LMError) as error:
                logger.warning(
                    "proposal %d of %d for %s is unusable: %s", i + 1, n, predictor, type(error).__name__
                )
                continue
            text = str(answer.proposed_instruction or "").strip()
            if text and text not in seen:
                seen.add(text)
                options.append(InstructionOption(f"proposed {first_rollout + i}", text))
    return tuple(options)
