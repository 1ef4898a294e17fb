"""Word problems: which number an answer gives, and rows from the authors' files."""

import json
import sys
import types
from fractions import Fraction

import dspy
import pytest

from copa_harness.errors import TaskError
from copa_harness.tasks import gsm8k
from copa_harness.tasks.gsm8k import last_number, same_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", 72),
        ("She sold $1,234.50 in all.", Fraction(2469, 2)),
        ("1,000,000 grains", 1_000_000),
        ("10,000, then", 10_000),
        ("12 km/h", 12),
        ("50%", 50),
        ("5kg", 5),
        ("an area of 9 m2", 9),
        ("3/4 of a cake", Fraction(3, 4)),
        ("1 3/4 cups", Fraction(7, 4)),
        ("10 20 3/4", Fraction(83, 4)),
        ("-$5", -5),
        ("$-5", -5),
        ("\u22123", -3),
        ("15-5", 5),
        ("12 - 7 = 5", 5),
        ("1,2,3", 3),
        (".5", Fraction(1, 2)),
        ("The answer is 5.", 5),
        ("#### 18", 18),
        ("1/0", None),
        ("CO2", None),
        ("none", None),
        (None, None),
        (7.0, 7),
    ],
)
def test_the_last_number_is_read_exactly(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("said", "gold", "score"),
    [
        ("so $1,200.00", "1200", 1.0),
        ("0.3333333333", "1/3", 1.0),
        ("0.33", "1/3", 0.0),
        ("first 18, then 19", "18", 0.0),
        ("eighteen", "18", 0.0),
        ("0", "0", 1.0),
    ],
)
def test_answers_are_right_when_their_last_numbers_are_equal(said, gold, score):
    assert same_number(dspy.Example(answer=gold), dspy.Prediction(answer=said)) == score


def rows(kind, n):
    return [
        {"question": f"{kind} {i}?", "answer": f"{i}+1 = <<{i}+1={i + 1}>>{i + 1} eggs.\n#### {i + 1}"}
        for i in range(n)
    ]


@pytest.fixture
def folder(tmp_path):
    for kind in ("train", "test"):
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, rows(kind, 12))))
    return tmp_path


def test_training_and_test_rows_come_from_the_authors_own_splits(folder):
    task = gsm8k(folder, n_train=7, n_val=5, n_test=12)
    assert all(e.question.startswith("train") for e in (*task.trainset, *task.valset))
    assert all(e.question.startswith("test") for e in task.testset)


def test_the_written_solution_is_the_reasoning_without_the_calculators_notes(folder):
    example = gsm8k(folder, n_train=1, n_val=1, n_test=1).trainset[0]
    number = int(example.answer)
    assert example.reasoning == f"{number - 1}+1 = {number} eggs."
    without = gsm8k(folder, n_train=1, n_val=1, n_test=1, rationales=False).trainset[0]
    assert set(without.keys()) == {"question", "answer"}


def test_one_file_gives_three_splits_without_a_row_in_common(folder):
    task = gsm8k(folder / "train.jsonl", n_train=5, n_val=3, n_test=4)
    assert len({e.question for split in (task.trainset, task.valset, task.testset) for e in split}) == 12


def test_without_a_file_the_public_data_set_is_loaded(monkeypatch):
    monkeypatch.delenv("COPA_GSM8K", raising=False)
    loaded = {"train": rows("train", 4), "test": rows("test", 4)}
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *names: loaded))
    assert len(gsm8k(n_train=2, n_val=2, n_test=4).testset) == 4


def test_too_few_rows_and_a_solution_without_a_number_are_refused(folder):
    with pytest.raises(TaskError, match="asked for 99 test rows; expected 1 to 12"):
        gsm8k(folder, n_test=99)
    (folder / "test.jsonl").write_text(json.dumps({"question": "q", "answer": "no idea"}))
    with pytest.raises(TaskError, match="without a number"):
        gsm8k(folder)
