"""What the data look like: which predictor answers which labelled field, which outputs are categories, how to split.

Pure functions over examples and signatures. Randomness is a generator passed in.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import dspy
import numpy as np

from copa_harness.errors import TaskError
from copa_harness.evaluate.examples import input_values
from copa_harness.lm.constrained import choices_of

MAX_CATEGORIES = 20
"""More distinct values than this are free text, not categories."""


@dataclass(frozen=True, slots=True)
class LabelledField:
    """An output field whose right value is in the examples; `categories` in a stable order, empty for free text."""

    predictor: str
    name: str
    categories: tuple[str, ...]


def is_fully_labelled(signature: Any, examples: Sequence[dspy.Example]) -> bool:
    """Whether every example holds every input and output field of the signature."""
    names = [*signature.input_fields, *signature.output_fields]
    return bool(examples) and all(name in example for example in examples for name in names)


def labelled_field(predictor: str, signature: Any, examples: Sequence[dspy.Example]) -> LabelledField | None:
    """The predictor's last output field that all examples hold; None when there is none or inputs are missing."""
    if not all(name in example for example in examples for name in signature.input_fields):
        return None
    names = [n for n in signature.output_fields if all(n in example for example in examples)]
    if not names:
        return None
    name = names[-1]
    values = [example[name] for example in examples]
    return LabelledField(predictor, name, categories_of(values, annotation=signature.output_fields[name].annotation))


def categories_of(values: Sequence[Any], *, annotation: Any = None) -> tuple[str, ...]:
    """The categories behind the values, or () when they are free text or a scale of numbers.

    A `Literal`, `bool` or enum annotation says them; otherwise values are categories when there are at most 20
    different ones and each occurs twice on average.
    """
    if (choices := choices_of(annotation)) is not None:
        return choices
    if annotation is float:
        return ()
    distinct = sorted({text_of(value) for value in values})
    if 2 <= len(distinct) <= MAX_CATEGORIES and 2 * len(distinct) <= len(values):
        return tuple(distinct)
    return ()


def text_of(value: Any) -> str:
    """A value as it appears in a prompt."""
    return str(value.value) if isinstance(value, enum.Enum) else str(value)


def strata_of(examples: Sequence[dspy.Example]) -> tuple[str, ...]:
    """A stratum for each example: its categorical labels joined, or one stratum for all when labels are free text."""
    if not examples:
        return ()
    inputs = set(input_values(examples[0]))
    names = [name for name in examples[0] if name not in inputs and all(name in e for e in examples)]
    columns = []
    for name in names:
        values = [example[name] for example in examples]
        if categories_of(values):
            columns.append([text_of(value) for value in values])
    if not columns:
        return ("",) * len(examples)
    joined = ["|".join(row) for row in zip(*columns, strict=True)]
    return tuple(joined) if 2 * len(set(joined)) <= len(joined) else ("",) * len(examples)


def stratified_order(strata: Sequence[str], generator: np.random.Generator) -> list[int]:
    """A random order in which every prefix has close to the whole's mix of strata."""
    position = np.empty(len(strata))
    for stratum in sorted(set(strata)):
        members = [i for i, one in enumerate(strata) if one == stratum]
        spread = (np.arange(len(members)) + generator.random()) / len(members)
        position[generator.permutation(members)] = spread
    return [int(i) for i in np.lexsort((generator.random(len(strata)), position))]


def split_off_validation(
    trainset: Sequence[dspy.Example], *, share: float, seed: int
) -> tuple[list[dspy.Example], list[dspy.Example]]:
    """(training examples, validation examples): a seeded stratified split, both in their original order.

    Raises:
        TaskError: Too few examples to have two of each.
    """
    n_validation = max(2, round(len(trainset) * share))
    if len(trainset) - n_validation < 2:
        raise TaskError(
            f"got {len(trainset)} training examples and no valset; expected at least 4 to split validation off, "
            "or pass valset=..."
        )
    order = stratified_order(strata_of(trainset), np.random.default_rng([seed, 101]))
    chosen = set(order[:n_validation])
    return (
        [example for i, example in enumerate(trainset) if i not in chosen],
        [example for i, example in enumerate(trainset) if i in chosen],
    )


MISSING = frozenset({"", "none", "nan", "null", "na", "n/a", "?", "-", "missing"})
"""How a missing number is printed, letter case aside."""


def numbers_of(values: Sequence[str]) -> list[Decimal | None] | None:
    """A column of printed numbers, None where one is missing; None when the column is no column of numbers.

    A single different number, or a text that is neither a number nor says that one is missing, makes it none.
    """
    numbers: list[Decimal | None] = []
    for value in values:
        text = value.strip()
        if text.casefold() in MISSING:
            numbers.append(None)
            continue
        try:
            number = Decimal(text)
        except InvalidOperation:
            return None
        if not number.is_finite():
            return None
        numbers.append(number)
    return numbers if len({number for number in numbers if number is not None}) > 1 else None


_PAIR = re.compile(r"^\s*([^=:,;]+?)\s*[=:]\s*([^,;=]+?)\s*$")


def columns_of(examples: Sequence[dspy.Example], input_fields: Sequence[str]) -> dict[str, list[str]]:
    """The inputs as named columns of printed values.

    A field holding ``name=value, name=value`` text in every example becomes one column per name; every other field is a
    column of its own.
    """
    columns: dict[str, list[str]] = {}
    for name in input_fields:
        texts = [text_of(example[name]) for example in examples]
        pairs = [_pairs(text) for text in texts]
        names = list(pairs[0]) if pairs and pairs[0] else []
        if names and all(one is not None and list(one) == names for one in pairs):
            for inner in names:
                columns[inner] = [one[inner] for one in pairs if one is not None]
        else:
            columns[name] = texts
    return columns


def _pairs(text: str) -> dict[str, str] | None:
    pieces = [piece for piece in re.split(r"[,;\n]", text) if piece.strip()]
    matches = [_PAIR.match(piece) for piece in pieces]
    if not pieces or not all(matches):
        return None
    found = {match.group(1): match.group(2) for match in matches if match}
    return found if len(found) == len(pieces) else None
