"""What a suite is about: one program, one metric, three splits.

A `Task` is checked when it is made, so that a suite fails on its first line and not after an hour of optimization.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copa_harness.errors import TaskError
from copa_harness.formatting import visible

if TYPE_CHECKING:
    import dspy

SPLITS = ("trainset", "valset", "testset")
"""The splits in the order in which they may be looked at: the last one only by the final evaluation."""

_MAX_NAME = 100


@dataclass(frozen=True, slots=True)
class Task:
    """A program, how it is scored, and the examples to improve and to judge it on.

    Attributes:
        name: Short name, the first column of every table.
        program: The `dspy.Module` as written by hand. It is copied before anything changes it.
        metric: `metric(example, prediction, trace=None)`, a number in 0..1 (or a bool), higher is better.
        trainset: Labelled examples that demonstrations and fine-tuning rows are taken from.
        valset: Labelled examples that choose between candidates.
        testset: Labelled examples that only the final evaluation sees.
        finetune_data: Chat rows (`{"messages": [...]}`) to fine-tune on instead of rows made from `trainset`.
        description: One sentence for the report.
        source: Where the examples come from, with a hash of their content, for the record.
        group: Test examples that belong together (one speaker, one document) and are no independent evidence: the
            field that names the group, or a function of the example. Intervals and gates then count groups.
        slices: Parts of the test split that must not get worse on their own (languages, customers): the field that
            names an example's slice, or a function of the example.
        human: What people say of some answers, where the metric is a model's opinion: `human(example, prediction)`, a
            number in 0..1, or None where nobody rated that answer. The run is then told by people's scores, too.

    Raises:
        TaskError: A split is empty, an example names no inputs, lacks a field the program needs, or carries the
            same inputs as an example of another split; the program has no predictor; the metric cannot be called.
    """

    name: str
    program: dspy.Module
    metric: Callable[..., Any]
    trainset: Sequence[dspy.Example]
    valset: Sequence[dspy.Example]
    testset: Sequence[dspy.Example]
    finetune_data: Sequence[dict[str, Any]] | None = None
    description: str = ""
    group: str | Callable[[dspy.Example], Any] | None = None
    source: str = ""
    slices: str | Callable[[dspy.Example], Any] | None = None
    human: Callable[..., float | None] | None = None

    @classmethod
    def from_file(
        cls,
        path: Path | str,
        *,
        inputs: str | Sequence[str],
        output: str,
        group: str | None = None,
        split: Sequence[float] | str | None = None,
        program: dspy.Module | None = None,
        metric: Callable[..., Any] | None = None,
        seed: int = 0,
    ) -> Task:
        """A task over a file of rows, named after it.

        Args:
            path: A `.csv` with a header, `.jsonl`, `.json` (a list of objects) or `.parquet` file.
            inputs: Column or columns that the program is given.
            output: Column with the right answer.
            group: Column whose equal values belong together: such rows lie in one split, and gates count groups.
            split: Shares of training, validation and test rows, by default 0.4, 0.2 and 0.4, every label with its
                share in each; or the column that says `train`, `val` or `test`.
            program: By default one predictor, `inputs -> output`, typed with the labels where there are such.
            metric: By default whether the output is the row's, letter case and outer spaces aside.
            seed: Chooses the split.

        Raises:
            TaskError: The file cannot be read, a row lacks a value, or there are too few rows.
        """
        from copa_harness.tasks.from_rows import task_of_file

        given = {"inputs": inputs, "output": output, "group": group, "split": split}
        return cls(**task_of_file(path, **given, program=program, metric=metric, seed=seed))

    @classmethod
    def from_hub(cls, dataset: str, *, inputs: str | Sequence[str], output: str, **more: Any) -> Task:
        """A task over a data set of the Hugging Face hub, or a folder of that kind; needs the package `datasets`.

        Args:
            dataset: Its id, `owner/name` or `owner/name:configuration`. Where it has training, validation and test
                rows of its own and `split` is None, these are taken; as a column of rows they are called `split`.
            inputs: As in `from_file`.
            output: As in `from_file`; names of classes stand in place of their numbers.
            **more: `group`, `split`, `program`, `metric` and `seed`, as in `from_file`.

        Raises:
            TaskError: The data set cannot be had, a row lacks a value, or there are too few rows.
            TypeError: An argument that `from_file` does not have.
        """
        from copa_harness.tasks.from_rows import task_of_hub

        given = inspect.signature(cls.from_file).bind("", inputs=inputs, output=output, **more)
        given.apply_defaults()
        return cls(**task_of_hub(dataset, **given.kwargs))

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise TaskError(f"task name: got {self.name!r}, expected a short name such as 'iris'.")
        if visible(self.name) != self.name or len(self.name.splitlines()) > 1 or len(self.name) > _MAX_NAME:
            raise TaskError(
                f"task name: got {self.name!r}, expected one line of at most {_MAX_NAME} characters, none of them one "
                "that a terminal obeys or nobody sees."
            )
        for split in SPLITS:
            object.__setattr__(self, split, self._checked_split(split))
        self._check_metric()
        self._check_program()
        self._check_overlap()
        self._check_labels("group", self.group)
        self._check_labels("slices", self.slices)
        if self.human is not None and not callable(self.human):
            raise TaskError(
                f"task {self.name!r}: human is {self.human!r}; expected a function human(example, prediction) that "
                "gives what people said of that answer, a number in 0..1, or None. A field of the example cannot say "
                "it: the next program answers otherwise, and a new rating would count as changed data."
            )
        if self.finetune_data is not None:
            object.__setattr__(self, "finetune_data", self._checked_finetune_data(self.finetune_data))

    def _checked_split(self, split: str) -> tuple[dspy.Example, ...]:
        given: Iterable[dspy.Example] | None = getattr(self, split)
        if given is None or isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
            raise TaskError(
                f"task {self.name!r}: {split} is {type(given).__name__}; expected a sequence of dspy.Example."
            )
        examples = tuple(given)
        if not examples:
            raise TaskError(f"task {self.name!r}: {split} is empty; expected at least one dspy.Example.")
        for position, example in enumerate(examples):
            if not (hasattr(example, "inputs") and hasattr(example, "labels")):
                raise TaskError(
                    f"task {self.name!r}: {split}[{position}] is a {type(example).__name__}; expected a dspy.Example, "
                    f"for instance dspy.Example(question='...', answer='...').with_inputs('question')."
                )
            if not _inputs(example):
                raise TaskError(
                    f"task {self.name!r}: {split}[{position}] does not say which of its fields are inputs; "
                    f"call .with_inputs(...) on it. Its fields: {', '.join(example.keys()) or 'none'}."
                )
        return examples

    def _check_metric(self) -> None:
        if not callable(self.metric):
            raise TaskError(
                f"task {self.name!r}: metric is a {type(self.metric).__name__}; "
                f"expected a callable metric(example, prediction, trace=None)."
            )
        try:
            signature = inspect.signature(self.metric)
        except ValueError:
            return  # a builtin without a readable signature: the first call will tell
        if not any(_accepts(signature, n_arguments) for n_arguments in (2, 3, 4, 5)):
            name = getattr(self.metric, "__name__", type(self.metric).__name__)
            raise TaskError(
                f"task {self.name!r}: metric {name}{signature} cannot be called with an example and a prediction; "
                f"expected metric(example, prediction, trace=None)."
            )

    def _check_program(self) -> None:
        predictors = getattr(self.program, "named_predictors", None)
        if predictors is None or isinstance(self.program, type):
            got = self.program.__name__ if isinstance(self.program, type) else type(self.program).__name__
            raise TaskError(
                f"task {self.name!r}: program is {got}; expected an instance of dspy.Module, "
                f"for instance dspy.Predict('question -> answer')."
            )
        if not predictors():
            raise TaskError(
                f"task {self.name!r}: program {type(self.program).__name__} has no predictor, so there is nothing "
                f"to optimize; set at least one dspy.Predict in its __init__."
            )
        needed = _needed_fields(self.program)
        for split in SPLITS:
            for position, example in enumerate(getattr(self, split)):
                missing = [name for name in needed if name not in _inputs(example)]
                if missing:
                    raise TaskError(
                        f"task {self.name!r}: {split}[{position}] lacks the input field {missing[0]!r} that the "
                        f"program needs. Its inputs: {', '.join(_inputs(example))}; "
                        f"the program takes: {', '.join(needed)}."
                    )

    def _check_overlap(self) -> None:
        first_seen: dict[str, tuple[str, int]] = {}
        for split in SPLITS:
            for position, example in enumerate(getattr(self, split)):
                content = json.dumps(_inputs(example), sort_keys=True, default=repr)
                other, other_position = first_seen.setdefault(content, (split, position))
                if other != split:
                    raise TaskError(
                        f"task {self.name!r}: {split}[{position}] has the same inputs as {other}[{other_position}]: "
                        f"{content[:160]}. A score on seen rows says nothing; keep equal rows in one split."
                    )

    def _check_labels(self, name: str, given: Any) -> None:
        if given is None or callable(given):
            return
        if not isinstance(given, str):
            raise TaskError(
                f"task {self.name!r}: {name} is {given!r}; expected the name of a field or a function of examples."
            )
        for position, example in enumerate(self.testset):
            if given not in example:
                raise TaskError(
                    f"task {self.name!r}: testset[{position}] has no field {given!r} to take its {name} from. "
                    f"Its fields: {', '.join(example.keys())}."
                )

    def _checked_finetune_data(self, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
        for position, row in enumerate(rows):
            messages = row.get("messages") if isinstance(row, dict) else None
            if not messages or messages[-1].get("role") != "assistant":
                raise TaskError(
                    f"task {self.name!r}: finetune_data[{position}] is {str(row)[:120]}; expected "
                    f"{{'messages': [...]}} whose last message has the role 'assistant'."
                )
        if not rows:
            raise TaskError(f"task {self.name!r}: finetune_data is empty; leave it out or give at least one row.")
        return tuple(rows)


def _accepts(signature: inspect.Signature, n_arguments: int) -> bool:
    """Whether a callable of this signature takes so many positional arguments."""
    try:
        signature.bind(*range(n_arguments))
    except TypeError:
        return False
    return True


def _inputs(example: dspy.Example) -> dict[str, Any]:
    """The example's input fields; empty when it never said which they are."""
    if getattr(example, "_input_keys", None) is None:
        return {}
    return dict(example.inputs().items())


def _needed_fields(program: dspy.Module) -> tuple[str, ...]:
    """Input fields the program cannot do without, as far as they can be known without running it."""
    forward = getattr(type(program), "forward", None)  # on the class: DSPy warns when an instance's is read
    if forward is None:
        return ()
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty]
    takes_anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    predictors = program.predictors()
    if takes_anything and not named and len(predictors) == 1:
        return tuple(predictors[0].signature.input_fields)
    return tuple(named)
