"""Records out of texts: how fields score, what the metric says, rows from files; and the made orders."""

import enum
import json

import dspy
import pytest
from pydantic import BaseModel

from copa_harness.errors import TaskError
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.session.optimizations import task_fingerprint
from copa_harness.tasks import extraction, order_emails
from copa_harness.tasks.extraction import field_scores, record_score, whole_record


class Size(enum.Enum):
    SMALL = "small"
    LARGE = "large"


class Part(BaseModel):
    name: str
    count: int = 1


class Toy(BaseModel):
    title: str
    size: Size
    price: float | None = None
    box: Part
    parts: list[Part] = []
    tags: list[str] = []


RIGHT = Toy(
    title="Red Car", size=Size.SMALL, price=2, box=Part(name="b"), parts=[Part(name="x", count=2), Part(name="y")],
    tags=["a", "b"],
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "field", "score"),
    [
        ({"title": " red  CAR "}, "title", 1.0),
        ({"title": "Red Cars"}, "title", 0.0),
        ({"size": Size.LARGE}, "size", 0.0),
        ({"price": 2.0}, "price", 1.0),
        ({"price": None}, "price", 0.0),
        ({"box": Part(name="b", count=3)}, "box", 0.5),
        ({"parts": [Part(name="y"), Part(name="x", count=2)]}, "parts", 1.0),
        ({"parts": [Part(name="x", count=1)]}, "parts", 0.25),
        ({"parts": []}, "parts", 0.0),
        ({"parts": [*RIGHT.parts, Part(name="z"), Part(name="z")]}, "parts", 0.5),
        ({"tags": ["b", "c"]}, "tags", 0.5),
    ],
)
def test_a_field_scores_by_what_is_right_in_it_and_the_others_stay_right(change, field, score):
    scores = field_scores(RIGHT, RIGHT.model_copy(update=change))
    assert scores.pop(field) == pytest.approx(score)
    assert set(scores.values()) == {1.0}


def test_a_missing_value_is_right_only_where_none_is_expected():
    nothing = RIGHT.model_copy(update={"price": None})
    assert field_scores(nothing, nothing)["price"] == 1.0
    assert field_scores(nothing, RIGHT)["price"] == 0.0
    assert field_scores(RIGHT, None) == dict.fromkeys(Toy.model_fields, 0.0)


def test_the_score_is_the_mean_of_the_fields_and_the_feedback_names_each():
    said = RIGHT.model_copy(update={"title": "Car", "box": Part(name="c")})
    example, prediction = dspy.Example(record=RIGHT), dspy.Prediction(record=said)
    result = record_score(example, prediction)
    assert result.score == pytest.approx((0 + 0.5 + 4) / 6)
    assert 'title: 0.00, expected "Red Car", got "Car"' in result.feedback
    assert "size: 1.00\n" in result.feedback
    assert "as a whole is not right" in result.feedback
    assert whole_record(example, prediction) == 0.0
    assert whole_record(example, dspy.Prediction(record=RIGHT)) == 1.0
    assert record_score(example, dspy.Prediction(record=RIGHT)).score == 1.0


def test_rows_from_a_file_are_those_given_in_python(tmp_path):
    pairs = [(f"text {i}", RIGHT.model_copy(update={"title": f"car {i}"})) for i in range(6)]
    path = tmp_path / "toys.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "record": r.model_dump(mode="json")}) for text, r in pairs))
    table = tmp_path / "toys.json"
    table.write_text(json.dumps([{"text": text, "record": record.model_dump_json()} for text, record in pairs]))
    made = [extraction(Toy, rows, sizes=(2, 2, 2)) for rows in (pairs, path, table)]
    assert made[0].testset == made[1].testset == made[2].testset


def test_a_record_that_does_not_fit_the_model_is_refused_with_its_row(tmp_path):
    path = tmp_path / "toys.jsonl"
    path.write_text(json.dumps({"text": "x", "record": {"title": "t"}}))
    with pytest.raises(TaskError, match=r"record of row 1 does not fit Toy(.|\n)*size"):
        extraction(Toy, path)


def test_orders_are_made_anew_from_their_seed_and_never_twice():
    task = order_emails()
    assert [len(split) for split in (task.trainset, task.valset, task.testset)] == [40, 24, 60]
    assert task_fingerprint(task) == task_fingerprint(order_emails()) != task_fingerprint(order_emails(1))
    assert task.metric is record_score
    assert order_emails(whole=True).metric is whole_record


def test_an_order_says_what_its_e_mail_says():
    for example in order_emails().trainset:
        order = example.record
        assert order.customer in example.text
        assert order.city is None or order.city in example.text
        for item in order.items:
            assert item.product in example.text
            assert item.colour is None or item.colour in example.text
        assert ("express" in example.text or "tomorrow" in example.text) == (order.delivery.value == "express")


def test_a_right_answer_parses_into_the_model_and_scores_one():
    task = order_emails(n_train=2, n_val=2, n_test=2)
    example = task.testset[0]
    with dspy.context(lm=ScriptedLM(lambda messages: {"record": example.record.model_dump_json()})):
        prediction = task.program(**example.inputs())
    assert prediction.record == example.record
    assert task.metric(example, prediction).score == 1.0
