import hashlib
import json
import math
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copa_harness.documents import (
    canonical_json,
    find_credential,
    from_json,
    hash_file,
    hash_json,
    is_secret_key,
    mask_secrets,
    mask_text,
    pretty_json,
    remove_leftovers,
    temporary_name,
    to_json,
    to_jsonable,
    write_atomic,
)

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=15,
)


@given(anything)
def test_anything_becomes_strict_json(value):
    json.loads(json.dumps(to_jsonable(value), allow_nan=False))


class Colour(Enum):
    RED = "red"


@dataclass
class Point:
    x: float
    path: Path


def test_known_types_become_what_they_mean():
    known = {"a": np.float64(0.5), "b": np.arange(2), "c": Colour.RED, "d": Point(math.nan, Path("a/b"))}
    assert to_jsonable(known) == {"a": 0.5, "b": [0, 1], "c": "red", "d": {"x": None, "path": "a/b"}}
    assert to_jsonable({2, 1}) == [1, 2]


def test_digests_stay_what_they_are_since_finished_work_is_found_by_them(tmp_path):
    value = {"b": [1, 2.5, None, math.nan], "a": "grüße", "s": {2, 1}, "p": Path("x/y"), "c": complex(1, 2)}
    assert hash_json(value) == "b925e20e0ca307786e9e8c15772529298d453d394504059301a573bf9aa886cf"
    (tmp_path / "file").write_bytes(b"abc" * 10**6)
    assert hash_file(tmp_path / "file") == hashlib.sha256(b"abc" * 10**6).hexdigest()


def test_sets_are_the_same_text_in_every_process():
    assert canonical_json({"b", "a", "c"}) == '["a","b","c"]'


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "API-KEY",
        "apiKey",
        "OPENAI_API_KEY",
        "hf_token",
        "Authorization",
        "aws_secret_access_key",
        "password",
        "x-api-key",
        "authToken",
        "bearer",
    ],
)
def test_names_of_credentials_are_known(key):
    assert is_secret_key(key)


@pytest.mark.parametrize(
    "key",
    [
        "input_tokens",
        "max_tokens",
        "tokens",
        "eos_token",
        "pad_token_id",
        "token_count",
        "tokenizer",
        "key",
        "keyboard",
        "author",
        "monkey",
        "primary_key",
        "example_id",
        "passed",
    ],
)
def test_names_of_other_things_are_left_alone(key):
    assert not is_secret_key(key)


def test_credentials_are_masked_by_key_and_by_look():
    masked = mask_secrets({"lm": {"api_key": "x", "model": "m"}, "list": ["sk-abcdefghijklmnop1234"], "token": ""})
    assert masked == {"lm": {"api_key": "***", "model": "m"}, "list": ["***"], "token": ""}
    assert mask_text("Authorization: Bearer abcdef123456789") == "Authorization: Bearer ***"
    assert mask_text("a risk-averse-and-long-hyphenated-word") == "a risk-averse-and-long-hyphenated-word"


def test_a_credential_is_found_with_its_place():
    assert find_credential({"a": [{"api_key": "abcd1234efgh5678"}]}) == "a > 0 > api_key"
    assert find_credential({"demos": [{"token": "Paris"}]}) is None


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    write_atomic(path, "one")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_atomic(path, "two")
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_written_file_obeys_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        write_atomic(tmp_path / "f", "x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


def test_pretty_json_keeps_the_order_given():
    assert pretty_json({"b": 1, "a": math.inf}) == '{\n  "b": 1,\n  "a": null\n}\n'


def dead_pid():
    """The number of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    return ended.pid


def leftover(path, monkeypatch, *, pid=None, machine=None, age_s=0.0):
    """A file (a folder for a name without dot) under the temporary name another process would give it."""
    with monkeypatch.context() as patch:
        if pid is not None:
            patch.setattr(os, "getpid", lambda: pid)
        if machine is not None:
            patch.setattr(socket, "gethostname", lambda: machine)
        temporary = temporary_name(path)
    if "." in path.name:
        temporary.write_text("hal")
    else:
        temporary.mkdir()
        (temporary / "half").write_text("hal")
    then = time.time() - age_s
    os.utime(temporary, (then, then))
    return temporary


def test_what_a_killed_process_left_half_written_is_removed_by_the_next_write(tmp_path):
    killed = (
        "import os, signal, sys; from pathlib import Path; from copa_harness import documents;"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "documents.write_atomic(Path(sys.argv[1]) / 'latest.json', 'x' * 100)"
    )
    subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False)
    assert [path.name.endswith(".tmp") for path in tmp_path.iterdir()] == [True]
    write_atomic(tmp_path / "other.json", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_leftovers_of_the_dead_and_the_very_old_go_and_nothing_else_does(tmp_path, monkeypatch):
    dead = dead_pid()
    gone = [
        leftover(tmp_path / "a.json", monkeypatch, pid=dead),
        leftover(tmp_path / "artifact", monkeypatch, pid=dead),
        leftover(tmp_path / "b.json", monkeypatch, pid=dead, machine="elsewhere", age_s=4000),
        leftover(tmp_path / "c.json", monkeypatch, pid=os.getppid(), age_s=4000),
    ]
    kept = [
        leftover(tmp_path / "d.json", monkeypatch, pid=os.getppid()),
        leftover(tmp_path / "e.json", monkeypatch),
        leftover(tmp_path / "f.json", monkeypatch, pid=dead, machine="elsewhere"),
    ]
    for name in (f".notes.{dead}.tmp", ".hidden", "latest.json", f"{dead}.tmp"):
        (tmp_path / name).write_text("somebody's")
        kept.append(tmp_path / name)
    remove_leftovers(tmp_path)
    assert not [path.name for path in gone if path.exists()]
    assert all(path.exists() for path in kept)
    remove_leftovers(tmp_path / "no such folder")


def test_a_predecessor_that_stepped_aside_goes_only_when_its_successor_is_there(tmp_path, monkeypatch):
    temporary = leftover(tmp_path / "artifact", monkeypatch, pid=dead_pid())
    aside = temporary.rename(temporary.with_name(f"{temporary.name}.old"))
    remove_leftovers(tmp_path)
    assert (aside / "half").exists()
    (tmp_path / "artifact").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


@dataclass(frozen=True, slots=True)
class Corner:
    x: float
    y: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything:
    name: str
    count: int = 0
    share: float = 0.5
    maybe: float | None = None
    colour: Colour = Colour.RED
    word: Literal["yes", "no"] = "yes"
    where: Path = Path("a")
    point: Corner | None = None
    points: tuple[Corner, ...] = ()
    pair: tuple[str, float] = ("", 0.0)
    by_name: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    anything: Mapping[str, Any] = field(default_factory=dict)


FULL = Everything(
    name="n",
    count=3,
    share=-math.inf,
    maybe=0.25,
    word="no",
    where=Path("a/b"),
    point=Corner(1.0),
    points=(Corner(0.5, 2.0), Corner(1.0, 3.0)),
    pair=("p", 0.5),
    by_name={"a": (1.0, None)},
    anything={"list": [1, "two", None]},
)


@pytest.mark.parametrize("record", [FULL, Everything(name="only")], ids=["full", "defaults"])
def test_a_frozen_record_survives_the_trip_through_json(record):
    assert from_json(Everything, json.loads(json.dumps(to_json(record), allow_nan=False))) == record


def test_a_missing_field_has_its_default_and_an_unknown_one_is_left_out():
    assert from_json(Everything, {"name": "n", "of a newer version": 1}) == Everything(name="n")


def test_none_is_nan_where_a_number_has_no_default():
    point = from_json(Corner, {"x": None, "y": None})
    assert math.isnan(point.x)
    assert point.y == math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, r"Everything\.name: got 3, expected str"),
        ({"count": True}, r"Everything\.count: got True, expected int"),
        ({"colour": "blue"}, r"Everything\.colour: 'blue' is not a valid Colour"),
        ({"word": "maybe"}, r"Everything\.word: got 'maybe', expected one of 'yes', 'no'"),
        ({"points": [{"x": 1}, {"x": "wide"}]}, r"Everything\.points\[1\]\.x: got 'wide', expected float"),
        ({"points": [{}]}, r"Everything\.points\[0\]\.x is missing"),
        ({"pair": ["p"]}, r"Everything\.pair: got 1 values, expected 2"),
        ({"by_name": {"a": 3}}, r"Everything\.by_name\.a: got 3, expected a list"),
        ({"maybe": "no number"}, r"Everything\.maybe: got 'no number', expected float"),
    ],
)
def test_a_part_of_the_wrong_type_is_refused_by_its_place(change, message):
    with pytest.raises(ValueError, match=message):
        from_json(Everything, to_json(FULL) | change)


def test_a_value_without_json_form_is_not_written_in_a_record():
    with pytest.raises(TypeError, match="no JSON form"):
        to_json(Everything(name="n", anything={"odd": object()}))
