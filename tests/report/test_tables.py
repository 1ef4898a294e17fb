import re

import pytest

from copa_harness.judge.intervals import mean_interval
from copa_harness.judge.sequential.stopping import SequentialAnswer
from copa_harness.report.grouping import chosen, kind_of
from copa_harness.report.records import RunRecord
from copa_harness.report.tables import all_tables, compare_table, copa_table, failure_table, phase_table
from copa_harness.results import Budget, EvaluationResult, ExampleResult, PhaseRecord, Usage
from tests.report.conftest import optimization


def run(strategy, n_right, *, n=75, task="iris", split="test", lm="embedded", failed=0, unparsed=0, **more):
    scores = [1.0] * n_right + [0.0] * (n - n_right - failed)
    rows = [ExampleResult(f"e{i:03}", s, "unparsed" if i >= n - unparsed else "ok") for i, s in enumerate(scores)]
    rows += [ExampleResult(f"e{len(scores) + i:03}", None, "provider_error") for i in range(failed)]
    evaluation = EvaluationResult(split, "embedded@1", tuple(rows), mean_interval(scores))
    return RunRecord.from_evaluation(evaluation, test="t", task=task, strategy=strategy, lm=lm, split=split, **more)


def cells(table, row):
    lines = [line for line in table.splitlines() if "|" in line]
    header, wanted = lines[0], next(line for line in lines[1:] if row in line)
    names = [cell.strip() for cell in header.split("|")]
    return dict(zip(names, [cell.strip() for cell in wanted.split("|")], strict=True))


FOUR = [run("none", 24), run("w", 50), run("p", 57), run("p -> w -> p", 70)]


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("none", "baseline"),
        ("w", "weights"),
        ("W -> w", "weights"),
        ("p", "prompts"),
        ("demos -> instructions", "prompts"),
        ("p -> w", "joint"),
        ("joint", "joint"),
        ("gepa -> w -> gepa", "joint"),
        ("miprov2", "other"),
        ("better_together", "other"),
        ("given program", "other"),
    ],
)
def test_a_strategy_has_a_column(strategy, kind):
    assert kind_of(strategy) == kind


def test_the_copa_table_has_a_row_per_task_with_means_intervals_and_the_gain():
    row = cells(copa_table(FOUR), "iris")
    assert row["n"] == "75"
    assert row["baseline"] == "0.320 [.23, .43]"
    assert row["weights only"].startswith("0.667 [")
    assert row["prompts only"].startswith("0.760 [")
    assert row["COPA"].startswith("0.933 [")
    assert re.fullmatch(r"\+0\.613 \[\+\.\d\d, \+\.\d\d\]", row["improvement"])


def test_a_missing_cell_is_a_dash():
    row = cells(copa_table(FOUR[:1]), "iris")
    assert (row["weights only"], row["COPA"], row["improvement"]) == ("-", "-", "-")


def test_a_cell_over_other_examples_says_its_n_and_the_gain_is_unpaired():
    row = cells(copa_table([run("none", 10, n=30), run("joint", 70)]), "iris")
    assert row["baseline"].endswith("n=30")
    assert row["improvement"] == "+0.600 (unpaired)"


def test_the_gain_over_examples_with_failures_is_paired_over_the_rest():
    row = cells(copa_table([run("none", 24), run("joint", 70, failed=2)]), "iris")
    assert row["improvement"].endswith("n=73")


def test_a_loss_is_signed():
    row = cells(copa_table([run("none", 50), run("joint", 40)]), "iris")
    assert row["improvement"].startswith("-0.133 [")


def test_only_the_test_split_counts():
    assert copa_table([run("none", 20, split="val")]) == ""


def test_of_several_joint_runs_the_best_on_validation_is_shown_not_the_best_on_test():
    lucky = run("p -> w", 74, optimization=optimization(score_after=0.8))
    better = run("joint", 60, optimization=optimization(score_after=0.9))
    assert chosen([better, lucky]) is better
    table = copa_table([FOUR[0], lucky, better])
    assert cells(table, "iris")["COPA"].startswith("0.800")
    assert "COPA = joint" in table


def test_two_models_are_two_rows():
    table = copa_table([run("none", 20), run("none", 30, lm="hf:other")])
    assert len([line for line in table.splitlines() if line.startswith(" iris")]) == 2


def test_numbers_are_right_aligned_and_tables_fit_140_columns():
    long = [
        run(
            s,
            50,
            task="breast_cancer",
            usage=Usage(123456, 12345, 0, 10**8, 10**6, 0, 9999, 12345.6),
            phases=(PhaseRecord(s, Usage(), 0.1, 0.9),),
            budget=Budget(400, "light"),
        )
        for s in ("none", "w", "p", "p -> w -> p", "bootstrap_fewshot_random_search")
    ]
    for _, table in all_tables(long):
        assert max(len(line) for line in table.splitlines()) <= 142
    lines = copa_table(FOUR).splitlines()
    ends = [lines[0].index("| baseline") if "| baseline" in lines[0] else lines[0].index("baseline") + len("baseline")]
    assert lines[2][ends[0] - 1] == "]"


def test_the_phase_table_has_a_row_per_phase_and_a_total_per_run():
    weights, prompts = Usage(10, 1, 0, 100, 20, 0, 48, 2.0), Usage(390, 9, 0, 9000, 880, 0, 0, 8.5)
    phases = (PhaseRecord("weights", weights, 0.3, 0.7), PhaseRecord("instructions", prompts, 0.7, 0.9))
    found = optimization(phases=phases, score_before=0.3, score_after=0.9)
    record = run("w -> p", 70, usage=weights + prompts, phases=phases, optimization=found)
    table = phase_table([record])
    assert cells(table, "instructions") == {
        "task": "",
        "strategy": "",
        "phase": "instructions",
        "paid calls": "390",
        "cached": "9",
        "tokens": "9,880",
        "train steps": "0",
        "seconds": "8.5",
        "score before -> after": "0.700 -> 0.900 +0.200",
    }
    total = cells(table, "total")
    assert (total["paid calls"], total["tokens"], total["train steps"]) == ("400", "10,000", "48")
    assert total["score before -> after"] == "0.300 -> 0.900 +0.600"


def test_what_was_spent_outside_the_phases_is_not_hidden():
    record = run("w", 70, usage=Usage(paid_calls=85), phases=(PhaseRecord("weights", Usage(paid_calls=10), 0.1, 0.2),))
    assert cells(phase_table([record]), "other")["paid calls"] == "75"


def test_several_runs_have_a_grand_total():
    table = phase_table([run("none", 1, usage=Usage(5)), run("w", 1, usage=Usage(7))])
    assert cells(table, "all runs")["paid calls"] == "12"


def test_strategies_are_compared_with_the_reference_first_and_the_best_next():
    runs = [
        run("miprov2", 40, budget=Budget(400, "light")),
        run("none", 24),
        run("joint", 70, budget=Budget(400, "light")),
    ]
    table = compare_table(runs)
    order = [line.split("|")[2].strip() for line in table.splitlines()[2:] if line.count("|") > 2]
    assert order == ["none", "joint", "miprov2"]
    assert cells(table, "miprov2")["difference to none"].startswith("+0.213 [")
    assert cells(table, "none")["difference to none"] == "-"
    assert cells(table, "joint")["verdict"] == "pass"
    assert "equal budget: light (400 calls)" in table


def test_unequal_budgets_are_pointed_out():
    runs = [run("none", 24), run("p", 40, budget=Budget(400, "light")), run("w", 50, budget=Budget(1600, "medium"))]
    assert "budgets differ" in compare_table(runs)


def test_a_run_without_a_score_is_a_dash_in_the_comparison():
    cut = RunRecord.from_evaluation(None, test="t", task="iris", strategy="gepa", lm="embedded", split="test")
    row = cells(compare_table([run("none", 24), cut]), "gepa")
    assert (row["score"], row["difference to none"]) == ("-", "-")


def test_one_strategy_is_no_comparison():
    assert compare_table([run("none", 24), run("none", 30)]) == ""


def test_failures_have_columns_only_where_there_are_any():
    assert failure_table(FOUR) == ""
    table = failure_table([run("none", 10, unparsed=3), run("w", 10, failed=2)])
    assert "metric errors" not in table
    assert cells(table, "none")["unparsed"] == "3"
    assert cells(table, "| w")["provider errors"] == "2"


def test_the_comparison_is_drawn_only_for_tasks_with_more_strategies_than_columns():
    titles = [title for title, _ in all_tables(FOUR)]
    assert "strategies compared" not in titles
    both = all_tables([*FOUR, run("miprov2", 30), run("none", 5, task="wine"), run("p", 9, task="wine")])
    compared = dict(both)["strategies compared"]
    assert "miprov2" in compared
    assert "wine" not in compared


def test_markdown_tables_are_githubs_and_escape_pipes():
    table = copa_table([run("none", 24, task="a|b")], style="markdown")
    assert table.splitlines()[0].startswith("| task")
    assert "a\\|b" in table


def test_no_runs_no_tables():
    assert all_tables([]) == ()


def test_dollars_have_a_column_where_any_were_spent():
    phases = (PhaseRecord("weights", Usage(paid_calls=3, usd=0.25, unpriced_calls=1)),)
    paid = run("w", 50, usage=Usage(paid_calls=3, usd=0.25, unpriced_calls=1), phases=phases)
    assert cells(phase_table([paid]), "weights")["USD"] == "0.2500+?"
    assert "+? USD: what 1 of the paid calls cost is not known" in phase_table([paid])
    assert "USD" not in phase_table([run("w", 50)])


def test_a_run_that_stopped_early_does_not_stand_for_a_cell_that_has_a_whole_one():
    whole = run("none", 50)
    stopped = run("none", 30, n=32, sequential=SequentialAnswer((), 32, 75))
    used_all = run("none", 51, sequential=SequentialAnswer((), 75, 75))
    assert chosen([whole, stopped]) is whole
    assert chosen([whole, used_all]) is used_all
    assert chosen([stopped]) is stopped


def test_tokens_a_provider_did_not_tell_are_marked_and_explained():
    usage = Usage(paid_calls=5, input_tokens=70, estimated_calls=2)
    table = phase_table([run("w", 50, usage=usage, phases=(PhaseRecord("weights", usage),))])
    assert cells(table, "weights")["tokens"] == "70+?"
    assert "+? tokens: 2 calls told no usable number of tokens" in table
    assert "?" not in phase_table([run("w", 50, usage=Usage(paid_calls=5))])


def test_the_phase_table_says_why_its_calls_are_not_those_of_the_budget():
    assert "a budget counts distinct requests" in phase_table([run("p", 40, usage=Usage(15, 80))]).replace("\n", " ")
    assert "distinct" not in phase_table([run("p", 40, usage=Usage(15))])
