import json
import math
import os
import stat
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copa_harness.documents import (
    canonical_json,
    find_credential,
    is_secret_key,
    mask_secrets,
    mask_text,
    pretty_json,
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
    assert to_jsonable(known) == {
        "a": 0.5, "b": [0, 1], "c": "red", "d": {"x": None, "path": "a/b"}
    }  # fmt: skip
    assert to_jsonable({2, 1}) == [1, 2]


def test_sets_are_the_same_text_in_every_process():
    assert canonical_json({"b", "a", "c"}) == '["a","b","c"]'


@pytest.mark.parametrize(
    "key", ["api_key", "API-KEY", "apiKey", "OPENAI_API_KEY", "hf_token", "Authorization", "aws_secret_access_key",
            "password", "x-api-key", "authToken", "bearer"],
)  # fmt: skip
def test_names_of_credentials_are_known(key):
    assert is_secret_key(key)


@pytest.mark.parametrize(
    "key", ["input_tokens", "max_tokens", "tokens", "eos_token", "pad_token_id", "token_count", "tokenizer", "key",
            "keyboard", "author", "monkey", "primary_key", "example_id", "passed"],
)  # fmt: skip
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
