"""The two-hop task: what its program searches with, the official metrics, and splits without a document in common."""

import json
import sys
import types

import dspy
import pytest

from copa_harness.errors import TaskError
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.session.optimizations import program_fingerprint
from copa_harness.tasks import hotpotqa
from copa_harness.tasks.hotpotqa import answer_f1, answer_match, two_hop_program

pytest.importorskip("bm25s")


def row(number, *, titles=None):
    titles = titles or (f"River {number}", f"Town {number}")
    return {
        "question": f"Which town lies on river {number}?",
        "answer": f"the Town, {number}",
        "supporting_facts": {"title": list(titles), "sent_id": [0] * len(titles)},
        "context": {
            "title": [f"River {number}", f"Town {number}"],
            "sentences": [[f"River {number} flows", " north."], [f"Town {number} lies on a river."]],
        },
    }


def written(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(one) for one in rows) if name.endswith("l") else json.dumps(rows))
    return path


def made(path, **options):
    return hotpotqa(path, **{"n_train": 3, "n_val": 2, "n_test": 4, **options})


@pytest.mark.parametrize(
    ("said", "gold", "exact", "f1"),
    [
        ("The Beatles!", "beatles", 1.0, 1.0),
        ("Paris, France", "paris", 0.0, 2 / 3),
        ("yes", "yes", 1.0, 1.0),
        ("yes it is", "yes", 0.0, 0.0),
        ("no", "nothing", 0.0, 0.0),
        ("", "paris", 0.0, 0.0),
        (None, "paris", 0.0, 0.0),
        ("a b b c", "b b d", 0.0, 2 * 2 / (3 + 3)),
    ],
)
def test_scores_are_those_of_the_official_script(said, gold, exact, f1):
    example, prediction = dspy.Example(answer=gold), dspy.Prediction(answer=said)
    assert answer_match(example, prediction) == exact
    assert answer_f1(example, prediction) == pytest.approx(f1)


def test_the_program_searches_twice_and_answers_from_what_both_searches_found(tmp_path):
    seen = []

    def answer(messages):
        text = messages[-1]["content"]
        seen.append(text)
        if len(seen) == 1:
            return {"reasoning": "r", "query": "river 5"}
        return {"reasoning": "r", "query": "town 7"} if len(seen) == 2 else {"reasoning": "r", "answer": "Town 5"}

    passages = [f"{kind} {i} | a {kind}" for kind in ("River", "Town") for i in range(10)]
    program = two_hop_program(passages, n_passages=1)
    with dspy.context(lm=ScriptedLM(answer)):
        prediction = program(question="Which town?")
    assert prediction.answer == "Town 5"
    assert [("River 5 |" in text, "Town 7 |" in text) for text in seen] == [(False, False), (True, False), (True, True)]


def test_the_best_passages_are_found_and_a_query_of_no_words_finds_the_first():
    search = two_hop_program(["a lake", "the green hill", "a hill"], n_passages=2).search
    assert search("green hills on a hill") == ["the green hill", "a hill"]
    assert search("?!") == ["a lake", "the green hill"]


def test_no_row_has_a_label_for_a_stage_in_between(tmp_path):
    task = made(written(tmp_path, map(row, range(12))))
    assert {key for example in task.trainset for key in example.keys()} == {"question", "answer"}  # noqa: SIM118
    assert [name for name, _ in task.program.named_predictors()] == [
        "first_query.predict",
        "second_query.predict",
        "answer.predict",
    ]


def test_questions_that_share_a_document_lie_in_one_split_and_form_one_group(tmp_path):
    rows = [row(i) for i in range(12)]
    rows[1]["supporting_facts"]["title"] = ["River 0", "Town 1"]
    rows[2]["supporting_facts"]["title"] = ["Town 1", "Town 2"]
    for seed in range(5):
        task = made(written(tmp_path, rows), seed=seed, n_test=5, n_train=4, n_val=3)
        splits = [{e.question for e in split} for split in (task.trainset, task.valset, task.testset)]
        together = {rows[i]["question"] for i in (0, 1, 2)}
        assert sum(bool(split & together) for split in splits) == 1
    groups = {task.group(dspy.Example(question=rows[i]["question"])) for i in (0, 1, 2)}
    assert len(groups) == 1
    assert task.group(dspy.Example(question=rows[3]["question"])) not in groups


def test_test_rows_stay_when_fewer_are_labelled_and_change_with_the_seed(tmp_path):
    path = written(tmp_path, map(row, range(30)))
    assert made(path).testset == made(path, n_train=9).testset
    assert made(path).testset != made(path, seed=1).testset


def test_the_authors_own_file_gives_the_same_task(tmp_path):
    rows = [row(i) for i in range(12)]
    theirs = [
        {
            **one,
            "supporting_facts": [[title, 0] for title in one["supporting_facts"]["title"]],
            "context": [list(pair) for pair in zip(one["context"]["title"], one["context"]["sentences"], strict=True)],
        }
        for one in rows
    ]
    ours, other = made(written(tmp_path, rows)), made(written(tmp_path, theirs, "dev.json"))
    assert ours.testset == other.testset
    assert program_fingerprint(ours.program) == program_fingerprint(other.program)


def test_other_passages_make_another_program():
    one, same, other = (two_hop_program(texts, n_passages=1) for texts in (["a hill"], ["a hill"], ["a lake"]))
    assert program_fingerprint(one) == program_fingerprint(same) != program_fingerprint(other)
    assert one.deepcopy().search is one.search


def test_without_a_file_the_validation_split_is_loaded(monkeypatch):
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        return {"validation": [row(i) for i in range(12)]}

    monkeypatch.delenv("COPA_HOTPOTQA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert len(made(None).testset) == 4
    assert asked == [("hotpotqa/hotpot_qa", "distractor")]


def test_without_the_search_library_the_remedy_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(TaskError, match=r"pip install bm25s"):
        made(written(tmp_path, map(row, range(12))))


def test_a_row_without_passages_and_an_unknown_metric_are_refused(tmp_path):
    with pytest.raises(TaskError, match="without titles and sentences"):
        made(written(tmp_path, [{**row(0), "context": ["x"]}]))
    with pytest.raises(TaskError, match="'exact' or 'f1'"):
        hotpotqa(written(tmp_path, [row(0)]), metric="rouge")
