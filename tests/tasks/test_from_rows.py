"""Tasks out of files and data sets: how rows are split, what is kept of them, and what is refused."""

import csv
import json
import random
import sys
from collections import Counter
from dataclasses import replace

import dspy
import pytest

from copa_harness import ScriptedLM, Task
from copa_harness.errors import TaskError
from copa_harness.evaluate.examples import example_ids
from copa_harness.session import CopaSession, Settings
from copa_harness.session.finish import finish
from copa_harness.tasks.from_rows import grouped, split_evenly

LABELS = ("bug", "idea", "praise")


def tickets(n=90):
    return [
        {
            "text": f"ticket {i}",
            "label": LABELS[i % 3],
            "customer": f"c{i // 2 % 30}",
            "part": ("train", "dev", "test")[i % 3],
        }
        for i in range(n)
    ]


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def made(path, **more):
    return Task.from_file(path, **{"inputs": "text", "output": "label", **more})


def splits(task):
    return task.trainset, task.valset, task.testset


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "JSONL"])
def test_every_format_gives_the_same_task(kind, tmp_path):
    one = made(write(tmp_path / f"tickets.{kind.lower()}", tickets()).rename(tmp_path / f"tickets.{kind}"))
    other = made(write(tmp_path / "other.csv", tickets()))
    assert [example_ids(part) for part in splits(one)] == [example_ids(part) for part in splits(other)]
    assert one.name == "tickets"
    assert one.source.split(": ")[1] == other.source.split(": ")[1]
    assert one.source.startswith(f"tickets.{kind}: 36 + 18 + 36 rows, sha256 ")


def test_labels_have_their_share_in_every_split_and_the_program_knows_them(tmp_path):
    task = made(write(tmp_path / "tickets.csv", tickets()))
    assert [Counter(row.label for row in part) for part in splits(task)] == [
        dict.fromkeys(LABELS, 12),
        dict.fromkeys(LABELS, 6),
        dict.fromkeys(LABELS, 12),
    ]
    assert task.program.signature.output_fields["label"].annotation.__args__ == LABELS
    assert task.metric(task.testset[0], dspy.Prediction(label=f" {task.testset[0].label.upper()}")) == 1.0
    assert task.metric(task.testset[0], dspy.Prediction(label="other")) == 0.0


def test_a_group_lies_in_one_split_and_is_counted_by_the_gates(tmp_path):
    task = made(write(tmp_path / "tickets.csv", tickets()), group="customer")
    found = [{row.customer for row in part} for part in splits(task)]
    assert sum(map(len, found)) == len(set.union(*found)) == 30
    assert task.group == "customer"
    assert [len(part) for part in splits(task)] == pytest.approx([36, 18, 36], abs=3)
    assert not any("customer" in row.inputs() for row in task.testset)


def test_the_order_of_rows_changes_nothing_and_a_new_row_moves_few(tmp_path):
    rows = tickets()
    before = made(write(tmp_path / "a.csv", rows))
    random.Random(1).shuffle(rows)
    shuffled = made(write(tmp_path / "b.csv", rows))
    assert set(example_ids(before.testset)) == set(example_ids(shuffled.testset))
    more = made(write(tmp_path / "c.csv", [*rows, {**rows[0], "text": "a new one"}]))
    moved = set(example_ids(before.testset)) - set(example_ids(more.testset))
    assert len(moved) < 18
    assert before.source.split()[-1] != more.source.split()[-1]
    assert set(example_ids(made(tmp_path / "a.csv", seed=1).testset)) != set(example_ids(before.testset))


def test_rows_with_equal_inputs_are_never_parted(tmp_path):
    rows = [{"text": f"t{i % 20}", "label": LABELS[i % 20 % 3], "customer": f"c{i}"} for i in range(60)]
    for group in (None, "customer"):
        task = made(write(tmp_path / "tickets.csv", rows), group=group)
        assert sum(map(len, splits(task))) == 60
    parts = grouped(
        [{"a": 1, "g": 1}, {"a": 2, "g": 1}, {"a": 2, "g": 2}, {"a": 3, "g": 3}], lambda r: r["a"], lambda r: r["g"]
    )
    assert sorted(map(len, parts)) == [1, 3]


def test_a_column_may_say_the_split(tmp_path):
    task = made(write(tmp_path / "tickets.csv", tickets(9)), split="part")
    assert [len(part) for part in splits(task)] == [3, 3, 3]
    assert {row.label for row in task.valset} == {"idea"}


def test_shares_program_metric_and_types_are_as_given(tmp_path):
    path = write(tmp_path / "sums.jsonl", [{"a": i, "b": 0.5, "sum": i + 0.5} for i in range(20)])
    program = dspy.ChainOfThought("a, b -> sum")
    task = Task.from_file(
        path, inputs=["a", "b"], output="sum", split=(2, 1, 1), program=program, metric=lambda e, p: 1.0
    )
    assert [len(part) for part in splits(task)] == [10, 5, 5]
    assert task.program is program
    plain = Task.from_file(path, inputs=["a", "b"], output="sum")
    assert {name: field.annotation for name, field in plain.program.signature.fields.items()} == {
        "a": int,
        "b": float,
        "sum": float,
    }
    assert plain.metric(plain.testset[0], dspy.Prediction(sum=plain.testset[0].sum)) == 1.0


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    path = write(tmp_path / "tickets.csv", tickets())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(made(path).testset) == 36


BAD = {
    "an unknown ending": ("rows.xlsx", "", {}, r"expected one that ends in \.csv"),
    "no file": (None, "", {}, r"cannot read .*none\.csv"),
    "no rows": ("rows.csv", "text,label\n", {}, "got 0 rows"),
    "an empty file": ("rows.csv", "", {}, "got 0 rows"),
    "no such column": ("rows.csv", "text,other\na,b\n", {}, "row 1 lacks label"),
    "a short row": ("rows.csv", "text,label\na,b\nc\n", {}, "row 2 lacks label"),
    "a long row": ("rows.csv", "text,label\na,b\nc,d,e\n", {}, "row 2 has more cells than the header"),
    "a name twice": ("rows.csv", "text,label,text\na,b,c\n", {}, "header names text twice"),
    "an open quote": ("rows.csv", 'text,label\n"a,b\n', {}, "cannot be parsed"),
    "no label": ("rows.csv", "text,label\na,\nb,x\n", {}, r"row 1 of rows\.csv has no label"),
    "no group": ("rows.csv", "text,label,who\na,x,\n", {"group": "who"}, r"row 1 of rows\.csv has no who"),
    "other bytes": ("rows.csv", b"text,label\n\xff\xfe,b\n", {}, "cannot be parsed"),
    "no JSON": ("rows.jsonl", '{"text": 1', {}, "cannot be parsed"),
    "no object": ("rows.jsonl", "[1]\n", {}, "row 1 lacks text, label"),
    "no parquet": ("rows.parquet", "PAR1", {}, "cannot be parsed"),
    "too few": ("rows.csv", "text,label\na,x\nb,y\n", {}, "which make 1 . 0 . 1|which make"),
    "one group": ("rows.csv", "text,label,who\na,x,1\nb,y,1\nc,x,1\n", {"group": "who"}, "which make"),
    "odd shares": ("rows.csv", "text,label\na,x\n", {"split": (0.5, 0.5)}, r"got split=\(0\.5, 0\.5\)"),
    "no share": ("rows.csv", "text,label\na,x\n", {"split": (1, 0, 1)}, "expected shares"),
    "an odd split": ("rows.csv", "text,label,part\na,x,rest\n", {"split": "part"}, "row 1 has 'rest' as part"),
    "no name": ("rows.csv", "my text,label\na,x\n", {"inputs": "my text"}, "expected a column that can be a field"),
    "a keyword": ("rows.csv", "class,label\na,x\n", {"inputs": "class"}, "expected a column that can be a field"),
    "the same": ("rows.csv", "text,label\na,x\n", {"inputs": ["label"]}, "expected different columns"),
    "no inputs": ("rows.csv", "text,label\na,x\n", {"inputs": []}, "expected different columns"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case, tmp_path):
    name, content, more, message = BAD[case]
    if name == "rows.parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / (name or "none.csv")
    if name:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TaskError, match=message):
        made(path, **more)


def test_without_pyarrow_a_parquet_file_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.parquet", tickets())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TaskError, match=r"pip install 'copa-harness\[tasks\]'"):
        made(path)


def test_a_data_set_of_the_hub_brings_its_splits_and_the_names_of_its_classes(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABELS))})
    parts = {
        split: datasets.Dataset.from_list(
            [{"text": f"{split} {i}", "label": i % 3} for i in range(n)], features=features
        )
        for split, n in (("train", 12), ("validation", 6), ("test", 9))
    }
    loaded = datasets.DatasetDict(parts)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: loaded)
    task = Task.from_hub("some/tickets:small", inputs="text", output="label")
    assert (task.name, [len(part) for part in splits(task)]) == ("tickets", [12, 6, 9])
    assert {row.label for row in task.testset} == set(LABELS)
    assert task.source.startswith("some/tickets:small: 12 + 6 + 9 rows")
    again = Task.from_hub("some/tickets", inputs="text", output="label", split=(1, 1, 1))
    assert [len(part) for part in splits(again)] == [9, 9, 9]
    with pytest.raises(TaskError, match="has no column other; it has text, label"):
        Task.from_hub("some/tickets", inputs="other", output="label")


def test_shares_hold_of_all_rows_where_every_label_is_rare():
    rows = [{"label": str(i // 2), "text": str(i)} for i in range(40)]
    parts = split_evenly([[row] for row in rows], (0.4, 0.2, 0.4), label_of=lambda row: row["label"], seed=0)
    assert [len(part) for part in parts] == pytest.approx([16, 8, 16], abs=2)


def test_the_record_names_the_rows_and_says_when_they_changed_since_they_were_accepted(tmp_path):
    lm = ScriptedLM({"text": {"label": "bug"}}, fingerprint="same")
    settings = Settings(
        root=tmp_path,
        cache_dir=tmp_path / "cache",
        report_dir=tmp_path / "out",
        baseline_dir=tmp_path / "base",
        strategy="none",
    )

    def run(rows, settings):
        task = made(write(tmp_path / "tickets.csv", rows))
        with CopaSession(settings) as session:
            session.run(task, lm=lm, settings=settings, test="t")
            return session, finish(session.rows(), settings=settings), task

    session, _, task = run(tickets(), replace(settings, bless=True))
    assert session.entries[0].record.source == task.source
    assert task.source in (tmp_path / "out" / "latest.json").read_text()
    _, report, _ = run(tickets(), settings)
    assert not any("changed" in note for note in report.notes)
    _, report, _ = run(tickets(93), settings)
    assert any("tickets, none: the test rows changed since the accepted result" in note for note in report.notes)
