"""Tables of what an optimization learned."""

from copa_harness.documents import from_json, to_json
from copa_harness.report.details import credit_table, evidence_table
from copa_harness.report.records import RunRecord
from copa_harness.report.tables import all_tables
from copa_harness.results import Evidence, Usage
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


CREDIT = {
    "method": "leave one out, not measured",
    "n": 25,
    "n_cells": 3,
    "total": {"gain": 0.5},
    "parts": [
        {"predictor": "", "part": "weights", "gain": 0.2, "method": "leave one out"},
        {"predictor": "note", "part": "instruction", "gain": None, "method": "not measured"},
    ],
}


def test_who_earned_it_names_stage_part_gain_and_method():
    table = credit_table([run(credit=CREDIT)])
    lines = [line.replace("|", " ").split() for line in table.splitlines()]
    (weights,) = [line for line in lines if "weights" in line]
    assert weights[:2] == ["toy", "p"]
    assert "+0.200" in weights
    assert " ".join(weights).endswith("leave one out")
    (note,) = [line for line in lines if "note" in line]
    assert note[-2:] == ["not", "measured"]
    (total,) = [line for line in lines if "+0.500" in line]
    assert "all parts" in " ".join(total)


def test_one_optimization_shared_by_two_tests_is_told_once():
    assert credit_table([run(credit=CREDIT), run(credit=CREDIT)]) == credit_table([run(credit=CREDIT)])


def test_it_survives_the_trip_through_json_and_is_silent_when_empty():
    record = from_json(RunRecord, to_json(run(credit=CREDIT)))
    titles = [title for title, _ in all_tables([record])]
    assert "who earned it" in titles
    assert credit_table([run()]) == ""


def evidence(**given):
    usual = {
        "n": 25,
        "unseen": 0,
        "n_tried": 7,
        "difference": 0.24,
        "low": 0.06,
        "high": 0.42,
        "gained": 7,
        "lost": 1,
        "p_value": 0.0352,
        "level": 0.2,
        "tested": True,
        "adopted": True,
        "why": "",
    }
    return Evidence(**usual | given)


def test_the_evidence_table_says_on_which_rows_and_what_was_returned():
    held_back = evidence(unseen=25, adopted=False, why="it loses 0.100 on 25 rows")
    text = evidence_table([run(evidence=evidence()), run(evidence=held_back), run(evidence=evidence(tested=False))])
    first, second, third = [line for line in text.splitlines() if "0.035" in line]
    assert "25 validation" in first
    assert "the result" in first
    assert "25 unseen" in second
    assert "the program as written" in second
    assert "the result, no test" in third
    assert "flatter" in text
    assert "it loses 0.100 on 25 rows" in text
    assert "flatter" not in evidence_table([run(evidence=evidence(unseen=25))])
    assert evidence_table([run()]) == ""


def test_evidence_survives_the_report():
    record = from_json(RunRecord, to_json(run(evidence=evidence())))
    assert record.optimization.evidence == evidence()
