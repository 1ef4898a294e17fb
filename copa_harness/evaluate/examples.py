"""What an example is here: an id made of its content, its inputs and labels, and what its trace tells of its answer.

An id is the same in every process and on every machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dspy

from copa_harness.errors import TaskError
from copa_harness.lm.constrained import output_fields

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def plain(value: Any) -> Any:
    """`value` as plain JSON types: the same content gives the same result in every process.

    Numpy scalars become numbers, pydantic models and mappings become objects, sets become sorted lists, and anything
    else its `repr` without memory addresses.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=repr)
    if hasattr(value, "model_dump"):
        return plain(value.model_dump())
    if isinstance(value, dspy.Example):
        return plain(value.toDict())
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return _ADDRESS.sub("", repr(value))


def example_id(example: dspy.Example) -> str:
    """A stable id of an example: 16 hex digits of the hash of its inputs and labels.

    Args:
        example: Any DSPy example; private `dspy_` keys do not count.
    """
    content = {key: plain(value) for key, value in example.items()}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def example_ids(examples: Iterable[dspy.Example]) -> tuple[str, ...]:
    """Ids for a split: `example_id`, with `-2`, `-3`... for the repeats of an example that occurs several times."""
    seen: Counter[str] = Counter()
    ids = []
    for example in examples:
        base = example_id(example)
        seen[base] += 1
        ids.append(base if seen[base] == 1 else f"{base}-{seen[base]}")
    return tuple(ids)


def input_values(example: dspy.Example) -> dict[str, Any]:
    """The example's inputs by field name.

    Raises:
        TaskError: The example does not say which fields are inputs.
    """
    try:
        return dict(example.inputs().items())
    except ValueError as error:
        raise TaskError(
            f"got an example that does not say which of its fields are inputs ({', '.join(example.keys())}); "
            "expected dspy.Example(...).with_inputs('field', ...)"
        ) from error


def label_values(example: dspy.Example) -> dict[str, Any]:
    """The example's labels (every field that is not an input) by field name."""
    inputs = input_values(example)
    return {key: value for key, value in example.items() if key not in inputs}


def check_examples(examples: Sequence[dspy.Example], *, split: str) -> None:
    """Raise unless `examples` is a non-empty sequence of examples with declared inputs.

    Raises:
        TaskError: The split is empty, or holds something else than examples with inputs.
    """
    if not examples:
        raise TaskError(f"got no examples in the {split!r} split; expected at least one")
    for i, example in enumerate(examples):
        if not isinstance(example, dspy.Example):
            raise TaskError(
                f"got {type(example).__name__} as example {i} of the {split!r} split; "
                "expected dspy.Example(...).with_inputs('field', ...)"
            )
        input_values(example)


def label_scores_of(trace: Sequence[Any]) -> dict[str, dict[str, float]]:
    """By output field of every predictor, the log-probability of every allowed value of its last constrained answer.

    Of predictors with fields of one name, the one that answered last counts.

    Args:
        trace: (predictor, inputs, prediction) of every call, as DSPy keeps it.

    Returns:
        Nothing when no answer was constrained or nobody asked for log-probabilities.
    """
    scores: dict[str, dict[str, float]] = {}
    for predictor, _, prediction in trace:
        told = prediction.get("logprobs", None) if isinstance(prediction, dspy.Example) else None
        signature = getattr(predictor, "signature", None)
        if signature is None:
            continue
        listed = [field.name for field in output_fields(signature) if field.choices is not None]
        if told and len(told["content"]) == len(listed):
            scores |= {
                name: {str(one["token"]): float(one["logprob"]) for one in entry["top_logprobs"]}
                for name, entry in zip(listed, told["content"], strict=True)
            }
    return scores
