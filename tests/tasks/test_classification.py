"""Text classification from any file: which rows, which labels, what is refused."""

import typing
from collections import Counter

import pytest

from copa_harness.errors import TaskError
from copa_harness.tasks import classification

LABELS = ("card_arrival", "lost_card", "top_up")


def table(path, kind, n=10):
    lines = [f'"{kind} {label}, {i}",{label}' for i in range(n) for label in LABELS]
    path.write_text("\n".join(["utterance,category", *lines]))
    return path


@pytest.fixture
def file(tmp_path):
    return table(tmp_path / "banking.csv", "train")


def made(file, **options):
    return classification(file, **{"columns": ("utterance", "category"), "sizes": (6, 3, 9), **options})


def test_rows_are_even_over_the_labels_and_in_one_split_each(file):
    task = made(file)
    assert task.name == "banking"
    assert Counter(example.label for example in task.testset) == dict.fromkeys(LABELS, 3)
    assert len({e.text for split in (task.trainset, task.valset, task.testset) for e in split}) == 18


def test_the_program_is_typed_with_the_labels(file):
    (predictor,) = made(file, labels=2).program.predictors()
    assert typing.get_args(predictor.signature.output_fields["label"].annotation) == LABELS[:2]


def test_test_rows_may_come_from_a_file_of_their_own(file, tmp_path):
    task = made(file, test_path=table(tmp_path / "test.csv", "test"))
    assert all(example.text.startswith("test") for example in task.testset)
    assert all(example.text.startswith("train") for example in (*task.trainset, *task.valset))


def test_test_rows_stay_when_fewer_are_labelled(file):
    assert made(file).testset == made(file, sizes=(3, 3, 9)).testset


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": ("top_up", "tax")}, "unknown labels tax"),
        ({"labels": 4}, "expected 2 to 3"),
        ({"labels": ("top_up",)}, "expected 2 to 3"),
        ({"columns": ("text", "category")}, "lacks text"),
        ({"sizes": (6, 3, 99)}, "banking: test: asked for 99 rows"),
    ],
)
def test_what_cannot_be_drawn_is_said(file, change, words):
    with pytest.raises(TaskError, match=words):
        made(file, **change)


def test_the_metric_forgives_case_and_blanks(file):
    task = made(file)
    example = task.testset[0]
    assert task.metric(example, type("P", (), {"label": f" {example.label.upper()} "})) == 1.0
    assert task.metric(example, type("P", (), {"label": "other"})) == 0.0
