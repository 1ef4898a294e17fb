"""Tables of the choice between score and cost, and of what an optimization did."""

from copa_harness.documents import from_json, to_json
from copa_harness.report.records import RunRecord
from copa_harness.report.tables import all_tables, front_table, story_table
from copa_harness.results import FrontProgram, Usage
from tests.report.conftest import optimization


def run(**told):
    return RunRecord(
        test="t",
        task="toy",
        strategy="p",
        lm="m",
        split="test",
        score=0.9,
        n=10,
        n_failed=0,
        interval=None,
        usage=Usage(),
        optimization=optimization(**told),
    )


def entry(score, tokens, *, returned=False):
    return FrontProgram(
        score=score,
        objective="prompt_tokens",
        prompt_tokens_per_answer=tokens,
        usd_per_answer=None,
        output_tokens_per_answer=4.0,
        seconds_per_answer=0.25,
        longest_prompt=1200,
        n_demos=3,
        model="m",
        returned=returned,
    )


FRONT = (entry(0.8, 100.0), entry(0.85, 400.0, returned=True), entry(0.86, 1000.0))


def test_the_front_shows_every_programs_score_and_cost_and_which_was_returned():
    lines = [[cell.strip() for cell in line.split("|")] for line in front_table([run(front=FRONT)]).splitlines()]
    assert lines[2] == ["toy", "p", "0.800", "100", "4.0", "-", "0.250", "1,200", "3", ""]
    assert [line[-1] for line in lines[2:5]] == ["", "returned", ""]


def test_what_an_optimization_did_stands_in_the_file_and_not_in_the_terminal():
    records = [run(notes=("p: 3 candidates of 9, stopped: budget", "w: tuned weights adopted"))]
    assert "w: tuned weights adopted" in story_table(records, style="html")
    assert story_table(records) == ""


def test_both_survive_json_and_are_told_once_when_tests_share_an_optimization():
    records = [from_json(RunRecord, to_json(run(front=FRONT, notes=("said",)))) for _ in range(2)]
    tables = dict(all_tables(records, style="html"))
    assert tables["score and cost"].count("returned") == 1
    assert tables["what the optimizations did"].count("said") == 1
