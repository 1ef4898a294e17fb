"""A task out of rows: `Task.from_file` and `Task.from_hub`.

Rows become examples whose ids are hashes of their content. They are split three ways by a hash too, not by their place:
a row stays where it is, or near, when others are added or the file is sorted. Rows of one group, and rows with equal
inputs, lie in one split; labels have the same share in all three.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Any, Literal

from copa_harness.errors import TaskError
from copa_harness.tasks.rows import from_hub, read_rows

FORMATS = (".csv", ".jsonl", ".json", ".parquet")

DEFAULT_SPLIT = (0.4, 0.2, 0.4)
"""Shares of training, validation and test rows."""

MOST_LABELS = 50
"""Different outputs, at most; more of them, or such that occur once, are no labels."""

_NAMES = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2}

Row = Mapping[str, Any]
Split = Sequence[float] | str | None


@dataclass(frozen=True, slots=True)
class Same:
    """The metric of such a task: 1.0 when the predicted output is the example's, letter case and outer spaces aside."""

    output: str

    def __call__(self, example: Any, prediction: Any, trace: Any = None) -> float:
        """Score one prediction."""
        given, expected = getattr(prediction, self.output, None), example[self.output]
        if isinstance(given, str) or isinstance(expected, str):
            return float(str(given).strip().casefold() == str(expected).strip().casefold())
        return float(given == expected)


def task_of_file(path: Path | str, **columns: Any) -> dict[str, Any]:
    """The arguments of a `Task` over a file; see `Task.from_file`."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise TaskError(f"{path.stem}: got the file {path}; expected one that ends in {', '.join(FORMATS)}")
    needed = needed_columns(path.stem, **columns)
    rows = read_rows(path, task=path.stem, fields=needed)
    return task_of_rows(path.stem, rows, source=path.name, **columns)


def task_of_hub(dataset: str, **columns: Any) -> dict[str, Any]:
    """The arguments of a `Task` over a public data set; see `Task.from_hub`."""
    place, _, config = dataset.partition(":")
    name = re.sub(r"\W+", "_", place.rstrip("/").rpartition("/")[2])
    needed = needed_columns(name, **columns)
    loaded = from_hub(place, config or None, task=name, file="Task.from_file(...)")
    rows: list[dict[str, Any]] = []
    for split, part in loaded.items():
        if lacking := [column for column in needed if column not in (*part.column_names, "split")]:
            raise TaskError(
                f"{name}: {dataset} has no column {', '.join(lacking)}; it has {', '.join(part.column_names)}"
            )
        names = {column: getattr(part.features[column], "names", ()) for column in part.column_names}
        rows += [
            {"split": split} | {key: names[key][value] if names[key] else value for key, value in row.items()}
            for row in part
        ]
    if columns["split"] is None and {_NAMES.get(split) for split in loaded} >= {0, 1, 2}:
        columns["split"] = "split"
    return task_of_rows(name, rows, source=dataset, **columns)


def needed_columns(
    name: str,
    *,
    inputs: str | Sequence[str],
    output: str,
    group: str | None = None,
    split: Split = None,
    **_: Any,
) -> tuple[str, ...]:
    """The columns a task needs.

    Raises:
        TaskError: They are not names of fields, or one is named twice.
    """
    fields = [*_listed(inputs), output]
    for field in fields:
        if not isinstance(field, str) or not field.isidentifier() or iskeyword(field) or field.startswith("_"):
            raise TaskError(
                f"{name}: got {field!r} as an input or output; expected a column that can be a field of a signature: "
                "letters, digits and underscores; rename it in the file"
            )
    if len(set(fields)) < len(fields) or not _listed(inputs):
        raise TaskError(f"{name}: got inputs={inputs!r} and output={output!r}; expected different columns")
    return tuple(dict.fromkeys([*fields, *([group] if group else []), *([split] if isinstance(split, str) else [])]))


def task_of_rows(
    name: str,
    rows: Sequence[Row],
    *,
    source: str,
    inputs: str | Sequence[str],
    output: str,
    group: str | None,
    split: Split,
    **more: Any,
) -> dict[str, Any]:
    """The arguments of a `Task` over rows that come from `source`; the rest as in `Task.from_file`.

    Raises:
        TaskError: There are too few rows, or what is asked for does not fit them.
    """
    import dspy

    inputs = tuple(_listed(inputs))
    for number, row in enumerate(rows, 1):
        if empty := [
            one for one in (output, *([group] if group else ())) if row[one] in ("", None) or row[one] != row[one]
        ]:
            raise TaskError(
                f"{name}: row {number} of {source} has no {', '.join(empty)}; expected a value in every row"
            )
    labels = labels_of([row[output] for row in rows])
    parts = _parts(name, rows, inputs, output if labels else None, group=group, split=split, seed=more["seed"])
    kept = (*inputs, output, *([group] if group and group not in (*inputs, output) else ()))
    examples = [
        [dspy.Example(**{key: row[key] for key in kept}).with_inputs(*inputs) for row in part] for part in parts
    ]
    content = json.dumps([[{key: row[key] for key in kept} for row in part] for part in parts], default=str)
    digest = hashlib.sha256(content.encode("utf-8", "backslashreplace")).hexdigest()
    sizes = " + ".join(str(len(part)) for part in parts)
    return {
        "name": name,
        "program": more["program"] or _program(name, inputs, output, labels, rows),
        "metric": more["metric"] or Same(output),
        **dict(zip(("trainset", "valset", "testset"), examples, strict=True)),
        "group": group,
        "source": f"{source}: {sizes} rows, sha256 {digest[:12]}",
    }


def labels_of(values: Sequence[Any]) -> tuple[str, ...]:
    """The labels that outputs are, sorted; empty if they are something else."""
    counts = Counter(values) if all(isinstance(value, str) for value in values) else Counter()
    is_labels = 2 <= len(counts) <= MOST_LABELS and min(counts.values()) >= 2
    return tuple(sorted(counts)) if is_labels else ()


def _program(name: str, inputs: Sequence[str], output: str, labels: Sequence[str], rows: Sequence[Row]) -> Any:
    import dspy

    fields: dict[str, Any] = {key: (_type([row[key] for row in rows]), dspy.InputField()) for key in inputs}
    kind = Literal[tuple(labels)] if labels else _type([row[output] for row in rows])
    try:
        return dspy.Predict(dspy.Signature({**fields, output: (kind, dspy.OutputField())}))
    except (ValueError, TypeError, NameError) as error:
        raise TaskError(
            f"{name}: {', '.join((*inputs, output))} cannot be the fields of a signature: {error}"
        ) from error


def _type(values: Sequence[Any]) -> Any:
    kinds = {type(value) for value in values}
    return kinds.pop() if len(kinds) == 1 and kinds <= {str, int, float, bool, list, dict} else str


def _parts(
    name: str,
    rows: Sequence[Row],
    inputs: Sequence[str],
    label: str | None,
    *,
    group: str | None,
    split: Split,
    seed: int,
) -> list[list[Row]]:
    """Training, validation and test rows."""
    parts: list[list[Row]]
    if isinstance(split, str):
        parts = [[], [], []]
        for number, row in enumerate(rows, 1):
            place = _NAMES.get(str(row[split]).strip().lower())
            if place is None:
                raise TaskError(f"{name}: row {number} has {row[split]!r} as {split}; expected train, val or test")
            parts[place].append(row)
    else:
        shares = tuple(DEFAULT_SPLIT if split is None else split)
        if len(shares) != 3 or not all(isinstance(one, (int, float)) and one > 0 for one in shares):
            raise TaskError(
                f"{name}: got split={split!r}; expected shares of training, validation and test rows, such as "
                f"{DEFAULT_SPLIT}, or the column that says train, val or test"
            )
        group_of = None if group is None else lambda row: _text(row[group])
        groups = grouped(rows, lambda row: _text([row[key] for key in inputs]), group_of)
        parts = split_evenly(groups, shares, label_of=lambda row: row[label] if label else "", seed=seed)
    if not all(parts):
        sizes = " + ".join(str(len(part)) for part in parts)
        raise TaskError(
            f"{name}: got {len(rows)} rows, which make {sizes} training, validation and test rows; expected at least "
            "one each: more rows (or groups), or other shares in split="
        )
    return parts


def grouped(
    rows: Sequence[Row], content_of: Callable[[Row], Hashable], group_of: Callable[[Row], Hashable] | None
) -> list[list[Row]]:
    """Rows that must not be parted: of one group, or of equal content, or joined by both."""
    parent: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for row in rows:
        if group_of is not None:
            parent[root(("content", content_of(row)))] = root(("group", group_of(row)))
    found: dict[Hashable, list[Row]] = {}
    for row in rows:
        found.setdefault(root(("content", content_of(row))), []).append(row)
    return list(found.values())


def split_evenly(
    groups: Sequence[Sequence[Row]], shares: Sequence[float], *, label_of: Callable[[Row], Any], seed: int
) -> list[list[Row]]:
    """Three lists of rows in these shares, of all and of every label, that keep groups together.

    `groups` are rows that must not be parted, and `label_of` says what has its share in all three; shares need not
    sum to 1.
    """
    keyed = []
    for rows in groups:
        label = Counter(map(label_of, rows)).most_common(1)[0][0]
        content = "\n".join(sorted(map(_text, rows)))
        keyed.append(
            (str(label), hashlib.sha256(f"{seed}\n{content}".encode("utf-8", "backslashreplace")).digest(), rows)
        )
    shares = [one / sum(shares) for one in shares]
    parts: list[list[Row]] = [[], [], []]
    n_all = 0
    by_label: dict[str, list[int]] = {}
    for label, _, rows in sorted(keyed, key=lambda one: one[:2]):
        counts, n_all = by_label.setdefault(label, [0, 0, 0]), n_all + len(rows)
        n_label = sum(counts) + len(rows)
        # Whoever lacks most rows takes the next ones, of this label and of all together.
        owed = [
            round(share * n_label - count + share * n_all - len(part), 9)
            for share, count, part in zip(shares, counts, parts, strict=True)
        ]
        place = owed.index(max(owed))
        counts[place] += len(rows)
        parts[place] += rows
    return parts


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
