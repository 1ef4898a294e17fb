"""Instructions that need no model: the plain one, with the labels, with a rule learned from rows, with its fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from copa_harness.optimize.propose.field_descriptions import counted, with_descriptions
from copa_harness.optimize.propose.rules import learn_rules
from copa_harness.optimize.propose.schema import columns_of, labelled_field, text_of
from copa_harness.optimize.search.space import InstructionOption


def joined(instruction: str, sentence: str) -> str:
    """The sentence appended to the instruction as its next sentence (or line, when the instruction has several)."""
    text = instruction.strip()
    if not text:
        return sentence
    if "\n" in text:
        return f"{text}\n{sentence}"
    return f"{text} {sentence}" if text[-1] in ".!?:;" else f"{text}. {sentence}"


@dataclass(frozen=True, slots=True)
class Proposal:
    """An option, and the arm it came from."""

    option: InstructionOption
    arm: str


def rule_based(
    predictor: str,
    signature: Any,
    plain: str,
    *,
    trainset: Sequence[dspy.Example],
    seed: int,
    row_weights: Sequence[float] | None = None,
) -> tuple[Proposal, ...]:
    """The plain instruction and what the data add to it without any model: rules, labels, what the fields hold.

    Args:
        predictor: The predictor's name.
        signature: Its signature.
        plain: The instruction everything is appended to.
        trainset: The rows the labels and rules are learned from.
        seed: For ties between equally good splits.
        row_weights: How much each row counts for one more rule, which is left out when it reads like the others.
    """
    proposals = [Proposal(InstructionOption("plain", plain), "plain")]
    if fields := counted(signature, trainset):
        proposals.append(Proposal(InstructionOption("fields", with_descriptions(plain, fields)), "fields"))
    field = labelled_field(predictor, signature, trainset)
    if field is None or not field.categories:
        return tuple(proposals)
    columns = columns_of(trainset, tuple(signature.input_fields))
    expected = [text_of(example[field.name]) for example in trainset]
    rules = [(rule, "rule") for rule in learn_rules(columns, expected, seed=seed)]
    if row_weights is not None:
        known = {rule.text for rule, _ in rules}
        weighted = learn_rules(columns, expected, seed=seed, weights=row_weights)[:1]
        rules += [(rule, "stressed rule") for rule in weighted if rule.text not in known]
    for i, (rule, arm) in enumerate(rules):
        name = arm if i == 0 or arm != "rule" else f"rule {i + 1}"
        proposals.append(Proposal(InstructionOption(name, joined(plain, rule.text)), arm))
    labels = f"Answer with one of: {', '.join(field.categories)}."
    proposals.append(Proposal(InstructionOption("labels", joined(plain, labels)), "labels"))
    return tuple(proposals)
