"""Checks of what `COPA` is given, each with a message that says got, expected and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dspy

from copa_harness.errors import ConfigurationError, TaskError
from copa_harness.evaluate.examples import check_examples
from copa_harness.lm.metered import MeteredLM
from copa_harness.optimize.propose.schema import split_off_validation
from copa_harness.optimize.search.candidate import model_name
from copa_harness.strategy import Step, StepKind

VALIDATION_SHARE = 1 / 3
"""Share of the training examples that becomes the validation split when none is given."""


def thawed(student: dspy.Module) -> dspy.Module:
    """A copy of the student that optimizers accept: a program compiled before counts as frozen in DSPy.

    Raises:
        TaskError: It is no program.
    """
    if not isinstance(student, dspy.Module):
        raise TaskError(f"got {type(student).__name__} as the program; expected a dspy.Module")
    copy = student.deepcopy()
    copy._compiled = False
    return copy


def check_metered(lm: Any) -> None:
    """Raise `ConfigurationError` unless the model's calls can be bounded and cached."""
    if not isinstance(lm, MeteredLM):
        raise ConfigurationError(
            f"got the model {model_name(lm)!r} ({type(lm).__name__}), whose calls cannot be bounded or cached; "
            "expected one made by copa_harness.lm.build_lm(...)"
        )


def splits_of(
    trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example] | None, *, steps: Sequence[Step], seed: int
) -> tuple[list[dspy.Example], list[dspy.Example]]:
    """Training and validation examples, the latter split off by `seed` when none are given and something is to decide.

    Raises:
        TaskError: A split is empty or too small.
    """
    check_examples(trainset, split="train")
    if valset is not None:
        check_examples(valset, split="validation")
        return list(trainset), list(valset)
    if [step.kind for step in steps] == [StepKind.NONE]:
        return list(trainset), list(trainset)
    return split_off_validation(trainset, share=VALIDATION_SHARE, seed=seed)
