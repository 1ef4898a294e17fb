"""What a prompt LM is shown of a task, in words: the data, the steps of the program, demonstrations; and its answer.

Everything is made by counting, without a model. A step sees its own fields only, and who writes its instruction must
know more: what goes into the whole program, what has to come out, and what the other steps are told.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

import dspy
import numpy as np

from copa_harness.evaluate.examples import input_values
from copa_harness.optimize.propose.schema import numbers_of, strata_of, stratified_order, text_of

MAX_SHOWN = 5
"""Mistakes shown to the writer at once."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One wrong answer as a predictor took part in it.

    Attributes:
        inputs: What the predictor was given.
        outputs: What it answered; empty when its answer did not parse.
        feedback: What the metric said, or the score and the right answer.
        ending: What the whole program answered, where that is not what the predictor did.
    """

    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    feedback: str
    ending: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """In words, every value shortened."""
        given, said, ending = map(_lines, (self.inputs, self.outputs, self.ending))
        after = f"the whole program then answered:\n{ending}\n" if ending else ""
        return f"inputs:\n{given}\nanswered:\n{said or '  nothing that parses'}\n{after}feedback: {self.feedback}"


MAX_VALUE = 300
"""Characters of one value that are shown."""

MAX_CATEGORIES = 12
"""Different values up to which all are listed."""

MAX_SEPARATING = 8
"""Numeric columns told apart by label, those that separate the labels most."""

_FENCED = re.compile(r"```[a-zA-Z]*\n?(.*?)```", re.DOTALL)

_LABEL = re.compile(r"^[\s*#]*(?:proposed |revised |new |improved )?instructions?(?:\*\*)?:[\s*]*", re.IGNORECASE)

_QUOTES = (('"', '"'), ("'", "'"), ("\u201c", "\u201d"), ("`", "`"))


def short(value: Any) -> str:
    """A value in words, cut where it is long, and saying so."""
    text = text_of(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]} ... ({len(text):,} characters)"


def step_text(name: str, signature: Any) -> str:
    """A predictor in words: name, fields, and what types and descriptions say about them."""
    head = f"{name}: {', '.join(signature.input_fields)} -> {', '.join(signature.output_fields)}"
    said = [
        f"  {field} ({', '.join(about)})" for field, info in signature.fields.items() if (about := _about(field, info))
    ]
    return "\n".join([head, *said])


def other_steps_text(predictor: str, signatures: Mapping[str, Any], instructions: Mapping[str, str]) -> str:
    """The other steps of the program with the instructions they have now; "" when there are none."""
    return "\n".join(
        f"{step_text(name, signature)}\n  its instruction: {instructions[name]}"
        for name, signature in signatures.items()
        if name != predictor
    )


def demos_text(demos: Iterable[Any], signature: Any) -> str:
    """One demonstration per line, the fields of the step alone."""
    return "\n".join(
        "; ".join(f"{key}={short(value)}" for key, value in dict(demo).items() if key in signature.fields)
        for demo in demos
    )


def spread_out(demos: Sequence[tuple[dspy.Example, str]], n: int) -> list[dspy.Example]:
    """The first few demonstrations that show the labels in turn."""
    order = stratified_order([stratum for _, stratum in demos], np.random.default_rng(0))
    return [demos[i][0] for i in order[:n]]


def data_summary(trainset: Sequence[dspy.Example], *, n_rows: int = 5) -> str:
    """The training data of the whole program in a few lines: fields, ranges, what separates the labels, some rows."""
    if not trainset:
        return "no examples"
    inputs = set(input_values(trainset[0]))
    names = [name for name in trainset[0] if all(name in example for example in trainset)]
    columns = {name: [text_of(example[name]) for example in trainset] for name in names}
    lines = [f"{len(trainset)} examples of what the whole program is given and has to answer."]
    for name, values in columns.items():
        lines.append(f"{name} ({'given' if name in inputs else 'to be answered'}): {_column(values)}")
    lines += _separating(columns, inputs)
    lines.append("Some examples:")
    for i in stratified_order(strata_of(trainset), np.random.default_rng(0))[:n_rows]:
        lines.append("; ".join(f"{name}={short(trainset[i][name])}" for name in names))
    return "\n".join(lines)


def program_code(program: dspy.Module) -> str:
    """The source of a program's class; of a bare predictor, or where there is no source, its steps in one line each."""
    if not is_bare(program):
        try:
            return inspect.getsource(type(program))
        except (OSError, TypeError):  # defined in a session without source files
            pass
    return "\n".join(
        f"{name} = {type(program).__name__ if name == 'self' else 'dspy.Predict'}"
        f"({', '.join(predictor.signature.input_fields)} -> {', '.join(predictor.signature.output_fields)})"
        for name, predictor in program.named_predictors()
    )


def is_bare(program: dspy.Module) -> bool:
    """Whether the program is one of DSPy's own modules, whose code says nothing about the task."""
    return type(program).__module__.startswith("dspy.")


def cleaned(answer: str) -> str:
    """The instruction in a writer's answer: without a fence, a label or quotation marks around it."""
    text = answer.strip()
    if fenced := _FENCED.fullmatch(text):
        text = fenced.group(1).strip()
    text = _LABEL.sub("", text, count=1).strip()
    for opening, closing in _QUOTES:
        inner = text[1:-1]
        if len(text) > 1 and text[0] == opening and text[-1] == closing and opening not in inner:
            text = inner.strip()
    return text


def _about(field: str, info: Any) -> list[str]:
    """What is known of a field beyond its name."""
    description = (info.json_schema_extra or {}).get("desc") or ""
    kind = info.annotation
    if get_origin(kind) is Literal:
        said = [f"one of {', '.join(map(str, get_args(kind)))}"]
    else:
        said = [] if kind is str else [getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind)]
    return [*said, *([description] if description and description != f"${{{field}}}" else [])]


def _column(values: Sequence[str]) -> str:
    counts = Counter(values)
    if len(counts) <= MAX_CATEGORIES:
        return "one of " + ", ".join(f"{short(value)} ({count})" for value, count in sorted(counts.items()))
    if (numbers := numbers_of(values)) is not None:
        given = [number for number in numbers if number is not None]
        missing = f" ({len(numbers) - len(given)} missing)" if len(given) < len(numbers) else ""
        return f"numbers from {min(given)} to {max(given)}{missing}"
    longest = max(len(value) for value in values)
    return f"{len(counts)} different texts of up to {longest:,} characters, for example {short(values[0])}"


def _separating(columns: Mapping[str, Sequence[str]], inputs: set[str]) -> list[str]:
    """How numbers differ from label to label, for one label of a few values."""
    label = next((n for n, values in columns.items() if n not in inputs and 1 < len(set(values)) <= 6), None)
    found: list[tuple[float, str]] = []
    for name, values in columns.items() if label is not None else ():
        numbers = numbers_of(values)
        if name not in inputs or numbers is None or len(set(values)) <= MAX_CATEGORIES:
            continue
        by_label: dict[str, list[float]] = {}
        for number, said in zip(numbers, columns[label or ""], strict=True):
            if number is not None:
                by_label.setdefault(said, []).append(float(number))
        middles = [float(np.median(group)) for group in by_label.values()]
        spread = float(np.std([one for group in by_label.values() for one in group])) or 1.0
        ranges = "; ".join(
            f"{said}: {min(group):g} to {max(group):g}, half below {float(np.median(group)):g}"
            for said, group in sorted(by_label.items())
        )
        found.append(((max(middles) - min(middles)) / spread, f"{name} by {label}: {ranges}"))
    return [text for _, text in sorted(found, key=lambda one: -one[0])[:MAX_SEPARATING]]


def _lines(values: Mapping[str, Any]) -> str:
    return "\n".join(f"  {name}: {short(value)}" for name, value in values.items())
