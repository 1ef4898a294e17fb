"""Types of a signature's fields as JSON, as Python source, and as types again.

str                         "str"
Literal["a", "b"]           {"literal": ["a", "b"]}
str | None                  {"union": ["str", "None"]}
list[Order]                 {"of": "list", "arguments": [{"class": "shop.orders:Order"}]}
"""

from __future__ import annotations

import builtins
import importlib
import types
from collections.abc import Iterator
from functools import reduce
from operator import or_
from typing import Any, Literal, Union, get_args, get_origin

from copa_harness.errors import ConfigurationError

_PLAIN = ("str", "int", "float", "bool", "bytes", "list", "dict", "tuple", "set", "object")
_GENERIC = ("list", "dict", "tuple", "set")


def described(annotation: Any) -> Any:
    """A type as JSON.

    Raises:
        ValueError: It is of a kind that cannot be written down, or a class that no module offers by its name.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is type(None):
        return "None"
    if annotation is Any:
        return "Any"
    if origin is Literal:
        if any(value is not None and type(value) not in (str, int, bool) for value in arguments):
            raise ValueError(f"the type {annotation} lists other values than text and numbers")
        return {"literal": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"union": [described(one) for one in arguments]}
    if origin is not None and getattr(origin, "__name__", "") in _GENERIC:
        if Ellipsis in arguments:
            raise ValueError(f"the type {annotation} has no written form here")
        return {"of": origin.__name__, "arguments": [described(one) for one in arguments]}
    if isinstance(annotation, type) and annotation.__module__ == "builtins" and annotation.__name__ in _PLAIN:
        return annotation.__name__
    if isinstance(annotation, type):
        return {"class": class_name(annotation)}
    raise ValueError(f"the type {annotation} has no written form here")


def class_name(kind: type) -> str:
    """`module:Class` of a class that can be imported.

    Raises:
        ValueError: It was made inside a function, or in the script that ran.
    """
    if "<" in kind.__qualname__ or kind.__module__ == "__main__":
        raise ValueError(f"the class {kind.__qualname__} of {kind.__module__} cannot be imported")
    return f"{kind.__module__}:{kind.__qualname__}"


def imported_class(name: str) -> type:
    """The class `module:Class`.

    Raises:
        ConfigurationError: There is none.
    """
    module, _, path = name.partition(":")
    try:
        found: Any = reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"got the class {name} of a program that was scored, which cannot be imported here ({error}); expected its "
            "module on Python's path: install the package it is in, or start where it lies"
        ) from error
    if not isinstance(found, type):
        raise ConfigurationError(f"got {name}, which is a {type(found).__name__}; expected a class")
    return found


def type_of(form: Any) -> Any:
    """The type that `described` wrote.

    Raises:
        ConfigurationError: A class of it cannot be imported, or this is no such form.
    """
    if form == "None":
        return type(None)
    if form == "Any":
        return Any
    if isinstance(form, str) and form in _PLAIN:
        return getattr(builtins, form)
    if isinstance(form, dict):
        if "literal" in form:
            return Literal[tuple(form["literal"])]
        if "union" in form:
            return reduce(or_, map(type_of, form["union"]))
        if "class" in form:
            return imported_class(form["class"])
        if form.get("of") in _GENERIC:
            arguments = tuple(map(type_of, form["arguments"]))
            return getattr(builtins, form["of"])[arguments]
    raise ConfigurationError(f"got {form!r} as the type of a field; expected what an artifact keeps of one")


def source_of(form: Any) -> str:
    """The type as Python source; its classes by their last name (see `imports_of`)."""
    if isinstance(form, str):
        return form
    if "literal" in form:
        return f"Literal[{', '.join(map(repr, form['literal']))}]"
    if "union" in form:
        return " | ".join(map(source_of, form["union"]))
    if "class" in form:
        return str(form["class"].partition(":")[2])
    return f"{form['of']}[{', '.join(map(source_of, form['arguments']))}]"


def imports_of(form: Any) -> Iterator[str]:
    """Import statements that the source of a type needs."""
    if form == "Any":
        yield "from typing import Any"
    if not isinstance(form, dict):
        return
    if "literal" in form:
        yield "from typing import Literal"
    if "class" in form:
        module, _, path = form["class"].partition(":")
        yield f"from {module} import {path.split('.')[0]}"
    for one in (*form.get("union", ()), *form.get("arguments", ())):
        yield from imports_of(one)


def parsing_of(form: Any) -> Any:
    """How a script without DSPy reads a value: `"text"`, a list of the allowed values, or `"json"`."""
    if form == "str":
        return "text"
    return form["literal"] if isinstance(form, dict) and "literal" in form else "json"
