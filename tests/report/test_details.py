import json

import numpy as np
import pytest

from copa_harness.documents import from_json, to_json
from copa_harness.judge.attribution import attribute_gains
from copa_harness.judge.intervals import mean_interval
from copa_harness.judge.options import Gates
from copa_harness.judge.paired_gates import JudgedRun
from copa_harness.judge.sequential.stopping import SequentialJudge
from copa_harness.report.details import attribution_table, flaky_table, ranking_table, sequential_table
from copa_harness.report.examples import NOTHING_TOLD
from copa_harness.report.page import page_html
from copa_harness.report.records import RunRecord
from copa_harness.report.tables import all_tables
from copa_harness.results import EvaluationResult, ExampleResult, Usage

IDS = [f"e{i:03}" for i in range(40)]


def record(strategy="none", share=0.5, *, task="iris", seed=0, **more):
    rng = np.random.default_rng(seed)
    rows = tuple(ExampleResult(key, float(rng.random() < share)) for key in IDS)
    evaluation = EvaluationResult("test", "lm", rows, mean_interval([row.score for row in rows]), Usage(paid_calls=7))
    return RunRecord.from_evaluation(evaluation, test="t", task=task, strategy=strategy, lm="lm", split="test", **more)


def attributed():
    rng = np.random.default_rng(0)
    cells = [{key: float(rng.random() < share) for key in IDS} for share in (0.3, 0.5, 0.5, 0.9)]
    names = ("base_plain", "base_optimized", "tuned_plain", "tuned_optimized")
    return attribute_gains(**dict(zip(names, cells, strict=True)))


def test_the_attribution_shows_four_systems_six_effects_and_the_sentence():
    answer = attributed()
    text = attribution_table([record("p -> w", attribution=answer)])
    for words in ("base, plain prompts", "tuned, optimized", "prompts alone", "both together", "beyond their sum"):
        assert words in text
    assert f"{answer.both.difference:+.3f}" in text
    assert answer.sentence() in " ".join(text.split())


def test_runs_without_an_attribution_make_no_table():
    assert attribution_table([record()]) == ""


def test_the_ranking_puts_the_best_first_with_corrected_p_values_and_cost():
    runs = [record("none", 0.2), record("p", 0.5, seed=1), record("joint", 0.95, seed=2)]
    text = ranking_table(runs)
    lines = text.splitlines()
    assert "joint" in lines[2]
    assert "difference to none" in lines[0]
    assert "p (Holm)" in lines[0]
    assert "joint better by" in text
    assert "rank" not in text


def test_the_ranking_takes_the_tasks_that_most_strategies_have_run():
    runs = [
        record("none", 0.2),
        record("p", 0.6, seed=1),
        record("none", 0.2, task="wine"),
        record("p", 0.6, task="wine", seed=2),
        record("gepa", 0.5, seed=3),
    ]
    text = ranking_table(runs)
    assert "gepa" not in text
    assert " 80 " in text


def test_one_strategy_is_no_ranking():
    assert ranking_table([record()]) == ""


def test_unstable_examples_are_listed_nearest_to_a_coin_flip_first():
    repeats = {"a": (1.0, 1.0, 1.0, 1.0), "b": (1.0, 1.0, 0.0, 0.0), "c": (1.0, 1.0, 1.0, 0.0), "d": (0.0,) * 4}
    text = flaky_table([record(repeats=repeats)])
    assert text.index("2 of 4") < text.index("3 of 4")
    assert "1 of 4 passed all 4 repeats" in text
    assert flaky_table([record()]) == ""


def test_stable_repeats_are_one_line():
    text = flaky_table([record(repeats={"a": (1.0, 1.0)})])
    assert "1 of 1 passed all 2 repeats" in text
    assert "|" not in text


def early_record():
    watch = SequentialJudge(tuple(IDS), Gates(min_score=0.5), run=JudgedRun(None), seed=0)
    for block in watch.blocks(size=4):
        watch.add(dict.fromkeys(block, 1.0))
    rows = tuple(ExampleResult(key, 1.0) for unit in watch.units for key in unit)[: watch.n_used]
    usage = Usage(paid_calls=watch.n_used, usd=0.01 * watch.n_used)
    evaluation = EvaluationResult("test", "lm", rows, mean_interval([1.0] * len(rows)), usage)
    answer = watch.finish(evaluation)
    return answer, RunRecord.from_evaluation(
        evaluation,
        test="t",
        task="iris",
        strategy="none",
        lm="lm",
        split="test",
        gates=answer.gates,
        sequential=answer,
    )


def test_rows_and_dollars_saved_are_shown_with_a_total():
    answer, run = early_record()
    text = sequential_table([run])
    assert f"{answer.n_saved} ({100 * answer.n_saved / 40:.0f} %)" in text
    assert f"{answer.usd_saved:.4f}" in text
    assert "in all" in text
    assert sequential_table([record()]) == ""


def test_findings_survive_the_trip_through_json():
    _, run = early_record()
    full = record("p -> w", attribution=attributed(), repeats={"a": (1.0, None), "b": (1.0, 0.0)})
    for one in (run, full):
        assert from_json(RunRecord, json.loads(json.dumps(to_json(one), allow_nan=False))) == one


@pytest.mark.parametrize("style", ["terminal", "html"])
def test_every_finding_is_among_all_tables(style):
    _, run = early_record()
    runs = [
        run,
        record("p -> w", attribution=attributed(), repeats={"a": (1.0, 0.0)}),
        record("miprov2", 0.7, seed=4),
    ]
    titles = [title for title, _ in all_tables(runs, style=style)]
    for title in (
        "what weights and prompts gained",
        "strategies ranked",
        "unstable examples",
        "saved by stopping early",
    ):
        assert title in titles


def test_the_page_has_them_too():
    _, run = early_record()
    assert "<summary>saved by stopping early</summary>" in page_html([run], environment={}, told=NOTHING_TOLD)


def test_long_explanations_are_wrapped_to_the_width_of_a_terminal():
    text = attribution_table([record("p -> w -> demos -> instructions -> w", attribution=attributed())])
    assert max(map(len, text.splitlines())) <= 120
    flaky = flaky_table([record(repeats=dict.fromkeys(IDS, (1.0, 0.0)))])
    assert max(map(len, flaky.splitlines())) <= 120


def test_without_the_reference_the_ranking_names_what_it_compares_with():
    text = ranking_table([record("p", 0.2), record("w", 0.9, seed=1)])
    assert "difference to p" in text.splitlines()[0]
    assert "none" not in text


def test_examples_that_share_a_group_widen_every_interval_of_the_report():
    groups = {key: str(i // 8) for i, key in enumerate(IDS)}

    def table(**more):
        return all_tables(
            [record("none", 0.2, **more), record("p", 0.6, seed=1, **more), record("gepa", 0.9, seed=2, **more)]
        )

    def width(text):
        (line,) = [line for line in text.splitlines() if "gepa" in line and " | " in line]
        low, high = line.split("[")[-1].split("]")[0].split(",")
        return float(high) - float(low)

    apart, together = dict(table()), dict(table(groups=groups))
    for title in ("strategies compared", "strategies ranked"):
        assert width(together[title]) > width(apart[title])
    assert from_json(RunRecord, to_json(record(groups=groups))).groups == groups
