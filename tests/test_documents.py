import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copa_harness.documents import canonical_json, from_json, hash_file, hash_json, pretty_json, to_json, to_jsonable

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


def test_pretty_json_keeps_the_order_given():
    assert pretty_json({"b": 1, "a": math.inf}) == '{\n  "b": 1,\n  "a": null\n}\n'


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
