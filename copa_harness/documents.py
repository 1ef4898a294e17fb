"""JSON documents: strict (no NaN), the same text for the same content, and hashes of it; `parse_json` reads a text.

`to_json` and `from_json` are the one way of a frozen record to JSON and back: fields by name, nested records, tuples,
mappings and enums by the types they are declared with. `to_jsonable` does the same for values of no declared type.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record")


ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
"""In a text that names an object by where it lies, which says nothing."""


def to_jsonable(value: Any, *, fallback: Callable[[Any], Any] | None = repr) -> Any:
    """Turn a value into plain JSON types.

    Args:
        value: mappings, sequences, sets, dataclasses, enums, paths, numpy scalars and arrays, and objects with
            `toDict` (`dspy.Example`) or `model_dump` (pydantic) are understood.
        fallback: what to make of anything else; None raises instead.

    Returns:
        The same content; NaN and infinities are None, since JSON has no word for them.

    Raises:
        TypeError: for a value without JSON form when `fallback` is None.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return to_jsonable(value.value, fallback=fallback)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return value.as_posix()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: to_jsonable(getattr(value, name), fallback=fallback) for name in names}
    if isinstance(value, Mapping):
        return {_key(key): to_jsonable(item, fallback=fallback) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        items = [to_jsonable(item, fallback=fallback) for item in value]
        return sorted(items, key=lambda item: json.dumps(item, sort_keys=True))
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return [to_jsonable(item, fallback=fallback) for item in value]
    for method, arguments in (("toDict", {}), ("model_dump", {"mode": "json"}), ("tolist", {}), ("item", {})):
        convert = getattr(value, method, None)
        if callable(convert) and not isinstance(value, type):
            return to_jsonable(convert(**arguments), fallback=fallback)
    if fallback is None:
        raise TypeError(
            f"got a {type(value).__module__}.{type(value).__qualname__}, which has no JSON form; expected plain values "
            f"(text, numbers, lists, mappings). Convert it first, or give it a model_dump() or toDict() method."
        )
    return to_jsonable(fallback(value), fallback=str)


def _key(key: Any) -> str:
    plain = key.value if isinstance(key, Enum) else key
    return plain if isinstance(plain, str) else json.dumps(to_jsonable(plain), sort_keys=True)


def digest_of(parts: Iterable[str]) -> str:
    """A digest of texts, whatever their order; "" for none."""
    text = " ".join(sorted(parts))
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""


def to_json(record: DataclassInstance) -> dict[str, Any]:
    """A frozen record as plain JSON types, its fields by name; `from_json` reads it back.

    NaN is None, an infinity the text "inf". Secrets stay: whoever writes for people masks them (`mask_secrets`).

    Raises:
        TypeError: for a value without JSON form: what comes back would not be what was put in.
    """
    return {field.name: _written(getattr(record, field.name)) for field in dataclasses.fields(record)}


def _written(value: Any) -> Any:
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json(value)
    if isinstance(value, Mapping):
        return {_key(key): _written(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_written(item) for item in value]
    return to_jsonable(value, fallback=None)


def from_json(kind: type[Record], document: Any) -> Record:
    """The record that `to_json` wrote.

    A field that is missing has its default; one that is not known (of a newer version) is left out. None where the
    type is a bare `float` is the default, else NaN.

    Args:
        kind: a frozen dataclass whose fields are declared with types that are known at runtime.
        document: what stands in JSON.

    Raises:
        ValueError: a part is missing or of the wrong type; the message says which.
    """
    try:
        return cast("Record", _read_record(kind, document, trail=kind.__name__))
    except RecursionError:
        raise ValueError(f"{kind.__name__}: it is nested too deeply") from None


def _read_record(kind: type[Any], document: Any, *, trail: str) -> Any:
    if not isinstance(document, Mapping):
        raise ValueError(f"{trail}: got {_shown(document)}, expected an object")
    values = {}
    declared_types = _type_hints(cast("object", kind))
    for field in dataclasses.fields(kind):
        declared, here = declared_types[field.name], f"{trail}.{field.name}"
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name in document:
            if document[field.name] is None and declared is float and has_default:
                continue  # as an infinity was once written
            values[field.name] = _read(declared, document[field.name], trail=here)
        elif not has_default:
            raise ValueError(f"{here} is missing")
    return kind(**values)


@functools.cache
def _type_hints(kind: object) -> dict[str, Any]:
    return get_type_hints(kind)


@functools.cache
def _plain_types(declared: Any) -> frozenset[type]:
    """Types whose values are what was declared just as they come from JSON."""
    kinds = get_args(declared) if get_origin(declared) in (Union, types.UnionType) else (declared,)
    return frozenset({str, int, float, bool, type(None)}.intersection(kinds))


def _read(declared: Any, value: Any, *, trail: str) -> Any:
    """A JSON value as what it was declared to be."""
    if declared is Any:
        return value
    origin, arguments = get_origin(declared), get_args(declared)
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, trail=trail)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{trail}: got {_shown(value)}, expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{trail}: got {_shown(value)}, expected an object")
        if {*map(type, value.values())} <= _plain_types(arguments[1]):
            return dict(value)  # a million rows are not looked at one by one
        return {key: _read(arguments[1], item, trail=f"{trail}.{key}") for key, item in value.items()}
    if origin is not None and issubclass(origin, Sequence):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{trail}: got {_shown(value)}, expected a list")
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        if fixed and len(value) != len(arguments):
            raise ValueError(f"{trail}: got {len(value)} values, expected {len(arguments)}")
        kinds = arguments if fixed else [arguments[0]] * len(value)
        return tuple(
            _read(kind, item, trail=f"{trail}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if isinstance(declared, type) and dataclasses.is_dataclass(declared):
        return _read_record(declared, value, trail=trail)
    return _read_plain(declared, value, trail=trail)


def _read_union(kinds: Sequence[Any], value: Any, *, trail: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    problems = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return _read(kind, value, trail=trail)
            except ValueError as error:
                problems.append(str(error))
    raise ValueError("; ".join(problems))


def _read_plain(declared: Any, value: Any, *, trail: str) -> Any:
    """Text, numbers, enums and paths."""
    if issubclass(declared, Enum):
        try:
            return declared(value)
        except ValueError as error:
            raise ValueError(f"{trail}: {error}") from None
    if issubclass(declared, PurePath) and isinstance(value, str):
        return declared(value)
    if declared is float and (value is None or value in ("inf", "-inf")):
        return math.nan if value is None else float(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if declared is float and is_number:
        try:
            float(value)
        except OverflowError:
            raise ValueError(f"{trail}: got {_shown(value)}, expected a number that a float can be") from None
        return value
    if isinstance(value, declared) and (declared is not int or is_number):
        return value
    raise ValueError(f"{trail}: got {_shown(value)}, expected {declared.__name__}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def parse_json(text: str | bytes) -> Any:
    """What a JSON text of whatever origin says.

    Raises:
        ValueError: It is no JSON, has a word JSON has not (NaN), or is nested more deeply than anything we write.
    """
    try:
        return _DECODER.decode(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refused(word: str) -> Any:
    raise ValueError(f"got {word}, which is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refused)


def canonical_json(value: Any, *, fallback: Callable[[Any], Any] | None = None) -> str:
    """One line of JSON that is the same text for equal content (sorted keys, no spaces): what hashes are made of."""
    plain = to_jsonable(value, fallback=fallback)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def pretty_json(value: Any) -> str:
    """Indented JSON with a final newline, keys in the order given."""
    return json.dumps(to_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def hash_json(value: Any) -> str:
    """SHA-256 (64 hex digits) of a value's canonical JSON; the order of mapping keys does not matter.

    Raises:
        TypeError: for a value with neither a JSON form nor a `repr` that is the same in every process.
    """
    text = canonical_json(value, fallback=_stable_repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _stable_repr(value: Any) -> str:
    text, kind = repr(value), f"{type(value).__module__}.{type(value).__qualname__}"
    if ADDRESS.search(text):
        raise TypeError(
            f"got a {kind}, whose only text is a memory address; expected a value that can be fingerprinted. Convert "
            "it to plain values, or give its class a __repr__ that shows its content."
        )
    return f"{kind}:{text}"


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
