"""Descriptions of the fields of structured answers, as part of the instruction, so that the search chooses among them.

An output typed as a Pydantic model puts the model's JSON schema into the prompt. What else there is to say of its
fields follows the instruction, a line per field under a heading; another set of such lines is another instruction,
kept, served and saved like any. Lines are written by a prompt LM, as DSPydantic does, and without one by counting.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin

import dspy
from pydantic import BaseModel

from copa_harness.evaluate.examples import plain

HEADING = "What the fields hold:"
"""Before the lines, which end the instruction."""

MAX_EXAMPLES = 3
"""Values shown of a field."""

_LINE = re.compile(r"^[\s`*-]*([\w.]+)[`*]*\s*:[\s*]*(\S.*)$", re.MULTILINE)


class DescribeFields(dspy.Signature):
    """Describe the fields of the records that a step of a language-model program extracts, so that fewer are wrong.

    Say what a field holds, in which form, and when it stays empty. Write general guidance that holds for inputs not
    seen here.
    """

    program_step: str = dspy.InputField(desc="name, inputs and outputs of the step")
    current_instruction: str = dspy.InputField()
    record_fields: str = dspy.InputField(desc="names of the fields, and what is known of them")
    step_examples: str = dspy.InputField(desc="inputs and right outputs of the step")
    mistakes: str = dspy.InputField(desc="what the step was given, what it answered, and the feedback")
    field_descriptions: str = dspy.OutputField(desc="one line per field: its name as given, a colon, the description")


def described_fields(signature: Any) -> dict[str, str]:
    """What the models of a signature's outputs say of their fields, "" for nothing; `items.colour` for a nested one."""
    found: dict[str, str] = {}
    for field in signature.output_fields.values():
        for model in _models(field.annotation):
            found |= _fields_of(model, "", ())
    return found


def counted(signature: Any, trainset: Sequence[dspy.Example]) -> dict[str, str]:
    """What the models say of their fields, and what the rows show: values, and how often there is none."""
    known = described_fields(signature)
    outputs = [name for name, field in signature.output_fields.items() if any(_models(field.annotation))]
    records = [plain(row[name]) for row in trainset for name in outputs if name in row]
    return {path: _line(own, list(_values(records, path.split(".")))) for path, own in known.items()} if records else {}


def with_descriptions(instruction: str, descriptions: Mapping[str, str]) -> str:
    """The instruction with these lines in place of those it has; as it is without any."""
    lines = [f"- {path}: {text}" for path, text in descriptions.items() if text]
    return "\n".join([without_descriptions(instruction), HEADING, *lines]) if lines else instruction


def without_descriptions(instruction: str) -> str:
    """The instruction without its lines about fields."""
    return instruction.partition(HEADING)[0].rstrip()


def descriptions_in(text: str, known: Iterable[str]) -> dict[str, str]:
    """The lines about known fields in an instruction, or in what a prompt LM wrote."""
    said = {path: line.strip() for path, line in _LINE.findall(text)}
    return {path: said[path] for path in known if path in said}


def _models(annotation: Any) -> Iterable[type[BaseModel]]:
    """The models in a type: itself, or those of an optional, a union or a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and get_origin(annotation) is None:
        yield annotation
    elif get_origin(annotation) in (list, tuple, Union, types.UnionType):
        for part in get_args(annotation):
            yield from _models(part)


def _fields_of(model: type[BaseModel], prefix: str, above: tuple[type, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        inner = [one for one in _models(field.annotation) if one not in above and one is not model]
        if field.description or not inner:
            found[f"{prefix}{name}"] = field.description or ""
        for one in inner:
            found |= _fields_of(one, f"{prefix}{name}.", (*above, model))
    return found


def _values(value: Any, path: Sequence[str]) -> Iterable[Any]:
    """What stands at a path, every entry of every list on the way."""
    if isinstance(value, list):
        for one in value:
            yield from _values(one, path)
    elif not path:
        yield value
    elif isinstance(value, Mapping):
        yield from _values(value.get(path[0]), path[1:])


def _line(own: str, values: Sequence[Any]) -> str:
    given = [value for value in values if value is not None and not isinstance(value, Mapping)]
    shown = list(dict.fromkeys(json.dumps(value, ensure_ascii=False) for value in given))[:MAX_EXAMPLES]
    parts = [own] if own else []
    if shown:
        parts.append(f"for example {', '.join(shown)}")
    if missing := sum(value is None for value in values):
        parts.append(f"null where the text does not say ({missing} of {len(values)})")
    return "; ".join(parts)
