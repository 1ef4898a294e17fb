from dataclasses import replace

import pytest

from copa_harness.report.summary import receipt, receipt_table, summary_rows, summary_table, totals
from copa_harness.results import Budget, GateResult, Usage, Verdict
from tests.report.conftest import optimization
from tests.report.test_tables import run

BASE, BETTER = run("none", 24), run("p", 57)
REGRESSION = GateResult(
    "max_regression=0.05",
    Verdict.FAIL,
    "a drop is shown",
    {"difference": -0.24, "low": -0.35, "high": -0.14, "n": 75, "n_worse": 18, "n_better": 0, "p_any_drop": 8e-6},
)


def test_a_row_has_score_differences_calls_and_verdict():
    line = summary_table([BASE, replace(BETTER, usage=Usage(paid_calls=400))]).splitlines()[-1]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[1:3] == ["p", "75"]
    assert cells[3].startswith("0.760 [")
    assert cells[4].startswith("+0.440 [+")
    assert cells[5:] == ["400", "pass"]


def test_columns_that_have_nothing_to_say_are_left_out():
    header = summary_table([BASE]).splitlines()[0]
    assert not {"to base", "to accepted", "USD"} & {cell.strip() for cell in header.split("|")}
    priced = replace(BETTER, usage=Usage(usd=0.5), gates=(REGRESSION,), verdict=Verdict.FAIL)
    table = summary_table([BASE, priced])
    assert "USD" in table
    assert "-0.240 [-.35, -.14]" in table
    assert "FAIL" in table


def test_runs_alike_are_one_row_with_what_they_spent_together_and_the_worst_verdict():
    paid = replace(BETTER, usage=Usage(paid_calls=9))
    again = replace(BETTER, test="other", gates=(REGRESSION,), verdict=Verdict.FAIL, usage=Usage(cached_calls=4))
    (row,) = summary_rows([paid, again])
    assert row.run.usage == Usage(paid_calls=9, cached_calls=4)
    assert (row.run.verdict, row.positions) == (Verdict.FAIL, (0, 1))
    assert len(summary_rows([BETTER, run("p", 56)])) == 2


def test_the_models_are_named_where_there_are_several():
    assert "iris, other" in summary_table([BASE, run("none", 24, lm="other")])
    assert "embedded" not in summary_table([BASE])


def test_a_table_of_seventeen_runs_fits_a_screen():
    runs = [run(name, 57, task=task) for task in ("breast_cancer", "iris", "wine") for name in ("p", "w", "none")]
    lines = summary_table(runs).splitlines()
    assert len(lines) == 2 + len(runs)
    assert max(map(len, lines)) <= 120


def test_the_line_of_totals_counts_verdicts_calls_tokens_and_dollars():
    spent = Usage(paid_calls=5206, cached_calls=2528, input_tokens=1000, usd=1.5, train_steps=3, wall_s=61)
    assert totals([replace(BASE, usage=spent)]) == (
        "runs: 1 pass; 5,206 calls paid, 2,528 from the cache, 1,000 tokens, 3 training steps, $1.50, 1 min 01 s"
    )


@pytest.mark.parametrize("n_tests", [1, 2])
def test_the_receipt_counts_a_search_once_and_says_what_was_saved(n_tests):
    searched = replace(BETTER, budget=Budget(400), optimization=optimization(charged_calls=390))
    runs = [replace(searched, test=f"t{i}", usage=Usage(paid_calls=100 if i == 0 else 0)) for i in range(n_tests)]
    trials = [
        {"study": "p", "outcome": "dropped", "n": 10, "score": 0.1, "n_validation": 25},
        {"study": "p", "outcome": "complete", "n": 25, "score": 0.5, "n_validation": 25},
    ]
    lines = {line.what: line.calls for line in receipt(runs, trials=trials, n_refused=2)}
    assert lines == {
        "planned": 400,
        "used by the searches": 390,
        "paid": 100,
        "from the cache": 0,
        "refused": 2,
        "saved by racing": 15,
    }
    assert "saved by racing" in receipt_table(receipt(runs, trials=trials))
    as_written = replace(BASE, budget=Budget(400), optimization=optimization(charged_calls=0))
    assert receipt([*runs, as_written])[0].calls == 400  # it searches nothing


def test_a_run_that_asks_what_the_baseline_asked_says_so():
    gate = GateResult(
        "max_regression=0.05", Verdict.PASS, "identical requests", {"identical": True, "n": 4, "n_moved": 0}
    )
    assert "identical" in summary_table([replace(BETTER, gates=(gate,))])
