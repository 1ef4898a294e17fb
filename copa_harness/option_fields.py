"""An option stands in one place: as a field of a frozen dataclass, with its check and its help.

    @dataclass(frozen=True, slots=True)
    class SearchOptions:
        n_proposed: int = option(4, check=COUNT, help="instructions asked of the prompt model")

        def __post_init__(self) -> None:
            check_fields(self, "search option {name}={value!r}; {problem}")

Everything else is derived from the fields: which arguments the marker takes (`check_arguments`), what a text in the
environment or an ini file means (`Check.from_text`), a line of help (`Option.line`) and a table in a guide
(`markdown_table`).

Standard library only: the pytest plugin reads the options of all dataclasses before a test is collected.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Flag, auto
from functools import cache
from pathlib import Path
from typing import Any

from copa_harness.errors import ConfigurationError, did_you_mean


@dataclass(frozen=True, slots=True)
class Check:
    """Which values an option takes.

    Attributes:
        accepts: Whether a value has a usable type and range.
        expected: What is usable, as the end of a message: "a whole number, 0 or more".
        read: The value that a text from a shell or a file stands for; the text itself where it stands for none.
        meaning: Reads an accepted value and raises `ConfigurationError` in its own words when it means nothing.
    """

    accepts: Callable[[Any], bool]
    expected: str
    read: Callable[[str], Any] = str.strip
    meaning: Callable[[Any], object] | None = None

    def problem(self, value: Any, *, example: str = "") -> str | None:
        """What was expected instead of `value`; None if it is fine.

        Who wrote 85 and meant 0.85 is told so.
        """
        if self.accepts(value):
            return None
        such_as = f", such as {example}" if example else ""
        in_percent = is_number(value) and 1 < value <= 100 and self.accepts(value / 100)
        hint = f"; write {value / 100:g} for {value:g} %" if in_percent else ""
        return f"expected {self.expected}{such_as}{hint}"

    def from_text(self, text: str) -> Any:
        """The value that an option of the command line, an environment variable or an ini file gives.

        Raises:
            ConfigurationError: It cannot be used.
        """
        if not text.strip():
            raise ConfigurationError("got an empty value; leave it out or say something.")
        value = self.read(text)
        if (problem := self.problem(value)) is not None:
            raise ConfigurationError(f"got {text!r}, {problem}.")
        if self.meaning is not None:
            self.meaning(value)
        return value


# What texts stand for


def _read_number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass  # the check says what was expected
    return text


def _read_whole(text: str) -> Any:
    number = _read_number(text)
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _read_switch(text: str) -> Any:
    known = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}
    return known.get(text.strip().lower(), text)


def _read_words(text: str) -> Any:
    """`data, history`."""
    return [word for word in re.split(r"[,\s]+", text) if word]


def _read_mapping(text: str) -> Any:
    """`{"rank": 8}` in JSON or Python."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            pass  # the check says what was expected
    return text


# Checks


def is_number(value: Any) -> bool:
    """An int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number_check(least: float, most: float = math.inf) -> Check:
    """Finite numbers from `least` to `most`."""
    words = f"a number, {least:g} or more" if math.isinf(most) else f"a number from {least:g} to {most:g}"
    return Check(lambda value: is_number(value) and least <= value <= most and value < math.inf, words, _read_number)


def whole_check(least: int) -> Check:
    """Whole numbers from `least` on."""
    return Check(
        lambda value: is_number(value) and isinstance(value, int) and value >= least,
        f"a whole number, {least} or more",
        _read_whole,
    )


def text_check(expected: str, *, meaning: Callable[[Any], object] | None = None) -> Check:
    """Texts that are not empty."""
    return Check(lambda value: isinstance(value, str) and bool(value.strip()), expected, meaning=meaning)


def mapping_check(
    expected: str,
    *,
    accepts: Callable[[Any], bool] = lambda value: isinstance(value, Mapping),
    meaning: Callable[[Any], object] | None = None,
) -> Check:
    """Dictionaries, written as JSON or Python in an ini file."""
    return Check(accepts, expected, _read_mapping, meaning)


def choice_check(*known: str) -> Check:
    """One of several words."""
    return Check(lambda value: value in known, f"one of {', '.join(known)}")


SHARE = number_check(0, 1)
AMOUNT = number_check(0)
COUNT = whole_check(0)
POSITIVE = whole_check(1)
SWITCH = Check(lambda value: isinstance(value, bool), "True or False", _read_switch)
TEXT = text_check("a text")
PATH = Check(lambda value: isinstance(value, Path) or (isinstance(value, str) and bool(value.strip())), "a path")
"""Of this machine: typed in a shell it is relative to where it was typed, in an ini file to the project's root."""


def words_check(expected: str, *, meaning: Callable[[Any], object] | None = None) -> Check:
    """A list of words."""
    return Check(lambda value: isinstance(value, (list, tuple)), expected, _read_words, meaning)


# Options


class Place(Flag):
    """Where an option may be given. Arguments in Python need no place."""

    MARKER = auto()
    COMMAND_LINE = auto()
    ENVIRONMENT = auto()
    INI = auto()


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        name: In Python and in the marker; `copa_<name>` in an ini file.
        default: Its default.
        check: Which values it takes.
        help: What it does, in a line.
        default_words: The default for people, where its `repr` does not say it.
        example: A good value, for messages.
        metavar: What stands for the value in `--copa-<name> METAVAR`; empty for a switch without a value.
        places: Where it may be given.
        optional: Whether None is a value of it.
        repeated: Whether it may be given several times on the command line; the texts are joined by commas.
    """

    name: str
    default: Any
    check: Check
    help: str
    default_words: str = ""
    example: str = ""
    metavar: str = ""
    places: Place = Place.MARKER
    optional: bool = False
    repeated: bool = False

    @property
    def flag(self) -> str:
        """`--copa-prompt-lm`."""
        return f"--copa-{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        """`COPA_PROMPT_LM`."""
        return f"COPA_{self.name.upper()}"

    @property
    def ini(self) -> str:
        """`copa_prompt_lm`."""
        return f"copa_{self.name}"

    @property
    def default_text(self) -> str:
        """The default, for people."""
        if self.default_words:
            return self.default_words
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        if isinstance(self.default, (list, tuple)):
            return ", ".join(map(str, self.default))
        return "none" if self.default is None else str(self.default)

    @property
    def line(self) -> str:
        """Help and default."""
        return f"{self.help} [default: {self.default_text}]"

    def problem(self, value: Any) -> str | None:
        """What was expected instead of `value`; None if it is fine."""
        return None if value is None and self.optional else self.check.problem(value, example=self.example)


_METADATA = "copa option"


def option(default: Any, *, check: Check, help: str, **more: Any) -> Any:
    """A dataclass field that is an option.

    Args:
        default: Its default; one that cannot change (None, a number, a text, a tuple).
        check: Which values it takes. None is one if the field's annotation says so.
        help: What it does, in a line that begins in lower case and ends without a full stop.
        **more: `default_words`, `example`, `metavar` and `places` of an `Option`.
    """
    return field(default=default, metadata={_METADATA: Option("", default, check, help, **more)})


def same_option(kind: type, name: str, **other: Any) -> Any:
    """A dataclass field that is an option of another dataclass too.

    Args:
        kind: That dataclass.
        name: Its option.
        **other: What is different here: attributes of an `Option`.
    """
    one = options_of(kind)[name]
    return field(default=one.default, metadata={_METADATA: replace(one, **other)})


def options_of(kind: type) -> dict[str, Option]:
    """The options of a dataclass by name, in the order of its fields; other fields are none."""
    return _options_of(kind)


@cache
def _options_of(kind: type) -> dict[str, Option]:
    return {
        one.name: replace(found, name=one.name, optional=one.default is None or "None" in str(one.type))
        for one in fields(kind)
        if (found := one.metadata.get(_METADATA)) is not None
    }


def options_in(kind: type, place: Place) -> dict[str, Option]:
    """Those that may be given in a place."""
    return {name: one for name, one in options_of(kind).items() if place in one.places}


def values_of(record: Any) -> dict[str, Any]:
    """The options of a record by name."""
    return {name: getattr(record, name) for name in options_of(type(record))}


def default_of(kind: type, name: str) -> Any:
    """The default of one option."""
    return options_of(kind)[name].default


def check_names(given: Mapping[str, Any], known: Sequence[str], *, where: str) -> None:
    """Raise unless every argument is known.

    Raises:
        ConfigurationError: The first that is not, with the nearest known one and all of them.
    """
    for name in given:
        if name not in known:
            raise ConfigurationError(
                f"{where}: unknown argument {name!r}{did_you_mean(name, known) or '.'} "
                f"Known arguments: {', '.join(known)}."
            )


def check_arguments(given: Mapping[str, Any], known: Mapping[str, Option], *, where: str) -> None:
    """Raise unless every argument is known and of a usable value; None is what nobody said, and always usable.

    `where` says who was given them: "copa marker".

    Raises:
        ConfigurationError: An unknown or unusable argument, by name.
    """
    check_names(given, list(known), where=where)
    said = {name: value for name, value in given.items() if value is not None}
    for name, value in said.items():
        if (problem := known[name].check.problem(value)) is not None:
            raise ConfigurationError(f"{where}: {name}={value!r}; {problem}.")
    for name, value in said.items():
        if (meaning := known[name].check.meaning) is not None:
            try:
                meaning(value)
            except ConfigurationError as error:
                raise ConfigurationError(f"{where}: {error}") from None


def check_fields(record: Any, message: str) -> None:
    """Raise unless every option of a record has a usable value.

    Args:
        record: An instance of a dataclass with options.
        message: How to say it, with `{name}`, `{value!r}` and `{problem}`.

    Raises:
        ConfigurationError: The first that has none.
    """
    for name, one in options_of(type(record)).items():
        value = getattr(record, name)
        if (problem := one.problem(value)) is not None:
            raise ConfigurationError(message.format(name=name, value=value, problem=problem))
        if value is not None and one.check.meaning is not None:
            one.check.meaning(value)


# Tables of the guides


def markdown_table(kind: type) -> str:
    """The options of a dataclass as a Markdown table, a row each: those that may be given in some place, if any may."""
    options = options_of(kind)
    shown = {name: one for name, one in options.items() if one.places} or options
    lines = ["| option | default | values | meaning |", "|---|---|---|---|"]
    for name, one in shown.items():
        names = [f"`{one.flag} {one.metavar}".rstrip() + "`"] if Place.COMMAND_LINE in one.places else []
        if not names or Place.MARKER in one.places:
            names.append(f"`{name}`")
        cells = (", ".join(names), one.default_text, one.check.expected, one.help)
        escaped = [re.sub(r"([|<])", r"\\\1", cell) for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines)


def with_tables(text: str, kinds: Mapping[str, type]) -> str:
    """A guide with its option tables written anew.

    A table stands between `<!-- options: Name -->` and `<!-- end options -->`, with the dataclass's name.

    Args:
        text: The guide.
        kinds: Dataclasses by name.

    Raises:
        ConfigurationError: A table of a dataclass that is not among them.
    """

    def table(match: re.Match[str]) -> str:
        name = match[2]
        if name not in kinds:
            raise ConfigurationError(f"got a table of {name!r}; expected one of {', '.join(kinds)}")
        return f"{match[1]}\n\n{markdown_table(kinds[name])}\n\n{match[3]}"

    return re.sub(r"(<!-- options: (\w+) -->).*?(<!-- end options -->)", table, text, flags=re.DOTALL)
