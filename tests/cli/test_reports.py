"""`copa show`, `copa compare`, `copa history`: reports read again, without anything but the files."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from copa_harness.cli import main
from copa_harness.report.files import write_reports
from copa_harness.report.history import from_reported, sparkline
from copa_harness.report.records import as_reported
from copa_harness.report.tables import all_tables
from copa_harness.results import Budget, Evidence, GateResult, PhaseRecord, SearchEnding, Usage, Verdict
from tests.report.conftest import optimization
from tests.report.test_details import attributed
from tests.report.test_tables import run

EVIDENCE = Evidence(
    n=25,
    unseen=0,
    n_tried=3,
    difference=0.2,
    low=0.1,
    high=0.3,
    gained=5,
    lost=0,
    p_value=0.03,
    level=0.2,
    tested=True,
    adopted=True,
    why="",
)
FAIL = GateResult("min_score=0.9", Verdict.FAIL, "got 0.5")
FULL = replace(
    run("p -> w", 57),
    budget=Budget(400, name="light"),
    phases=(PhaseRecord("p", Usage(paid_calls=9), 0.2, 0.4, "said"),),
    usage=Usage(paid_calls=9),
    optimization=optimization(
        strategy="p -> w",
        phases=(PhaseRecord("p", Usage(paid_calls=9), 0.2, 0.4, "said"),),
        score_before=0.2,
        score_after=0.4,
        charged_calls=9,
        n_trials=3,
        reason="the budget",
        notes=("a note",),
        evidence=EVIDENCE,
    ),
    attribution=attributed(),
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n_right, more in ((57, {}), (50, {"gates": (FAIL,), "verdict": Verdict.FAIL})):
        runs = [run("none", 24), replace(run("p", n_right), **more)]
        write_reports(tmp_path / "reports", runs, environment={"seed": n_right, "commit": "c0ffee0000aa"})
    return tmp_path


def test_a_record_read_again_draws_the_same_tables():
    again = from_reported(json.loads(json.dumps(as_reported(FULL))))
    assert again.optimization.ending == SearchEnding("the budget", 3, 9)
    assert all_tables([again]) == all_tables([FULL])
    assert (again.interval, again.budget, again.scores) == (FULL.interval, FULL.budget, FULL.scores)
    unlimited = replace(FULL, budget=Budget())
    assert from_reported(json.loads(json.dumps(as_reported(unlimited)))).budget.calls == float("inf")


@pytest.mark.parametrize("name", [[], ["2"], ["reports/0002.json"]])
def test_show_says_everything_in_words(folder, capsys, name):
    assert main(["show", *name]) == 0
    said = capsys.readouterr().out
    assert "weights, prompts, and both:" in said
    assert "FAIL            min_score=0.9: got 0.5" in said
    assert said.splitlines()[-1].startswith("runs: 1 pass, 1 fail")


def test_compare_pairs_every_example(folder, capsys):
    assert main(["compare", "1"]) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "| p " in line]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2:5] == ["75", "0.760", "0.667"]
    assert cells[5].startswith("-0.093 [")
    assert cells[6:8] == ["7", "0"]
    assert cells[-1] == "FAIL"
    assert "changed: seed 57 -> 50" in said


def test_compare_says_what_stands_on_one_side_only(folder, capsys):
    write_reports(folder / "reports", [run("none", 24), run("w", 60, task="wine")])
    assert main(["compare", "2", "3"]) == 0
    said = capsys.readouterr().out
    assert "only before: iris, p (embedded)" in said
    assert "only after: wine, w (embedded)" in said


def test_history_has_a_line_per_report_and_a_curve_per_run(folder, capsys):
    assert main(["history"]) == 0
    said = capsys.readouterr().out
    assert "0001" in said
    assert "1 pass, 1 fail" in said
    (line,) = [line for line in said.splitlines() if "| p " in line]
    assert line.endswith("0.760 | 0.667 | ▇▆")
    assert sparkline([0.0, None, 1.0]) == "▁ █"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["show", "7"], "got the report '7', expected a file or a number of those in reports: 0001, 0002"),
        (["history", "--report-dir", "nowhere"], "got the folder nowhere, expected one with numbered reports"),
        (["compare", "broken.json"], "broken.json is no report"),
    ],
)
def test_what_cannot_be_read_is_one_line(folder, capsys, command, said):
    (folder / "broken.json").write_text('{"runs": [{"task": "iris"}]}')
    assert main(command) != 0
    assert said in capsys.readouterr().err


def test_what_a_terminal_would_obey_or_cannot_show_is_named(folder, capsys):
    write_reports(folder / "reports", [run("none", 24, task="a\x1b]0;t \ud83d")])
    assert main(["show", "3"]) == 0
    said = capsys.readouterr().out
    assert "<U+001B>" in said
    assert "\x1b" not in said
    said.encode("utf-8")


def test_reading_reports_loads_neither_dspy_nor_torch(folder):
    code = "import sys; from copa_harness.cli import main; main(['show']); print({'torch', 'dspy'} & set(sys.modules))"
    paths = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=paths)
    assert done.stdout.splitlines()[-1] == "set()"
