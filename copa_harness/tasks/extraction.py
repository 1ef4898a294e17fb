"""Extraction: a record, described by a Pydantic model, out of a text; scored field by field and as a whole.

    extraction(Order, [("Dear shop, ...", Order(...)), ...])      or a file: extraction(Order, "orders.jsonl")

Models may be nested and hold lists, optional fields and enums. The program is one predictor, `text -> record`; what a
prompt step may change are its instruction, the descriptions of the model's fields in it, and demonstrations
(`copa_harness/optimize/README.md`). DSPy is imported when the task is made, not before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from copa_harness.errors import TaskError
from copa_harness.tasks.rows import draw_groups, read_rows
from copa_harness.tasks.task import Task

if TYPE_CHECKING:
    import dspy
    from pydantic import BaseModel


def field_scores(expected: Any, answered: Any) -> dict[str, float]:
    """The score of every field of a record, 0..1; fields of nested records count equally within theirs.

    Texts are equal letter case and blanks aside, numbers and missing values when they are. The entries of a list are
    paired so that they score most together, in whatever order; what is missing or too many scores 0.

    Args:
        expected: The right record, a Pydantic model or a mapping.
        answered: The one to score.
    """
    gold, said = _plain(expected), _plain(answered)
    said = said if isinstance(said, Mapping) else {}
    return {name: _score(value, said.get(name)) for name, value in gold.items()}


def record_score(example: dspy.Example, prediction: Any, trace: Any = None) -> Any:
    """The mean over the fields of the record, with what each scored as feedback."""
    import dspy

    scores = field_scores(example.record, prediction.record)
    gold, said = _plain(example.record), _plain(prediction.record)
    lines = [
        f"{name}: {score:.2f}"
        + ("" if score == 1.0 else f", expected {_text(gold[name])}, got {_text(dict(said or {}).get(name))}")
        for name, score in scores.items()
    ]
    whole = "right" if all(score == 1.0 for score in scores.values()) else "not right"
    feedback = "\n".join([f"The record as a whole is {whole}. Field by field:", *lines])
    return dspy.Prediction(score=float(np.mean(list(scores.values()))), feedback=feedback)


def whole_record(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    """1.0 when every field of the record is right, else 0.0."""
    return float(all(score == 1.0 for score in field_scores(example.record, prediction.record).values()))


def extraction(
    model: type[BaseModel],
    rows: Path | str | Sequence[tuple[str, BaseModel]],
    *,
    name: str = "extraction",
    instructions: str = "Extract the record from the text.",
    whole: bool = False,
    seed: int = 0,
    sizes: tuple[int, int, int] = (40, 24, 60),
) -> Task:
    """The record in a text, one predictor.

    Args:
        model: What a record looks like; the descriptions of its fields stand in the prompt.
        rows: (text, record) pairs, or a JSONL, JSON or CSV file with the fields `text` and `record` (an object, or its
            JSON as text).
        name: Of the task.
        instructions: What the program is told.
        whole: Whether only records that are right in every field score (`whole_record`), or each field does
            (`record_score`).
        seed: Chooses the rows; the same seed gives the same rows on every machine.
        sizes: Training, validation and test rows.

    Raises:
        TaskError: The file cannot be read, a record does not fit the model, or there are fewer rows than asked for.
    """
    import dspy

    pairs = _read(Path(rows), model, name) if isinstance(rows, (str, Path)) else list(rows)
    splits = draw_groups(
        pairs,
        lambda pair: pair[0],
        {"test": sizes[2], "train": sizes[0], "val": sizes[1]},  # test rows stay when others change
        rng=np.random.default_rng(seed),
        task=name,
    )
    fields = {"text": (str, dspy.InputField()), "record": (model, dspy.OutputField())}
    trainset, valset, testset = (
        [dspy.Example(text=text, record=record).with_inputs("text") for text, record in splits[split]]
        for split in ("train", "val", "test")
    )
    return Task(
        name,
        dspy.Predict(dspy.Signature(fields, instructions)),
        whole_record if whole else record_score,
        trainset,
        valset,
        testset,
        description=f"a record ({', '.join(model.model_fields)}) out of a text",
    )


def _read(path: Path, model: type[BaseModel], task: str) -> list[tuple[str, BaseModel]]:
    pairs = []
    for number, row in enumerate(read_rows(path, task=task, fields=("text", "record")), 1):
        record = row["record"]
        try:
            valid = model.model_validate(record) if isinstance(record, dict) else model.model_validate_json(record)
        except ValueError as error:
            raise TaskError(
                f"{task}: {path}: the record of row {number} does not fit {model.__name__}: {error}"
            ) from error
        pairs.append((str(row["text"]), valid))
    return pairs


def _plain(record: Any) -> Any:
    return record.model_dump(mode="json") if hasattr(record, "model_dump") else record


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _score(gold: Any, said: Any) -> float:
    if isinstance(gold, Mapping) and isinstance(said, Mapping):
        return float(np.mean([_score(value, said.get(name)) for name, value in gold.items()])) if gold else 1.0
    if isinstance(gold, list) and isinstance(said, list):
        from scipy.optimize import linear_sum_assignment

        if not gold or not said:
            return float(gold == said)
        pairs = np.array([[_score(one, other) for other in said] for one in gold])
        return float(pairs[linear_sum_assignment(-pairs)].sum() / max(pairs.shape))
    if isinstance(gold, str) and isinstance(said, str):
        return float(" ".join(gold.casefold().split()) == " ".join(said.casefold().split()))
    if (
        isinstance(gold, (int, float))
        and isinstance(said, (int, float))
        and isinstance(gold, bool) == isinstance(said, bool)
    ):
        return float(abs(gold - said) <= 1e-9 * max(1.0, abs(gold)))
    return float(gold is None and said is None)
