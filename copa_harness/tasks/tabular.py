"""Three real tasks from scikit-learn's bundled data: Iris, Wine and Breast Cancer as text classification.

Every row becomes a `dspy.Example` of printed numbers and a label word. Splits are three-way, stratified and seeded;
rows that print alike never lie in two splits. Nothing is downloaded. scikit-learn and DSPy are imported when a task is
made, not before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from copa_harness.errors import TaskError
from copa_harness.tasks.task import Task

if TYPE_CHECKING:
    import dspy
    from numpy.typing import NDArray

Form = Literal["fields", "single"]
"""`fields`: one input field per column. `single`: one field `features` with `name=value` pairs."""

DEFAULT_FORM: Form = "fields"

N_TRAIN, N_VAL, N_TEST = 50, 25, 75
N_FEATURES = 4


def exact_match(
    example: dspy.Example, prediction: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None
) -> float:
    """1.0 when the predicted answer is the example's, letter case and outer spaces aside; else 0.0."""
    return float(str(prediction.answer).strip().casefold() == str(example.answer).strip().casefold())


def iris(
    seed: int = 0, *, form: Form | None = None, n_train: int = N_TRAIN, n_val: int = N_VAL, n_test: int = N_TEST
) -> Task:
    """The species of an iris flower from its petal and sepal dimensions (Fisher, 1936; 150 rows, 3 classes).

    The four columns are printed as measured, in cm with one decimal.

    Args:
        seed: Chooses the split; the same seed gives the same rows on every machine.
        form: How inputs are laid out, see `Form`.
        n_train: Training rows.
        n_val: Validation rows.
        n_test: Test rows; fewer when fewer remain.
    """
    from sklearn.datasets import load_iris

    table = read_table(load_iris(), ("setosa", "versicolor", "virginica"))
    return _task(
        table.columns(("petal_length", "petal_width", "sepal_length", "sepal_width")),
        name="iris",
        instructions="Given the petal and sepal dimensions in cm, predict the iris species.",
        seed=seed,
        form=form,
        sizes=(n_train, n_val, n_test),
        rescale=False,
    )


def wine(
    seed: int = 0, *, form: Form | None = None, n_train: int = N_TRAIN, n_val: int = N_VAL, n_test: int = N_TEST
) -> Task:
    """The grape a wine was made from, by its chemical analysis (Forina; 178 rows, 3 classes).

    Of the 13 columns the 4 with the largest ANOVA F on the training rows are kept. Each is scaled to 0.0-9.9
    by the minimum and maximum of the training rows (values outside are clipped) and printed with one decimal.

    Arguments as for `iris`.
    """
    from sklearn.datasets import load_wine

    return _task(
        read_table(load_wine(), ("barolo", "grignolino", "barbera")),
        name="wine",
        instructions="Given the chemical analysis of a wine, each value scaled to 0-9.9, predict its grape.",
        seed=seed,
        form=form,
        sizes=(n_train, n_val, n_test),
        rescale=True,
    )


def breast_cancer(
    seed: int = 0, *, form: Form | None = None, n_train: int = N_TRAIN, n_val: int = N_VAL, n_test: int = N_TEST
) -> Task:
    """Whether a breast tumour is malignant, by its cell nuclei (Wolberg, 1993; 569 rows, 2 classes).

    Of the 30 columns the 4 with the largest ANOVA F on the training rows are kept. Each is scaled to 0.0-9.9
    by the minimum and maximum of the training rows (values outside are clipped) and printed with one decimal.

    Arguments as for `iris`.
    """
    from sklearn.datasets import load_breast_cancer

    return _task(
        read_table(load_breast_cancer(), ("malignant", "benign")),
        name="breast_cancer",
        instructions="Given measurements of the cell nuclei, each scaled to 0-9.9, predict whether the tumour is "
        "malignant or benign.",
        seed=seed,
        form=form,
        sizes=(n_train, n_val, n_test),
        rescale=True,
    )


@dataclass(frozen=True, slots=True)
class Table:
    """Rows as numbers: `values` [n_rows, n_columns], `classes` [n_rows] indexing `labels`."""

    names: tuple[str, ...]
    values: NDArray[np.float64]
    classes: NDArray[np.int64]
    labels: tuple[str, ...]

    def columns(self, names: Sequence[str]) -> Table:
        """The same rows with these columns only, in this order."""
        indices = [self.names.index(name) for name in names]
        return Table(tuple(names), self.values[:, indices], self.classes, self.labels)


def read_table(bunch: Any, labels: tuple[str, ...]) -> Table:
    """One of scikit-learn's bundled data sets, its columns under names that can be fields."""
    names = tuple(re.sub(r"\W+", "_", str(name).replace(" (cm)", "")).strip("_") for name in bunch.feature_names)
    return Table(names, np.asarray(bunch.data, dtype=np.float64), np.asarray(bunch.target, dtype=np.int64), labels)


def _task(
    table: Table,
    *,
    name: str,
    instructions: str,
    seed: int,
    form: Form | None,
    sizes: tuple[int, int, int],
    rescale: bool,
) -> Task:
    form = DEFAULT_FORM if form is None else form
    if form not in ("fields", "single"):
        raise TaskError(f"form: got {form!r}, expected 'fields' or 'single'.")
    if min(sizes) < 1:
        raise TaskError(f"n_train, n_val, n_test: got {sizes}, expected at least one row each.")
    raw = [tuple(row) for row in table.values.tolist()]
    train, val, test, spare = draw_splits(raw, table.classes, sizes=sizes, rng=np.random.default_rng(seed))
    table, values = _selected_and_scaled(table, train) if rescale else (table, table.values)
    printed = [tuple(f"{value:.1f}" for value in row) for row in values.tolist()]
    val, test = without_lookalikes(printed, table.classes, train, val, test, spare)
    program, example = _layout(table, form, instructions=instructions)
    trainset, valset, testset = (
        [example(printed[row], table.labels[table.classes[row]]) for row in rows] for rows in (train, val, test)
    )
    return Task(name, program, exact_match, trainset, valset, testset, description=instructions)


def draw_splits(
    raw: Sequence[tuple[float, ...]],
    classes: NDArray[np.int64],
    *,
    sizes: tuple[int, int, int],
    rng: np.random.Generator,
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Row numbers of train, val, test and what is left, each stratified, equal rows kept together.

    Test rows are drawn first, so they stay the same when fewer rows are labelled.
    """
    groups: dict[tuple[float, ...], list[int]] = {}
    for row, content in enumerate(raw):
        groups.setdefault(content, []).append(row)
    shuffled = [list(groups.values())[i] for i in rng.permutation(len(groups))]
    waiting = sorted(shuffled, key=lambda rows: -len(rows))  # stable: big groups first, while they still fit
    n_train, n_val, n_test = sizes
    if n_train + n_val >= len(raw):
        raise TaskError(f"got {n_train} training and {n_val} validation rows of {len(raw)}; none is left to test on.")
    test, waiting = _draw(waiting, classes, min(n_test, len(raw) - n_train - n_val))
    train, waiting = _draw(waiting, classes, n_train)
    val, waiting = _draw(waiting, classes, n_val)
    return train, val, test, [row for rows in waiting for row in rows]


def _draw(groups: list[list[int]], classes: NDArray[np.int64], n: int) -> tuple[list[int], list[list[int]]]:
    """`n` rows with the classes in the proportions they have in `groups`, and the groups not drawn."""
    counts = np.bincount([classes[row] for rows in groups for row in rows], minlength=int(classes.max()) + 1)
    shares = n * counts / counts.sum()
    room = np.floor(shares).astype(int)
    room[np.argsort(room - shares, kind="stable")[: n - room.sum()]] += 1  # largest remainders
    drawn: list[int] = []
    rest: list[list[int]] = []
    for rows in groups:
        wanted = np.bincount(classes[rows], minlength=len(room))
        if (wanted <= room).all():
            room -= wanted
            drawn.extend(rows)
        else:
            rest.append(rows)
    return drawn, rest


def _selected_and_scaled(table: Table, train: list[int]) -> tuple[Table, NDArray[np.float64]]:
    """The columns with the largest ANOVA F on the training rows, scaled to 0.0-9.9 by those rows."""
    from sklearn.feature_selection import f_classif

    f_values, _ = f_classif(table.values[train], table.classes[train])
    best = np.sort(np.argsort(-f_values, kind="stable")[:N_FEATURES])
    table = table.columns([table.names[i] for i in best])
    return table, scaled_by(table.values, train)


def scaled_by(values: NDArray[np.float64], train: list[int]) -> NDArray[np.float64]:
    """The columns scaled to 0.0-9.9 by the minimum and maximum of the training rows, values outside clipped."""
    low, high = values[train].min(axis=0), values[train].max(axis=0)
    scaled: NDArray[np.float64] = np.clip((values - low) / (high - low), 0.0, 1.0) * 9.9
    return scaled


def without_lookalikes(
    printed: Sequence[tuple[str, ...]],
    classes: NDArray[np.int64],
    train: list[int],
    val: list[int],
    test: list[int],
    spare: list[int],
) -> tuple[list[int], list[int]]:
    """Validation and test rows with every row that prints like one of another split exchanged for a spare one.

    Rounding can make different rows print alike. Without a fitting spare row the row is left out.
    """
    taken = {printed[row]: "train" for row in train}
    unused = list(spare)
    kept: dict[str, list[int]] = {"val": [], "test": []}
    for split, rows in (("val", val), ("test", test)):
        for row in rows:
            candidates: Iterable[int] = (row, *(other for other in unused if classes[other] == classes[row]))
            for candidate in candidates:
                if taken.setdefault(printed[candidate], split) == split:
                    kept[split].append(candidate)
                    if candidate != row:
                        unused.remove(candidate)
                    break
    return kept["val"], kept["test"]


def _layout(
    table: Table, form: Form, *, instructions: str
) -> tuple[dspy.Module, Callable[[tuple[str, ...], str], dspy.Example]]:
    """The program for this form and the function that makes its examples from printed numbers and a label."""
    import dspy

    names = table.names if form == "fields" else ("features",)
    *others, last = table.labels
    labels = f"{', '.join(others)}{',' if len(others) > 1 else ''} or {last}"
    fields: dict[str, tuple[type, Any]] = {field: (str, dspy.InputField()) for field in names}
    fields["answer"] = (str, dspy.OutputField(desc=labels))

    def example(numbers: tuple[str, ...], label: str) -> dspy.Example:
        pairs = dict(zip(table.names, numbers, strict=True))
        inputs = pairs if form == "fields" else {"features": ", ".join(f"{k}={v}" for k, v in pairs.items())}
        return dspy.Example(**inputs, answer=label).with_inputs(*names)

    return dspy.Predict(dspy.Signature(fields, instructions)), example
