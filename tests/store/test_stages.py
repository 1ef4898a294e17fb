import threading
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copa_harness.store.stages import StageStore


def test_what_was_put_comes_back(tmp_path):
    store = StageStore(tmp_path / "stages")
    store.put("iris/joint", {"score": 0.5, "rows": [1, None, "ä"], "deep": {"a": [{}]}})
    assert StageStore(tmp_path / "stages").get("iris/joint") == {
        "score": 0.5,
        "rows": [1, None, "ä"],
        "deep": {"a": [{}]},
    }


def test_nothing_is_created_before_the_first_put(tmp_path):
    assert StageStore(tmp_path / "stages").get("x") is None
    assert list(tmp_path.iterdir()) == []


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_is_a_key_and_two_keys_never_meet(one, other):
    store = StageStore.__new__(StageStore)
    from pathlib import Path

    store.directory = Path("x")
    assert (store.path(one) == store.path(other)) == (one == other)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("0.5", "0.9"),
        lambda text: "",
        lambda text: "[]",
        lambda text: "\x00\x01",
    ],
)
def test_a_damaged_file_is_missing_with_one_warning_and_can_be_replaced(tmp_path, damage):
    store = StageStore(tmp_path)
    store.put("k", {"score": 0.5})
    store.path("k").write_text(damage(store.path("k").read_text()))
    with pytest.warns(RuntimeWarning, match="ignored"):
        assert store.get("k") is None
    assert store.get("k") is None  # the second time silently: warnings are errors here
    store.put("k", {"score": 0.7})
    assert store.get("k") == {"score": 0.7}


def test_bytes_that_are_no_text_are_missing(tmp_path):
    store = StageStore(tmp_path)
    store.put("k", {})
    store.path("k").write_bytes(b"\xff\xfe\x00")
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert store.get("k") is None


def test_a_file_moved_to_another_key_is_not_believed(tmp_path):
    store = StageStore(tmp_path)
    store.put("a", {"x": 1})
    store.put("b", {"x": 2})
    store.path("a").replace(store.path("b"))
    with pytest.warns(RuntimeWarning, match="checksum"):
        assert store.get("b") is None


def test_a_result_of_another_schema_is_missing_without_a_warning(tmp_path):
    store = StageStore(tmp_path)
    store.put("k", {})
    store.path("k").write_text(store.path("k").read_text().replace('"schema": 1', '"schema": 99'))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.get("k") is None


def test_not_a_number_comes_back_as_none(tmp_path):
    store = StageStore(tmp_path)
    store.put("k", {"score": float("nan"), "calls": float("inf")})
    assert store.get("k") == {"score": None, "calls": None}


def test_a_value_without_json_form_is_refused(tmp_path):
    with pytest.raises(TypeError, match="no JSON form"):
        StageStore(tmp_path).put("k", {"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_credential_is_not_written_and_the_stage_not_kept(tmp_path):
    store = StageStore(tmp_path)
    with pytest.warns(RuntimeWarning, match="lm > api_key looks like a credential"):
        store.put("k", {"lm": {"api_key": "abcd1234efgh5678"}})
    assert store.get("k") is None
    assert list(tmp_path.iterdir()) == []


def test_a_data_field_called_token_comes_back_as_it_was(tmp_path):
    store = StageStore(tmp_path)
    store.put("k", {"demos": [{"token": "Paris", "input_tokens": 7}]})
    assert store.get("k") == {"demos": [{"token": "Paris", "input_tokens": 7}]}


def test_many_threads_writing_one_key_leave_one_whole_result(tmp_path):
    store = StageStore(tmp_path)
    threads = [threading.Thread(target=store.put, args=("k", {"n": [i] * 500})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result = store.get("k")
    assert result is not None
    assert len(set(result["n"])) == 1
    assert [p.suffix for p in store.path("k").parent.iterdir()] == [".json"]


def test_a_folder_that_cannot_be_made_is_an_os_error_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        StageStore(tmp_path / "file" / "stages").put("k", {})
