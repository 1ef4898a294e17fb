"""Fingerprints: the same content gives the same short text, in every process and on every machine.

Data, settings, files, and what a metric or a program does become SHA-256 hex digests. Two things with equal
fingerprints may stand for one another, so a value that cannot be told apart from another is refused, not guessed.

What code does is looked for as far as it reaches: the source of functions and classes, what they close over, and the
globals they mention, by content. Code of the user's own project is followed from module to module. Libraries (whatever
lies in site-packages, Python's own modules, this package) count by name: their versions belong in a manifest.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import re
import sys
import sysconfig
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from copa_harness.credentials import is_secret_key
from copa_harness.documents import ADDRESS, hash_json
from copa_harness.errors import ConfigurationError

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


def hash_source(thing: Any, *, models: bool = True) -> str:
    """SHA-256 of what a function, class or object does, as far as it can be seen.

    Covered: source (or, where there is none, bytecode), closures, defaults, arguments of a partial, what
    `functools.wraps` hides; attributes, in slots too; the globals that are mentioned, by content; functions, classes
    and modules of the user's project wherever they lie; DSPy's signatures, programs and models. Left out is what is
    called `cache` or `memo`.

    Args:
        thing: A metric, a program, a prompt adapter.
        models: Whether the models of a program's predictors count.

    Raises:
        ConfigurationError: It holds something whose content nobody can see; the message says where.
    """
    name = getattr(thing, "__name__", None) or type(thing).__name__
    try:
        return hash_json(_Description(_home_of(thing), models=models).of(thing, (name,)))
    except RecursionError as error:
        raise ConfigurationError(
            f"{name} cannot be fingerprinted: what it holds is nested too deeply; expected fewer than some hundred "
            "levels"
        ) from error


Trail = tuple[str, ...]

_OTHER_NAMES = re.compile(r"(?i)(^|_)(cache|memo)(s|d|_|$)")
"""Names of what is filled while a program runs and says nothing of what it does."""

_RUNTIME = frozenset({"_compiled", "callbacks", "history", "stage", "traces", "train", "copa_result"})
"""Attributes of DSPy's programs that say nothing of what they do."""

_PLUMBING = frozenset(
    {*("_asyncio", "_contextvars", "_io", "_queue", "_random", "_socket", "_ssl", "_thread", "_weakref", "asyncio")}
    | {*("concurrent", "contextvars", "io", "logging", "queue", "random", "socket", "ssl", "threading", "weakref")}
)
"""Modules of Python whose objects have no content that a score could depend on, or none that lasts."""

_BY_TEXT = (bytes, bytearray, complex, range, slice, re.Pattern, type(...), type(NotImplemented))
"""Plain values whose text is all there is to them."""


class _Description:
    """Makes of a thing a JSON value that changes when what it does may have changed.

    Args:
        home: The module of the thing itself, whose code is followed even if it is a library's.
        models: See `hash_source`.
    """

    def __init__(self, home: str | None, *, models: bool) -> None:
        self._home, self._models = home, models
        self._seen: dict[int, tuple[int, object]] = {}  # the objects are held, or another could get their address

    def of(self, value: Any, trail: Trail) -> Any:
        """The description of any value; `trail` says how it was reached."""
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if abs(value) < float("inf") else ["float", repr(value)]
        if type(value) in _BY_TEXT:
            return ["text", type(value).__name__, repr(value)]
        if type(value) not in (tuple, frozenset):  # which of equal ones is which says nothing
            if id(value) in self._seen:
                return ["seen", self._seen[id(value)][0]]
            self._seen[id(value)] = len(self._seen), value
        return self._of_code(value, trail) or self._of_content(value, trail) or self._of_library(value, trail)

    # -- code

    def _of_code(self, value: Any, trail: Trail) -> Any:
        if isinstance(value, functools.partial):
            given = [self._items(value.args, trail), self.of(value.keywords, trail)]
            return ["partial", self.of(value.func, trail), *given]
        if isinstance(value, (staticmethod, classmethod)):
            return [type(value).__name__, self.of(value.__func__, trail)]
        if isinstance(value, property):
            return ["property", self._items((value.fget, value.fset, value.fdel), trail)]
        if isinstance(value, functools.cached_property):
            return ["property", self.of(value.func, trail)]
        if isinstance(value, types.MethodType):
            return ["method", self.of(value.__func__, trail), self.of(value.__self__, trail)]
        if isinstance(value, types.BuiltinFunctionType):
            owner = value.__self__
            bound = owner is not None and not isinstance(owner, (types.ModuleType, type))
            return ["method", value.__name__, self.of(owner, trail)] if bound else ["named", _name(value)]
        if isinstance(value, types.FunctionType):
            return self._of_function(value, trail) if self._is_followed(value) else ["named", _name(value)]
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if typing.get_origin(value) is not None or isinstance(value, types.UnionType):
            return ["type", str(typing.get_origin(value)), self._items(typing.get_args(value), trail)]
        if isinstance(value, type):
            return self._of_class(value, trail)
        if isinstance(value, (typing.TypeVar, typing.ForwardRef)):
            return ["type", repr(value)]
        if hasattr(value, "__wrapped__"):  # a function in a cache, say
            return ["wrapped", _name(type(value)), self.of(value.__wrapped__, trail)]
        return None

    def _of_function(self, function: types.FunctionType, trail: Trail) -> Any:
        code = function.__code__
        closed_over = {}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # an empty cell: the name is bound later, if at all
                content = "unbound"
            closed_over[name] = self.of(content, (*trail, name))
        source: Any = _source(function)
        if source is None or source.count("lambda") > 1:  # several lambdas on one line share their source
            source = [source, self._bytecode(code, trail)]
        names = _names(code)
        mentioned = {
            name: self._of_global(function.__globals__[name], names, (*trail, name))
            for name in sorted(names & function.__globals__.keys())
            if not (name.startswith("@") or _OTHER_NAMES.search(name))  # "@": what pytest writes into assertions
        }
        defaults = [function.__defaults__, function.__kwdefaults__]
        return ["function", function.__qualname__, source, closed_over, self._items(defaults, trail), mentioned]

    def _of_global(self, value: Any, names: set[str], trail: Trail) -> Any:
        """A global that a function mentions; of a module of the project, those of its globals that are named too."""
        if not isinstance(value, types.ModuleType) or not _is_the_users(value.__name__):
            return self.of(value, trail)
        if names & {"getattr", "vars", "__dict__", "globals"}:
            return ["module", value.__name__, _source(value), self._attributes(value, trail)]
        found = sorted(name for name in names & vars(value).keys() if not _OTHER_NAMES.search(name))
        return ["module", {name: self._of_global(vars(value)[name], names, (*trail, name)) for name in found}]

    def _of_class(self, cls: type, trail: Trail) -> Any:
        """Its source, base classes and members; for a signature what is asked, for a library's class its name."""
        asked = self._of_signature(cls, trail) if _is_of_dspy(cls, "SignatureMeta") else None
        if not self._is_followed(cls):
            return ["named", _name(cls)] if asked is None else asked
        members = {
            name: self.of(member, (*trail, name))
            for name, member in sorted(vars(cls).items())
            if isinstance(member, _CODE) or not (name.startswith("_") or _is_descriptor(member) or asked is not None)
        }
        bases = [self.of(base, trail) for base in cls.__mro__[1:] if base is not object]
        return ["class", _name(cls), _source(cls), asked, bases, members]

    def _of_signature(self, signature: Any, trail: Trail) -> Any:
        fields = {
            name: [
                self.of(getattr(field, part), (*trail, name))
                for part in ("annotation", "default", "metadata", "json_schema_extra", "description")
            ]
            for name, field in signature.model_fields.items()
        }
        return ["signature", signature.instructions, list(fields), fields]

    def _bytecode(self, code: types.CodeType, trail: Trail) -> Any:
        constants = [
            self._bytecode(one, trail) if isinstance(one, types.CodeType) else self.of(one, trail)
            for one in code.co_consts
        ]
        return [hashlib.sha256(code.co_code).hexdigest(), constants, list(code.co_names), list(code.co_varnames)]

    def _is_followed(self, value: Any) -> bool:
        module = getattr(value, "__module__", None) or ""
        return module == self._home or _is_the_users(module)

    # -- content

    def _of_content(self, value: Any, trail: Trail) -> Any:
        if isinstance(value, enum.Enum):
            return ["member", _name(type(value)), value.name, self.of(type(value), trail)]
        if isinstance(value, (str, int, float)):
            return [_name(type(value)), repr(value)]
        if isinstance(value, Mapping):
            pairs = [[self.of(key, trail), self.of(item, (*trail, str(key)))] for key, item in value.items()]
            return ["mapping", self._kind(value, trail), pairs]
        if isinstance(value, (set, frozenset)):
            # One by one, so that what is seen first does not depend on their order.
            items = [self._copy().of(item, trail) for item in value]
            return ["set", self._kind(value, trail), sorted(items, key=lambda item: json.dumps(item, sort_keys=True))]
        if isinstance(value, collections.abc.Sequence) and not isinstance(value, memoryview):
            return ["sequence", self._kind(value, trail), self._items(value, trail)]
        if callable(getattr(value, "toDict", None)):  # dspy.Example
            return self._of_example(value.toDict(), trail)
        if _is_of_dspy(type(value), "BaseLM"):
            settings = {key: item for key, item in value.kwargs.items() if not is_secret_key(key)}
            known = [value.model, self.of(settings, trail), getattr(value, "fingerprint", None)]
            return ["model", self.of(type(value), trail), *known]
        if _is_of_dspy(type(value), "Module"):
            left_out = _RUNTIME | {"demos"} if self._models else _RUNTIME | {"demos", "lm"}
            demos = [self._of_example(dict(demo), trail) for demo in getattr(value, "demos", ())]
            return ["program", self.of(type(value), trail), demos, self._attributes(value, trail, left_out=left_out)]
        if callable(getattr(value, "dump_state", None)):  # another of DSPy's parameters
            return ["state", self.of(type(value), trail), self.of(value.dump_state(), trail)]
        if _is_array(value):
            return self._of_array(value, trail)
        if hasattr(value, "columns") and callable(getattr(value, "to_dict", None)):  # a table of pandas or polars
            return ["table", self.of(value.to_dict(), trail)]
        if dataclasses.is_dataclass(value) or hasattr(value, "model_fields_set") or _is_open(value):
            return ["object", self.of(type(value), trail), self._attributes(value, trail)]
        return None

    def _of_example(self, fields: Mapping[str, Any], trail: Trail) -> Any:
        """Its fields by name: a demonstration that was read from a file is a mapping, perhaps in another order."""
        public = sorted(name for name in fields if not str(name).startswith(_PRIVATE_PREFIX))
        return ["example", [[name, self.of(fields[name], (*trail, name))] for name in public]]

    def _kind(self, value: Any, trail: Trail) -> Any:
        return None if type(value).__module__ == "builtins" else self.of(type(value), trail)

    def _copy(self) -> _Description:
        copy = _Description(self._home, models=self._models)
        copy._seen = dict(self._seen)
        return copy

    def _of_array(self, value: Any, trail: Trail) -> Any:
        if hasattr(value, "detach"):  # a tensor
            value = value.detach().cpu().float().numpy()
        if value.dtype.hasobject:
            return self.of(value.tolist(), trail)
        return ["array", str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]

    def _items(self, values: Iterable[Any], trail: Trail) -> list[Any]:
        return [self.of(value, (*trail, str(index))) for index, value in enumerate(values)]

    def _attributes(self, value: Any, trail: Trail, *, left_out: frozenset[str] = frozenset()) -> Any:
        return {
            name: self.of(item, (*trail, name))
            for name, item in sorted(_attributes_of(value))
            if name not in left_out and not name.startswith("__") and not _OTHER_NAMES.search(name)
        }

    # -- what libraries made

    def _of_library(self, value: Any, trail: Trail) -> Any:
        """An object of a library's class: its text, else those of its public attributes that are plain."""
        kind = type(value)
        if kind.__module__.partition(".")[0] in _PLUMBING:
            return ["named", _name(kind), str(getattr(value, "name", ""))]
        if not ADDRESS.search(text := repr(value)):
            return ["object", _name(kind), text]
        if isinstance(getattr(value, "__qualname__", None), str):
            return ["named", _name(value)]
        attributes = dict(_attributes_of(value))
        if not attributes and not hasattr(value, "__dict__"):
            raise ConfigurationError(
                f"{' > '.join(trail)} is a {_name(kind)}, whose content nobody can see: old results would stand for "
                "new ones when it changes; expected plain values, functions, and objects of your own classes; remedy: "
                "make it inside the function that uses it"
            )
        public = {name: item for name, item in attributes.items() if not (name.startswith("_") or is_secret_key(name))}
        return ["object", _name(kind), {name: item for name, item in sorted(public.items()) if _is_plain(item)}]


_CODE = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)


def _home_of(thing: Any) -> str | None:
    if isinstance(thing, functools.partial):
        return _home_of(thing.func)
    return getattr(thing, "__module__", None) if isinstance(thing, (types.FunctionType, type)) else None


@functools.cache
def _is_the_users(module: str) -> bool:
    """Whether a module belongs to the user's project: not to Python, nor to an installed package, nor to this one."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top == __name__.partition(".")[0]:
        return False
    loaded = sys.modules.get(module) or sys.modules.get(top)
    # Neither file nor folder: typed in, or made by `exec`.
    places = [getattr(loaded, "__file__", None), *(getattr(loaded, "__path__", None) or [])]
    return not any(part in str(place) for place in places for part in _LIBRARIES)


_LIBRARIES = tuple({f"{part}-packages" for part in ("site", "dist")} | {sysconfig.get_path("stdlib")})


def _is_of_dspy(cls: type, name: str) -> bool:
    """Whether a class is, or is derived from, or made by, a class of DSPy of that name."""
    bases = [*cls.__mro__, *inspect.getmro(type(cls))]
    return any(base.__name__ == name and base.__module__.startswith("dspy.") for base in bases)


def _is_array(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("dtype", "shape")) and any(
        hasattr(value, name) for name in ("tobytes", "detach")
    )


def _is_open(value: Any) -> bool:
    """Whether all attributes of an object count: its class is the user's own, or made to hold whatever one likes."""
    classes = type(value).__mro__
    return isinstance(value, types.SimpleNamespace) or any(_is_the_users(cls.__module__) for cls in classes)


def _is_descriptor(member: Any) -> bool:
    return hasattr(type(member), "__get__")


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return value is None or type(value) in (bool, int, float, str)


def _attributes_of(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            name = f"_{base.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


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


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', repr(type(thing)))}"
