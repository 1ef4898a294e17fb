"""Rows from files and public data sets, and splits that share neither a text nor a group."""

import json
import sys
import types

import numpy as np
import pytest

from copa_harness.errors import TaskError
from copa_harness.tasks.rows import draw_groups, from_hub, read_rows


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"a": "x, y", "b": "1"}\n\n{"a": "z", "b": "2"}\n'),
        ("rows.json", '[{"a": "x, y", "b": "1"}, {"a": "z", "b": "2"}]'),
        ("rows.csv", 'a,b\n"x, y",1\nz,2\n'),
    ],
)
def test_files_of_every_form_give_the_same_rows(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    assert read_rows(path, task="toy", fields=("a", "b")) == [{"a": "x, y", "b": "1"}, {"a": "z", "b": "2"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", '{"a": 1}\n{"b": 1}\n', "row 2 lacks a"),
        ("rows.jsonl", "{", "cannot be parsed"),
        ("rows.json", '{"a": 1}', "one dict"),
        ("rows.json", "[1]", "row 1 lacks a"),
        ("rows.csv", "b\n1\n", "row 1 lacks a"),
    ],
)
def test_a_file_of_another_form_is_refused_with_the_place(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(TaskError, match=f"toy: .*{words}"):
        read_rows(path, task="toy", fields=("a",))


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(TaskError, match=r"cannot read .*none\.jsonl"):
        read_rows(tmp_path / "none.jsonl", task="toy", fields=("a",))


def test_groups_stay_together_and_the_first_split_stays_when_others_change():
    rows = [(group, i) for group in "abcdefgh" for i in range(1 + ord(group) % 3)]
    few = draw_groups(rows, lambda row: row[0], {"test": 4, "train": 3}, rng=np.random.default_rng(1), task="toy")
    many = draw_groups(rows, lambda row: row[0], {"test": 4, "train": 8}, rng=np.random.default_rng(1), task="toy")
    assert few["test"] == many["test"]
    assert [len(split) for split in many.values()] == [4, 8]
    assert not {group for group, _ in many["test"]} & {group for group, _ in many["train"]}


def test_more_rows_than_there_are_are_refused():
    with pytest.raises(TaskError, match="asked for 3 test rows; expected 1 to 2"):
        draw_groups([1, 2], lambda row: row, {"test": 3}, rng=np.random.default_rng(0), task="toy")


def test_without_the_package_datasets_the_file_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=r"toy: no file was named.*datasets is not installed.*path=x"):
        from_hub("a/b", None, task="toy", file="path=x")


def test_a_data_set_that_cannot_be_had_is_a_task_error(monkeypatch):
    def load_dataset(name, config):
        raise ConnectionError(json.dumps([name, config]))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(TaskError, match=r"a/b could not be loaded \(ConnectionError"):
        from_hub("a/b", "c", task="toy", file="path=x")
