"""GSM8K: grade-school word problems with a number as the answer, solved by chain of thought.

Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems" (arXiv 2110.14168), MIT licence. Nothing is shipped:
`gsm8k(path=...)` reads the authors' JSONL (https://github.com/openai/grade-school-math), and without a path
`openai/gsm8k` is loaded by `datasets`. DSPy is imported when the task is made, not before.
"""

from __future__ import annotations

import os
import re
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from copa_harness.errors import TaskError
from copa_harness.tasks.rows import draw_groups, from_hub, read_rows
from copa_harness.tasks.task import Task

if TYPE_CHECKING:
    import dspy

FILE_VARIABLE = "COPA_GSM8K"
"""Environment variable with the path of the folder or file, where no path is given."""

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>-?)\$?(?P<sign2>-?)(?:(?P<whole>\d+) (?=\d+/\d))?(?P<top>{_DIGITS})(?:/(?P<below>\d+))?"
)
_CALCULATION = re.compile(r"<<.*?>>")


def last_number(text: object) -> Fraction | None:
    """The last number in a text, exactly; None when there is none.

    Thousands may have commas; dollars, units and percent signs are not looked at; `3/4` and `1 3/4` are fractions.
    A digit inside a word (m2, CO2) is no number.
    """
    found = None
    for match in _NUMBER.finditer(str(text).replace("\u2212", "-")):
        if below := int(match["below"] or 1):
            value = int(match["whole"] or 0) + Fraction(match["top"].replace(",", "")) / below
            found = -value if match["sign"] or match["sign2"] else value
    return found


def same_number(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    """1.0 when the last numbers of both answers are equal, a millionth aside; else 0.0."""
    said, gold = last_number(prediction.answer), last_number(example.answer)
    return float(said is not None and gold is not None and abs(said - gold) <= abs(gold) / 1_000_000)


def gsm8k(
    path: Path | str | None = None,
    *,
    seed: int = 0,
    n_train: int = 60,
    n_val: int = 30,
    n_test: int = 100,
    rationales: bool = True,
) -> Task:
    """The number that answers a word problem; one predictor, which reasons first.

    Training and validation rows come from the data set's training split, test rows from its test split.

    Args:
        path: A folder with `train.jsonl` and `test.jsonl`, or one file that all three splits are drawn from; by default
            what the environment variable `COPA_GSM8K` names, else `openai/gsm8k` by `datasets`.
        seed: Chooses the rows; the same seed gives the same rows on every machine.
        n_train: Training rows.
        n_val: Validation rows.
        n_test: Test rows.
        rationales: Whether rows hold the written solutions as `reasoning`, for demonstrations and weights to learn
            from; without them both learn from the program's own passing traces, as in BetterTogether (Soylu et al.
            2024, arXiv 2407.10930).

    Raises:
        TaskError: The data cannot be had or read, or there are fewer rows than asked for.
    """
    import dspy

    rng = np.random.default_rng(seed)
    rows = _rows(path or os.environ.get(FILE_VARIABLE))
    drawn: dict[str, list[tuple[str, str]]] = {}
    for pool, sizes in (("test", {"test": n_test}), ("train", {"train": n_train, "val": n_val})):
        taken = {question for one in drawn.values() for question, _ in one}
        free = [row for row in rows[pool] if row[0] not in taken]
        drawn |= draw_groups(free, lambda row: row[0], sizes, rng=rng, task="gsm8k")

    def example(question: str, solution: str) -> dspy.Example:
        reasoning, _, answer = _CALCULATION.sub("", solution).rpartition("####")
        known = {"reasoning": reasoning.strip()} if rationales and reasoning.strip() else {}
        return dspy.Example(question=question, **known, answer=answer.strip()).with_inputs("question")

    splits = {split: [example(*row) for row in found] for split, found in drawn.items()}
    program = dspy.ChainOfThought(
        dspy.Signature(
            {
                "question": (str, dspy.InputField()),
                "answer": (str, dspy.OutputField(desc="a number alone")),
            },
            "Solve the word problem step by step.",
        )
    )
    description = "the number that answers a word problem"
    return Task("gsm8k", program, same_number, splits["train"], splits["val"], splits["test"], description=description)


def _rows(path: Path | str | None) -> dict[str, list[tuple[str, str]]]:
    """(question, solution) of the pools `train` and `test`; of a single file both are the whole."""
    fields = ("question", "answer")
    if path is None or path == "":
        ways = f"path=... or the environment variable {FILE_VARIABLE} with the authors' train.jsonl and test.jsonl"
        pools = from_hub("openai/gsm8k", "main", task="gsm8k", file=ways)
    elif (folder := Path(path)).is_dir():
        pools = {name: read_rows(folder / f"{name}.jsonl", task="gsm8k", fields=fields) for name in ("train", "test")}
    else:
        pools = dict.fromkeys(("train", "test"), read_rows(folder, task="gsm8k", fields=fields))
    rows = {name: [(str(row["question"]), str(row["answer"])) for row in pools[name]] for name in ("train", "test")}
    for question, solution in (pair for pool in rows.values() for pair in pool):
        if last_number(solution) is None:
            raise TaskError(f"gsm8k: got a solution without a number: {solution[:160]!r} of {question[:80]!r}")
    return rows
