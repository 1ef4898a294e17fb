"""The ready-made tasks: sizes, no row in two splits, nothing left to chance or to the test rows."""

import dspy
import pytest

from copa_harness.errors import TaskError
from copa_harness.tasks import breast_cancer, exact_match, iris, wine

TASKS = [iris, wine, breast_cancer]


def contents(examples):
    return {tuple(sorted(example.inputs().items())) for example in examples}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("make", TASKS)
def test_splits_have_the_promised_sizes_and_share_no_printed_row(make, seed):
    task = make(seed)
    assert (len(task.trainset), len(task.valset), len(task.testset)) == (50, 25, 75)
    train, val, test = map(contents, (task.trainset, task.valset, task.testset))
    assert not train & val
    assert not train & test
    assert not val & test


@pytest.mark.parametrize("make", TASKS)
def test_every_label_is_in_every_split_in_like_proportion(make):
    task = make()
    for split in (task.trainset, task.valset, task.testset):
        shares = [sum(e.answer == label for e in split) / len(split) for label in {e.answer for e in task.testset}]
        assert min(shares) > 0.2


@pytest.mark.parametrize("make", TASKS)
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(make):
    assert make(3).testset == make(3).testset
    assert make(3).testset != make(4).testset


@pytest.mark.parametrize("make", TASKS)
def test_test_rows_of_fewer_labels_differ_at_most_where_printing_does(make):
    few, many = make(n_train=10, n_val=5), make()
    assert [e.answer for e in few.testset] == [e.answer for e in many.testset]
    assert len(few.trainset) == 10


@pytest.mark.parametrize("make", TASKS)
def test_numbers_are_printed_with_one_decimal_and_lie_below_ten(make):
    for example in make().testset:
        for value in example.inputs().values():
            assert value == f"{float(value):.1f}"
            assert 0.0 <= float(value) < 10.0


def test_iris_has_the_four_named_fields_and_the_plain_instruction():
    signature = iris().program.signature
    assert list(signature.input_fields) == ["petal_length", "petal_width", "sepal_length", "sepal_width"]
    assert signature.instructions == "Given the petal and sepal dimensions in cm, predict the iris species."
    assert signature.output_fields["answer"].json_schema_extra["desc"] == "setosa, versicolor, or virginica"


def test_the_single_form_prints_the_same_row_in_one_field():
    row = iris(form="single").testset[0]
    fields = iris(form="fields").testset[0]
    assert row.features == ", ".join(f"{name}={value}" for name, value in fields.inputs().items())


def test_scaling_and_selection_never_look_at_test_rows():
    import numpy as np
    from sklearn.datasets import load_wine

    from copa_harness.tasks import tabular

    table = tabular.read_table(load_wine(), ("a", "b", "c"))
    train = list(range(0, 178, 3))
    others = [row for row in range(178) if row not in set(train)]
    spoiled = tabular.Table(table.names, table.values.copy(), table.classes, table.labels)
    spoiled.values[others] *= 100.0
    selected, scaled = tabular._selected_and_scaled(table, train)
    spoiled_selected, spoiled_scaled = tabular._selected_and_scaled(spoiled, train)
    assert selected.names == spoiled_selected.names
    assert np.array_equal(scaled[train], spoiled_scaled[train])


def test_an_unknown_form_or_too_many_rows_are_refused():
    with pytest.raises(TaskError, match="'fields' or 'single'"):
        iris(form="table")
    with pytest.raises(TaskError, match="none is left to test on"):
        iris(n_train=120, n_val=30)


@pytest.mark.parametrize(("answer", "score"), [("setosa", 1.0), (" Setosa\n", 1.0), ("virginica", 0.0), (None, 0.0)])
def test_the_metric_forgives_case_and_outer_spaces_only(answer, score):
    assert exact_match(dspy.Example(answer="setosa"), dspy.Prediction(answer=answer)) == score


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_iris_can_be_split_into_thirds_as_in_the_paper(seed):
    task = iris(seed, n_train=50, n_val=50, n_test=50)
    assert (len(task.trainset), len(task.valset), len(task.testset)) == (50, 50, 50)
