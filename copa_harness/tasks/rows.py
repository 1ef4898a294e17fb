"""Where a task's rows come from, and how they are drawn: files, public data sets, splits without a row in common.

`datasets` is imported when a public data set is asked for, not before.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from copa_harness.errors import TaskError

Row = TypeVar("Row")


def read_rows(path: Path, *, task: str, fields: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of a JSONL, JSON (a list of objects), CSV (with a header) or Parquet file, in the file's order.

    Args:
        path: Its ending says which; anything but `.csv`, `.json` and `.parquet` is read as JSONL.
        task: Named in errors.
        fields: What every row must have.

    Raises:
        TaskError: The file cannot be read or is of another form, or a row lacks a field.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            return _checked_rows(_parquet(path, task=task), path, task=task, fields=fields)
        with path.open(encoding="utf-8-sig", newline="") as file:
            if kind == ".csv":
                rows: Any = _csv(file)
            elif kind == ".json":
                rows = json.load(file)
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except OSError as error:
        raise TaskError(f"{task}: cannot read {path} ({error.strerror or error}); expected a file of rows") from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise TaskError(f"{task}: {path} cannot be parsed ({error}); expected .jsonl, .json or .csv rows") from error
    return _checked_rows(rows, path, task=task, fields=fields)


def _csv(file: Iterable[str]) -> list[dict[str, Any]]:
    reader = csv.DictReader(file, strict=True)
    names = list(reader.fieldnames or ())
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the header names {', '.join(twice)} twice")
    rows = list(reader)
    for number, row in enumerate(rows, 1):
        if None in row:
            raise ValueError(f"row {number} has more cells than the header")
    return rows


def _parquet(path: Path, *, task: str) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise TaskError(
            f"{task}: {path} needs the package pyarrow; remedy: pip install 'copa-harness[tasks]'"
        ) from error
    try:
        return read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(error) from error


def _checked_rows(rows: Any, path: Path, *, task: str, fields: Iterable[str]) -> list[dict[str, Any]]:
    fields = tuple(fields)
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        missing = [name for name in fields if row.get(name) is None] if isinstance(row, dict) else fields
        if missing or not isinstance(rows, list):
            got = f"row {number} lacks {', '.join(missing)}" if missing else f"one {type(rows).__name__}"
            raise TaskError(f"{task}: {path}: got {got}; expected rows with the fields {', '.join(fields)}")
    return rows  # type: ignore[no-any-return]


def from_hub(name: str, config: str | None, *, task: str, file: str) -> Any:
    """A public data set, split by split, from the cache of `datasets` or the network.

    `task` and `file`, which says which file does as well and how it is named, are for the error.

    Raises:
        TaskError: `datasets` is not installed, or the data set is neither cached nor reachable.
    """
    ways = f"expected a file: {file}; or `pip install datasets` and a network"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TaskError(f"{task}: no file was named, and the package datasets is not installed; {ways}") from error
    try:
        return load_dataset(name, config)
    except Exception as error:
        raise TaskError(f"{task}: {name} could not be loaded ({type(error).__name__}: {error}); {ways}") from error


def draw_evenly(
    rows: Sequence[tuple[str, str]],
    labels: Sequence[str],
    n_rows: int,
    *,
    seen: set[str],
    rng: np.random.Generator,
    what: str,
) -> list[tuple[str, str]]:
    """So many (text, label) rows, the labels taken in turn, in random order.

    Texts in `seen` are out, and those drawn now are added; `what` is named in the error, for instance `clinc150:
    test`.

    Raises:
        TaskError: There are fewer.
    """
    by_label: dict[str, list[tuple[str, str]]] = {label: [] for label in labels}
    for text, label in rows:
        if label in by_label and text.casefold() not in seen:
            by_label[label].append((text, label))
    for found in by_label.values():
        rng.shuffle(found)
    drawn: list[tuple[str, str]] = []
    while len(drawn) < n_rows and any(by_label.values()):
        for label in labels:
            while by_label[label] and len(drawn) < n_rows:
                text, label_of_row = by_label[label].pop()
                if text.casefold() not in seen:
                    seen.add(text.casefold())
                    drawn.append((text, label_of_row))
                    break
    if len(drawn) < n_rows:
        raise TaskError(f"{what}: asked for {n_rows} rows of {len(labels)} labels; there are {len(drawn)}")
    return [drawn[i] for i in rng.permutation(len(drawn))]


def draw_groups(
    rows: Sequence[Row],
    group_of: Callable[[Row], Hashable],
    sizes: Mapping[str, int],
    *,
    rng: np.random.Generator,
    task: str,
) -> dict[str, list[Row]]:
    """Splits of the given sizes in which no group of rows lies in two; a group that does not fit is passed over.

    Splits are drawn in the order given, so the first stays when the sizes of others change.

    Raises:
        TaskError: There are too few rows.
    """
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    waiting = [list(groups.values())[i] for i in rng.permutation(len(groups))]
    splits: dict[str, list[Row]] = {}
    for split, size in sizes.items():
        drawn: list[Row] = []
        rest = []
        for group in waiting:
            if len(drawn) + len(group) <= size:
                drawn += group
            else:
                rest.append(group)
        if size < 1 or len(drawn) < size:
            raise TaskError(f"{task}: asked for {size} {split} rows; expected 1 to {len(drawn)}, which are left")
        splits[split], waiting = drawn, rest
    return splits
