"""Text classification from a file: one column of text, one of labels (Banking77, and whatever looks like it).

    classification("train.csv", test_path="test.csv", text="text", label="category")

The program is one predictor, `text -> label`, typed with the labels in question, so answers can be constrained. DSPy is
imported when the task is made, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from copa_harness.errors import TaskError
from copa_harness.tasks.rows import draw_evenly, read_rows
from copa_harness.tasks.task import Task

if TYPE_CHECKING:
    import dspy


def same_label(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    """1.0 when the predicted label is the example's, letter case and outer spaces aside; else 0.0."""
    return float(str(prediction.label).strip().casefold() == str(example.label).casefold())


def classification(
    path: Path | str,
    *,
    columns: tuple[str, str] = ("text", "label"),
    labels: int | Sequence[str] | None = None,
    test_path: Path | str | None = None,
    instructions: str = "Say which label fits the text.",
    seed: int = 0,
    sizes: tuple[int, int, int] = (40, 24, 60),
) -> Task:
    """The label of a text, one of those in the file.

    Rows are drawn as evenly over the labels as they can be, and no text is in two splits.

    Args:
        path: CSV with a header, JSONL, or JSON with a list of objects; the task is named after it.
        columns: Which column or field is the text, and which the label.
        labels: Which labels, by name, or the first so many in alphabetical order; by default all.
        test_path: Where test rows come from, if not from `path`.
        instructions: What the program is told.
        seed: Chooses the rows; the same seed gives the same rows on every machine.
        sizes: Training, validation and test rows.

    Raises:
        TaskError: A file cannot be read, a label is unknown, or there are fewer rows than asked for.
    """
    import dspy

    path, name = Path(path), Path(path).stem
    rows = _pairs(path, columns)
    test_rows = rows if test_path is None else _pairs(Path(test_path), columns)
    chosen = _labels(sorted({label for _, label in rows}), labels, name=name)
    rng, seen = np.random.default_rng(seed), set[str]()
    drawn = {}
    for split, pool, n in zip(("test", "train", "val"), (test_rows, rows, rows), (sizes[2], *sizes[:2]), strict=True):
        found = draw_evenly(pool, chosen, n, seen=seen, rng=rng, what=f"{name}: {split}")
        drawn[split] = [dspy.Example(text=text, label=label).with_inputs("text") for text, label in found]
    fields = {"text": (str, dspy.InputField()), "label": (Literal[chosen], dspy.OutputField())}
    return Task(
        name,
        dspy.Predict(dspy.Signature(fields, instructions)),
        same_label,
        drawn["train"],
        drawn["val"],
        drawn["test"],
        description=f"the label of a text, one of {len(chosen)}",
    )


def _pairs(path: Path, columns: tuple[str, str]) -> list[tuple[str, str]]:
    text, label = columns
    rows = read_rows(path, task=path.stem, fields=columns)
    return [(str(row[text]).strip(), str(row[label]).strip()) for row in rows]


def _labels(known: Sequence[str], wanted: int | Sequence[str] | None, *, name: str) -> tuple[str, ...]:
    chosen = known if wanted is None else known[:wanted] if isinstance(wanted, int) else sorted(set(wanted))
    if unknown := sorted(set(chosen) - set(known)):
        raise TaskError(f"{name}: unknown labels {', '.join(unknown)}; expected some of {', '.join(known)}")
    if len(chosen) < 2 or (isinstance(wanted, int) and wanted > len(known)):
        raise TaskError(f"{name}: got labels={wanted!r}; expected 2 to {len(known)}, or a list of names")
    return tuple(chosen)
