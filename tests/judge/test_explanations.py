import math

from copa_harness.formatting import number
from copa_harness.judge.explanations import format_examples, format_failure, format_gates
from copa_harness.judge.intervals import mean_interval
from copa_harness.results import EvaluationResult, ExampleResult, GateResult, Verdict


def evaluation():
    rows = (
        ExampleResult("aa1", 1.0, "ok", {"q": "fine"}, {"answer": "x"}, {"answer": "x"}),
        ExampleResult("bb2", 0.0, "ok", {"q": "hard"}, {"answer": "virginica"}, {"answer": "setosa"}),
        ExampleResult("cc3", 0.0, "unparsed", {"q": "odd"}, {"answer": "x"}, {}, "no field answer"),
        ExampleResult("dd4", None, "provider_error", {"q": "lost"}, error="server said\n500"),
    )
    return EvaluationResult("test", "embedded", rows, mean_interval([1, 0, 0]))


def test_a_failure_shows_score_n_interval_gates_and_the_worst_examples():
    gates = (GateResult("max_error_rate=0", Verdict.PASS, "fine"), GateResult("min_score=0.9", Verdict.FAIL, "too low"))
    text = format_failure(evaluation(), gates, title="iris, p -> w -> p", hints=["artifact: somewhere"])
    lines = text.splitlines()
    assert lines[0] == "iris, p -> w -> p"
    assert "score 0.333 on 3 test examples (95 % interval" in lines[1]
    assert "1 answer did not parse" in lines[1]
    assert "1 without an answer, outside the mean" in " ".join(lines[1:3])
    assert max(map(len, lines)) <= 112  # pytest puts eight columns before each
    assert text.index("FAIL            min_score=0.9: too low") < text.index("pass            max_error_rate=0")
    assert "worst 3 of 3 examples below a full score:" in text
    assert "server said 500" in text
    assert lines[-1] == "artifact: somewhere"


def test_an_example_shows_inputs_expected_and_predicted():
    text = format_examples([evaluation().results[1]])
    assert text.splitlines() == [
        "1. bb2  score 0.000",
        "   inputs    q=hard",
        "   expected  answer=virginica",
        "   predicted answer=setosa",
    ]


def test_an_answer_that_did_not_parse_says_so():
    assert "score 0.000 (the answer did not parse)" in format_examples([evaluation().results[2]])


def test_a_failed_regression_shows_the_examples_that_got_worse_not_the_worst():
    gate = GateResult("max_regression=0.05", Verdict.FAIL, "dropped", {"worse": ["cc3"]})
    text = format_failure(evaluation(), (gate,))
    assert "1 of 1 example that got worse than the baseline:" in text
    assert "cc3" in text
    assert "bb2" not in text


def test_an_evaluation_that_did_not_finish_has_no_score():
    assert "no score: the evaluation did not finish" in format_failure(None, ())


def test_an_evaluation_without_any_score_says_so():
    row = evaluation().results[3]
    text = format_failure(EvaluationResult("test", "lm", (row,), mean_interval([])))
    assert "none of 1 test example could be scored" in text
    assert "nan" not in text


def test_long_values_are_cut_in_the_middle_and_credentials_are_masked():
    row = ExampleResult("x", 0.0, "ok", {"q": "a" * 500 + " END"}, {}, {"answer": "sk-abcdefghijklmnop1234"})
    text = format_examples([row])
    assert " ... " in text
    assert "END" in text
    assert len(text) < 400
    assert "sk-abc" not in text


def test_a_message_is_wrapped_under_its_gate():
    text = format_gates([GateResult("min_score=0.85", Verdict.UNDECIDED, "word " * 40)], width=80)
    lines = text.splitlines()
    assert len(lines) > 2
    assert all(len(line) <= 80 for line in lines)
    assert all(line.startswith(" " * 16) for line in lines[1:])


def test_numbers_have_three_decimals_and_no_negative_zero():
    assert [number(v) for v in (0.5, None, math.nan, -0.0001)] == ["0.500", "-", "-", "0.000"]
    assert [number(v, signed=True) for v in (0.5, -0.25, 0.0)] == ["+0.500", "-0.250", "0.000"]
