import numpy as np
import pytest

from copa_harness.judge.paired_tests import PairedScores, paired_difference
from copa_harness.judge.ranking import compare_strategies, holm_adjusted


def scores(seed, share, n=60):
    rng = np.random.default_rng(seed)
    return {f"e{i:03}": float(v) for i, v in enumerate(rng.random(n) < share)}


def one_task():
    return {name: {"iris": scores(i, s)} for i, (name, s) in enumerate([("none", 0.4), ("p", 0.5), ("joint", 0.9)])}


def row(comparison, name):
    (found,) = [entry for entry in comparison.rows if entry.strategy == name]
    return found


def test_differences_on_one_task_are_the_paired_ones_corrected_by_holm():
    table = one_task()
    found = compare_strategies(table, reference="none")
    before = list(table["none"]["iris"].values())
    plain = [
        paired_difference(PairedScores(list(table[name]["iris"]), before, list(table[name]["iris"].values())))
        for name in ("p", "joint")
    ]
    assert row(found, "joint").difference == plain[1].difference
    assert found.rows[0].strategy == "joint"
    adjusted = holm_adjusted([p.p_value for p in plain])
    assert (row(found, "p").adjusted, row(found, "joint").adjusted) == adjusted


def two_tasks():
    return {
        "none": {"iris": scores(1, 0.3), "wine": scores(2, 0.4, n=20)},
        "joint": {"iris": scores(3, 0.8), "wine": scores(4, 0.9, n=20)},
    }


def test_every_task_counts_the_same_whatever_its_size():
    table = two_tasks()
    found = row(compare_strategies(table, reference="none"), "joint")
    gaps = [
        np.mean(list(table["joint"][t].values())) - np.mean(list(table["none"][t].values())) for t in ("iris", "wine")
    ]
    assert found.difference == pytest.approx(np.mean(gaps))
    assert found.interval.low < found.difference < found.interval.high


def test_equal_strategies_are_not_told_apart():
    same = {"iris": scores(1, 0.5), "wine": scores(2, 0.5)}
    found = compare_strategies({"a": same, "b": same, "c": same}, reference="a")
    assert [entry.adjusted for entry in found.rows] == [1.0, 1.0, 1.0]
    assert "No strategy is shown to differ" in found.sentence()


def test_a_shown_difference_is_told_with_its_p_value():
    assert "joint better by" in compare_strategies(two_tasks(), reference="none").sentence()


def test_only_common_tasks_and_examples_count():
    table = two_tasks()
    table["joint"]["extra"] = scores(9, 1.0)
    table["joint"]["wine"] = {**table["joint"]["wine"], "e000": None}
    found = compare_strategies(table, reference="none")
    assert (found.tasks, found.n) == (("iris", "wine"), 79)


def test_an_unchanged_strategy_over_several_tasks_is_called_different_in_at_most_five_percent():
    alarms, runs = 0, 60
    for seed in range(runs):
        table = {
            name: {task: scores(1000 * seed + 10 * i + j, 0.5, n=30) for j, task in enumerate("ab")}
            for i, name in enumerate(("none", "x", "y"))
        }
        found = compare_strategies(table, reference="none", seed=seed)
        alarms += any(entry.adjusted <= 0.05 for entry in found.rows)
    assert alarms <= 7


def test_a_reference_that_was_not_run_is_refused():
    with pytest.raises(ValueError, match="without the reference 'gepa'"):
        compare_strategies(one_task(), reference="gepa")


def test_strategies_without_a_common_example_are_refused():
    with pytest.raises(ValueError, match="without a common example"):
        compare_strategies({"a": {"iris": {"x": 1.0}}, "b": {"iris": {"y": 1.0}}}, reference="a")


def test_examples_of_one_group_are_exchanged_together():
    ids = [f"e{i}" for i in range(20)]
    groups = {key: str(i // 4) for i, key in enumerate(ids)}
    table = {"none": {"t": dict.fromkeys(ids, 0.0)}, "p": {"t": dict.fromkeys(ids, 1.0)}}
    apart, together = (compare_strategies(table, reference="none", groups=g) for g in (None, {"t": groups}))
    assert row(apart, "p").p_value < row(together, "p").p_value
    assert row(together, "p").p_value == pytest.approx(2 / 2**5)


def test_groups_count_over_several_tasks_too():
    ids = [f"e{i}" for i in range(12)]
    groups = {key: str(i // 4) for i, key in enumerate(ids)}
    table = {
        "none": {"s": dict.fromkeys(ids, 0.0), "t": dict.fromkeys(ids, 0.0)},
        "p": {"s": dict.fromkeys(ids, 1.0), "t": dict.fromkeys(ids, 1.0)},
    }
    found = row(compare_strategies(table, reference="none", groups={"s": groups, "t": groups}), "p")
    assert found.p_value == pytest.approx(2 / 2**6)
    apart = row(compare_strategies(table, reference="none"), "p")
    assert found.difference == apart.difference == 1.0
    assert found.interval.low < apart.interval.low


def test_equal_strategies_with_grouped_examples_are_called_different_in_at_most_five_percent():
    rng = np.random.default_rng(5)
    ids = [f"e{i:02}" for i in range(60)]
    groups = {task: {key: str(i // 6) for i, key in enumerate(ids)} for task in ("s", "t")}
    alarms = {True: 0, False: 0}
    for seed in range(100):
        table = {
            name: {
                task: dict(zip(ids, np.repeat(rng.integers(0, 2, 10), 6).astype(float), strict=True)) for task in groups
            }
            for name in ("none", "p")
        }
        for known in alarms:
            found = compare_strategies(table, reference="none", seed=seed, groups=groups if known else None)
            alarms[known] += row(found, "p").adjusted <= 0.05
    assert alarms[True] / 100 <= 0.05 + 3 * (0.05 * 0.95 / 100) ** 0.5
    assert alarms[False] / 100 > 0.2
