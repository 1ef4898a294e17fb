"""JSON documents on disk: strict (no NaN), free of secrets, and written whole or not at all.

`to_json` and `from_json` are the one way of a frozen record to JSON and back: fields by name, nested records, tuples,
mappings and enums by the types they are declared with. `to_jsonable` does the same for values of no declared type.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import socket
import time
import types
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record")

MASK = "***"
"""What stands in place of a secret."""

_KEY_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = frozenset(
    {
        "token",
        "authorization",
        "password",
        "passwd",
        "secret",
        "secrets",
        "credential",
        "credentials",
        "bearer",
        "apikey",
        "passphrase",
    }
)
_KEY_KINDS = frozenset({"api", "access", "private", "secret", "auth", "signing"})
_MODEL_TOKENS = frozenset({"bos", "eos", "pad", "unk", "mask", "sep", "cls", "special", "added"})
_SECRET_TEXT = re.compile(
    r"""(?xi)
    \b(?: sk | pk | hf | ghp | gho | github_pat | xox[abp] ) [-_] [A-Za-z0-9_\-]{16,}
    | (?<= bearer\s ) [A-Za-z0-9._\-]{12,}
    | (?<= api_key= ) [^\s&,;'"]{8,} | (?<= api-key: ) \s* [^\s&,;'"]{8,}
    """
)


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_TEMPORARY = re.compile(
    r"\.(?P<name>.*)\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d{1,10})\.[0-9a-f]{12}\.tmp(?P<aside>\.old)?"
)
_LEFTOVER_AFTER_S = 3600.0


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
    return cast("Record", _read_record(kind, document, trail=kind.__name__))


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
        return value
    if isinstance(value, declared) and (declared is not int or is_number):
        return value
    raise ValueError(f"{trail}: got {_shown(value)}, expected {declared.__name__}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def canonical_json(value: Any, *, fallback: Callable[[Any], Any] | None = None) -> str:
    """One line of JSON that is the same text for equal content (sorted keys, no spaces): what hashes are made of."""
    plain = to_jsonable(value, fallback=fallback)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def pretty_json(value: Any) -> str:
    """Indented JSON with a final newline, keys in the order given."""
    return json.dumps(to_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def is_secret_key(key: str) -> bool:
    """Whether a mapping key looks like it names a credential (`api_key`, `HF_TOKEN`, `Authorization`).

    `input_tokens`, `max_tokens`, `eos_token` and the like are not credentials.
    """
    words = [word.lower() for word in _KEY_WORDS.findall(key)]
    if _MODEL_TOKENS.intersection(words):
        return False
    if _SECRET_WORDS.intersection(words):
        return not (words[-1] in {"count", "counts", "id", "ids", "limit", "usage"} and "token" in words)
    return any(second == "key" and first in _KEY_KINDS for first, second in itertools.pairwise(words))


def mask_text(text: str) -> str:
    """The text with everything that looks like a credential (`sk-...`, `Bearer ...`) replaced."""
    return _SECRET_TEXT.sub(MASK, text)


def mask_secrets(value: Any) -> Any:
    """A JSON value with the values of credential-like keys, and credential-like text, replaced by `***`."""
    if isinstance(value, Mapping):
        return {
            key: MASK if item not in (None, "", [], {}) and is_secret_key(str(key)) else mask_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [mask_secrets(item) for item in value]
    return mask_text(value) if isinstance(value, str) else value


def find_credential(value: Any, *, trail: str = "") -> str | None:
    """Where in a JSON value something stands that by key *and* content looks like a credential; None when nowhere.

    For documents that must come back as they were: there a data field that is merely called `token` is no secret.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            here = f"{trail} > {key}" if trail else str(key)
            if isinstance(item, str) and is_secret_key(str(key)) and _looks_random(item):
                return here
            if found := find_credential(item, trail=here):
                return found
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if found := find_credential(item, trail=f"{trail} > {index}" if trail else str(index)):
                return found
    elif isinstance(value, str) and _SECRET_TEXT.search(value):
        return trail or "the value"
    return None


def _looks_random(text: str) -> bool:
    return len(text) >= 12 and not any(c.isspace() for c in text) and any(c.isdigit() for c in text)


def temporary_name(path: Path) -> Path:
    """A new name beside `path` for what is not finished: hidden, and it says which process of which machine writes.

    What a killed process leaves under such a name is removed by `remove_leftovers`.
    """
    return path.parent / f".{path.name[:80]}.{_machine()}-{os.getpid()}.{secrets.token_hex(6)}.tmp"


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left under temporary names in `folder`: files and folders.

    A name of this machine is deleted when its process no longer lives; of another machine (a shared disk), when it is
    more than an hour old. A predecessor that stepped aside (`.old` behind the name) goes only when its successor is
    there. What is not named by `temporary_name` is left alone.
    """
    try:
        found = [(entry, match) for entry in os.scandir(folder) if (match := _TEMPORARY.fullmatch(entry.name))]
    except OSError:
        return  # no folder, or it cannot be listed: whoever writes to it next will say so
    for entry, match in found:
        try:
            if match["aside"] and not (Path(folder) / match["name"]).exists():
                continue  # it stepped aside for a successor that never came: the only copy
            if _is_abandoned(match["machine"], int(match["pid"]), entry.stat(follow_symlinks=False).st_mtime):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
        except OSError:
            continue  # removed by another process at this moment, or not ours to remove: harmless where it is


def _is_abandoned(machine: str, pid: int, written_s: float) -> bool:
    if pid == os.getpid() and machine == _machine():
        return False
    # Signal 0 asks whether a process lives; on Windows it would end it.
    if machine == _machine() and os.name == "posix":
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:
            pass  # another user's, alive
    return time.time() - written_s > _LEFTOVER_AFTER_S  # even a living one's: numbers are given out again


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def hash_json(value: Any) -> str:
    """SHA-256 (64 hex digits) of a value's canonical JSON; the order of mapping keys does not matter.

    Raises:
        TypeError: for a value with neither a JSON form nor a `repr` that is the same in every process.
    """
    return hashlib.sha256(canonical_json(value, fallback=_stable_repr).encode("utf-8")).hexdigest()


def _stable_repr(value: Any) -> str:
    text, kind = repr(value), f"{type(value).__module__}.{type(value).__qualname__}"
    if _ADDRESS.search(text):
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


def write_atomic(path: Path, data: str | bytes) -> Path:
    """Write a file under a temporary name beside `path`, then rename: who sees the name sees the whole content.

    What killed processes left half-written in the folder is removed on the way.

    Raises:
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary = temporary_name(path)
    try:
        # os.open rather than tempfile: a report is meant to be read by others, so the umask decides its mode.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
