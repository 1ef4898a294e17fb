"""Fingerprints: the same content gives the same short text, in every process and on every machine.

Data, settings, files and the source of functions (a metric, a program) become SHA-256 hex digests. Two things with
equal fingerprints may stand for one another, so a value that cannot be told apart from another is refused, not guessed.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from copa_harness.documents import hash_json, to_jsonable

_PRIVATE_PREFIX = "dspy_"


def hash_examples(examples: Iterable[Any]) -> str:
    """SHA-256 of examples in their order: fields, values, and which fields are inputs.

    Args:
        examples: mappings, or objects with `toDict()` such as `dspy.Example`; keys starting with `dspy_` are private
            to DSPy and do not count.
    """
    rows = []
    for example in examples:
        fields = example if isinstance(example, Mapping) else example.toDict()
        public = {key: value for key, value in fields.items() if not str(key).startswith(_PRIVATE_PREFIX)}
        inputs = getattr(example, "_input_keys", None)
        rows.append([public, sorted(inputs) if inputs is not None else None])
    return hash_json(rows)


def hash_source(function: Callable[..., Any] | type) -> str:
    """SHA-256 of what a function does, as far as its source tells.

    Covered: its source (or, where there is none, its bytecode), the values it closes over, the arguments of a partial,
    the class and attributes of a callable object, what `functools.wraps` hides, and the functions, classes and
    constants of the same module it mentions. Other modules count by name only: their versions belong in a manifest.
    """
    return hash_json(_describe(function, seen=set()))


def _describe(thing: Any, *, seen: set[int]) -> Any:
    """A JSON value that changes when the behaviour of `thing` may have changed."""
    if id(thing) in seen:
        return ["seen", getattr(thing, "__qualname__", type(thing).__qualname__)]
    seen.add(id(thing))
    if isinstance(thing, functools.partial):
        keywords = {key: _describe_value(value, seen=seen) for key, value in thing.keywords.items()}
        return [
            "partial",
            _describe(thing.func, seen=seen),
            [_describe_value(v, seen=seen) for v in thing.args],
            keywords,
        ]
    if isinstance(thing, types.MethodType):
        return ["method", _describe(thing.__func__, seen=seen), _describe_value(thing.__self__, seen=seen)]
    if isinstance(thing, types.FunctionType):
        return _describe_function(thing, seen=seen)
    if isinstance(thing, type):
        return _describe_class(thing, seen=seen)
    if callable(thing) and not isinstance(thing, types.BuiltinFunctionType):
        name = getattr(thing, "__name__", "")
        return ["object", name, _describe(type(thing), seen=seen), _attributes(thing, seen=seen)]
    return ["named", _name(thing)]


def _describe_class(cls: type, *, seen: set[int]) -> Any:
    """Its source, its base classes of the same module, and what its methods mention there."""
    mentioned = {}
    for member in vars(cls).values():
        if isinstance(member, types.FunctionType):
            mentioned.update(_mentioned(member, seen=seen))
    bases = [_describe(base, seen=seen) for base in cls.__mro__[1:] if base.__module__ == cls.__module__]
    return ["class", _name(cls), _source(cls), bases if cls.__module__ != "builtins" else [], mentioned]


def _describe_function(function: types.FunctionType, *, seen: set[int]) -> Any:
    code = function.__code__
    closed_over = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            closed_over[name] = _describe_value(cell.cell_contents, seen=seen)
        except ValueError:  # an empty cell: the name is bound later, if at all
            closed_over[name] = "unbound"
    defaults = [_describe_value(value, seen=seen) for value in function.__defaults__ or ()]
    keyword_defaults = {k: _describe_value(v, seen=seen) for k, v in (function.__kwdefaults__ or {}).items()}
    source: Any = _source(function)
    if source is None or source.count("lambda") > 1:  # several lambdas on one line share their source
        source = [source, _bytecode(code)]
    mentioned = _mentioned(function, seen=seen)
    return ["function", function.__qualname__, source, closed_over, defaults, keyword_defaults, mentioned]


def _mentioned(function: types.FunctionType, *, seen: set[int]) -> dict[str, Any]:
    """The globals a function's code names, as far as they belong to what it does."""
    absent = object()
    found = {}
    for name in sorted(_names(function.__code__)):
        value = function.__globals__.get(name, absent)
        if value is not absent and _belongs(value, function.__module__):
            found[name] = _describe_value(value, seen=seen)
    return found


def _describe_value(value: Any, *, seen: set[int]) -> Any:
    """A value a function depends on: content where it has one, source where it is code, else its type's name."""
    if callable(value):
        return _describe(value, seen=seen)
    if isinstance(value, re.Pattern):
        return ["pattern", value.pattern, value.flags]
    if isinstance(value, types.ModuleType):
        return ["module", value.__name__]
    try:
        return to_jsonable(value, fallback=None)
    except (TypeError, ValueError, RecursionError):
        return ["object", _name(type(value)), _attributes(value, seen=seen)]


def _attributes(value: Any, *, seen: set[int]) -> Any:
    if id(value) in seen and not callable(value):
        return "seen"
    seen.add(id(value))
    attributes = getattr(value, "__dict__", {})
    return {name: _describe_value(item, seen=seen) for name, item in sorted(attributes.items())}


def _belongs(value: Any, module: str) -> bool:
    """Whether a global is part of what the function does: same-module code, or an immutable constant."""
    if isinstance(value, (types.FunctionType, type)) or hasattr(value, "__wrapped__"):
        return getattr(value, "__module__", None) == module
    if isinstance(value, (tuple, frozenset)):
        return all(_belongs(item, module) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, re.Pattern))


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _source(thing: Any) -> str | None:
    """Source without indentation and trailing blanks; None where there is none (a REPL, `exec`, built-ins)."""
    unwrapped = thing
    if isinstance(thing, types.FunctionType) and hasattr(thing, "__wrapped__"):
        # inspect follows __wrapped__ to the inner function, which is described as a closed-over value anyway.
        unwrapped = types.FunctionType(thing.__code__, thing.__globals__, thing.__name__, None, thing.__closure__)
    try:
        source = inspect.getsource(unwrapped)
    except (OSError, TypeError):
        return None
    return "\n".join(line.rstrip() for line in textwrap.dedent(source).strip().splitlines())


def _bytecode(code: types.CodeType) -> Any:
    constants = [_bytecode(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return [hashlib.sha256(code.co_code).hexdigest(), constants, list(code.co_names), list(code.co_varnames)]


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', repr(type(thing)))}"
