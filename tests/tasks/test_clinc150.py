"""The intents task: rows from the authors' file, as evenly over the intents as can be, in three separate splits."""

import json
import typing
from collections import Counter

import pytest

from copa_harness.errors import TaskError
from copa_harness.tasks import clinc150

INTENTS = ("alarm", "balance", "weather")


def document(n=8):
    rows = {
        split: [[f"{split} {intent} {i}", intent] for intent in INTENTS for i in range(n)]
        for split in ("train", "val", "test")
    }
    return {**rows, **{f"oos_{split}": [[f"{split} nothing {i}", "oos"] for i in range(n)] for split in rows}}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data_small.json"
    path.write_text(json.dumps(document()))
    return path


def made(file, **options):
    return clinc150(file, **{"intents": INTENTS, "n_train": 7, "n_val": 6, "n_test": 9, **options})


def test_splits_come_from_the_data_sets_own_and_are_even(file):
    task = made(file)
    assert Counter(example.intent for example in task.testset) == dict.fromkeys(INTENTS, 3)
    assert sorted(Counter(example.intent for example in task.trainset).values()) == [2, 2, 3]
    assert all(example.text.startswith("val ") for example in task.valset)


def test_the_program_is_typed_with_the_intents_in_question(file):
    (predictor,) = made(file, intents=2).program.predictors()
    assert typing.get_args(predictor.signature.output_fields["intent"].annotation) == ("alarm", "balance")


def test_sentences_of_no_intent_are_one_more_label(file):
    task = made(file, out_of_scope=True, n_test=8)
    assert Counter(example.intent for example in task.testset) == dict.fromkeys((*INTENTS, "out_of_scope"), 2)


def test_the_seed_chooses_the_rows_and_test_rows_stay_when_fewer_are_labelled(file):
    texts = [example.text for example in made(file).testset]
    assert [example.text for example in made(file, n_train=3).testset] == texts
    assert [example.text for example in made(file, seed=1).testset] != texts


def test_a_sentence_that_stands_in_two_splits_is_drawn_once(tmp_path):
    rows = document(3)
    rows["train"].append(rows["test"][0])
    path = tmp_path / "file.json"
    path.write_text(json.dumps(rows))
    task = made(path, n_train=9, n_val=3, n_test=9)
    assert not {e.text for e in task.trainset} & {e.text for e in task.testset}


def test_the_metric_forgives_case_and_blanks(file):
    task = made(file)
    assert task.metric(task.testset[0], type("P", (), {"intent": f" {task.testset[0].intent.upper()} "})) == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"intents": ("alarm", "tax")}, "unknown intents tax"),
        ({"intents": 1}, "expected 2 to 3"),
        ({"intents": ("alarm",)}, "at least 2"),
        ({"n_test": 99}, "clinc150: test: asked for 99 rows of 3 labels; there are 24"),
    ],
)
def test_what_cannot_be_drawn_is_said(file, change, words):
    with pytest.raises(TaskError, match=words):
        made(file, **change)


@pytest.mark.parametrize(
    ("content", "words"),
    [("[", "is not JSON"), ("[]", "no list 'train'"), ('{"train": [["a"]]}', "no list 'train'")],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, words):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(TaskError, match=words):
        clinc150(path)


def test_a_missing_file_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("COPA_CLINC150", str(tmp_path / "none.json"))
    with pytest.raises(TaskError, match=r"none\.json.*github\.com/clinc/oos-eval"):
        clinc150()
