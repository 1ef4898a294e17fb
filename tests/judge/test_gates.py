import json
import math
from dataclasses import dataclass, field

import pytest

from copa_harness.documents import to_jsonable
from copa_harness.errors import ConfigurationError
from copa_harness.judge.gates import is_failure, judge, overall
from copa_harness.judge.intervals import mean_interval
from copa_harness.judge.options import Gates
from copa_harness.judge.paired_gates import JudgedRun
from copa_harness.results import EvaluationResult, ExampleResult, GateResult, Usage, Verdict


@dataclass(frozen=True)
class Accepted:
    scores: dict
    fingerprints: dict = field(default_factory=dict)
    name: str = "iris (joint)"
    origin: str = "2026-01-02, commit abc"


def evaluation(scores, *, failed=0, outcome="provider_error"):
    rows = [ExampleResult(f"e{i:03}", float(s), "ok", {"x": i}, {"y": "a"}, {"y": "b"}) for i, s in enumerate(scores)]
    rows += [ExampleResult(f"f{i:03}", None, outcome, {"x": i}, error="connection refused") for i in range(failed)]
    return EvaluationResult("test", "embedded", tuple(rows), mean_interval([float(s) for s in scores]))


def only(results, gate):
    (found,) = [result for result in results if result.gate.startswith(gate)]
    return found


def test_a_score_on_the_threshold_passes():
    assert (
        only(judge(JudgedRun(evaluation([1] * 17 + [0] * 3)), Gates(min_score=0.85)), "min_score").verdict
        is Verdict.PASS
    )


def test_a_sum_of_rounded_numbers_on_the_threshold_passes():
    assert only(judge(JudgedRun(evaluation([0.1] * 10)), Gates(min_score=0.1)), "min_score").verdict is Verdict.PASS


def test_a_miss_says_got_expected_n_interval_and_that_it_may_be_noise():
    result = only(judge(JudgedRun(evaluation([1] * 16 + [0] * 4)), Gates(min_score=0.85)), "min_score")
    assert result.verdict is Verdict.FAIL
    for words in ("got 0.800", "at least 0.85", "20 test examples", "95 % interval", "Within noise", "would settle it"):
        assert words in result.message


def test_a_clear_miss_says_that_it_is_not_noise_and_what_to_do():
    result = only(judge(JudgedRun(evaluation([1] * 20 + [0] * 55)), Gates(min_score=0.85)), "min_score")
    assert "Not noise" in result.message
    assert "Next:" in result.message


def test_a_narrow_pass_says_that_other_examples_may_fall_short():
    result = only(judge(JudgedRun(evaluation([1] * 18 + [0] * 2)), Gates(min_score=0.85)), "min_score")
    assert result.verdict is Verdict.PASS
    assert "may fall short" in result.message


def test_any_failure_is_an_error_unless_a_share_is_allowed():
    run = evaluation([1] * 72, failed=3)
    strict = only(judge(JudgedRun(run), Gates()), "max_error_rate")
    assert strict.verdict is Verdict.ERROR
    assert "3 of 75" in strict.message
    assert "connection refused" in strict.message
    assert only(judge(JudgedRun(run), Gates(max_error_rate=0.04)), "max_error_rate").verdict is Verdict.PASS


def test_a_broken_metric_is_told_from_a_silent_provider():
    result = only(judge(JudgedRun(evaluation([1], failed=2, outcome="metric_error")), Gates()), "max_error_rate")
    assert "2 broke the metric" in result.message


def test_unparsed_answers_are_wrong_not_failed():
    rows = (ExampleResult("a", 0.0, "unparsed"), ExampleResult("b", 1.0))
    run = EvaluationResult("test", "lm", rows, mean_interval([0, 1]))
    assert overall(judge(JudgedRun(run), Gates())) is Verdict.PASS


def test_an_empty_split_is_an_error():
    assert overall(judge(JudgedRun(evaluation([])), Gates(min_score=0.5))) is Verdict.ERROR


def test_a_run_without_any_score_is_an_error_not_a_zero():
    results = judge(JudgedRun(evaluation([], failed=4)), Gates(min_score=0.5))
    assert overall(results) is Verdict.ERROR
    assert only(results, "min_score").verdict is Verdict.UNDECIDED


@pytest.mark.parametrize(("run", "expected"), [(None, 75), (evaluation([1] * 10), 75)])
def test_a_truncated_evaluation_is_undecided_and_never_a_score(run, expected):
    results = judge(JudgedRun(run, n_expected=expected), Gates(min_score=0.9, max_regression=0.05))
    assert overall(results) is Verdict.UNDECIDED
    assert not [result for result in results if result.gate.startswith("min_score")]
    assert "budget exhausted" in results[0].message


def test_failures_in_a_truncated_evaluation_are_still_errors():
    assert overall(judge(JudgedRun(evaluation([1], failed=1), n_expected=75), Gates())) is Verdict.ERROR


def test_calls_are_held_to_their_ceiling():
    assert only(judge(JudgedRun(evaluation([1]), calls=400), Gates(max_calls=400)), "max_calls").verdict is Verdict.PASS
    over = only(judge(JudgedRun(evaluation([1]), calls=412), Gates(max_calls=400)), "max_calls")
    assert over.verdict is Verdict.FAIL
    assert "12 too many" in over.message


def test_a_ceiling_without_a_count_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="max_calls without calls"):
        judge(JudgedRun(evaluation([1])), Gates(max_calls=400))


def test_without_a_baseline_nothing_is_compared_and_the_message_says_how_to_bless():
    result = only(judge(JudgedRun(evaluation([1] * 5)), Gates(max_regression=0.05)), "max_regression")
    assert result.verdict is Verdict.NOT_COMPARABLE
    assert "--copa-bless" in result.message


def run_against(before, after, *, margin=0.05, theirs=None, ours=None):
    accepted = Accepted({f"e{i:03}": float(s) for i, s in enumerate(before)}, theirs or {})
    results = judge(
        JudgedRun(evaluation(after), baseline=accepted, fingerprints=ours or {}), Gates(max_regression=margin)
    )
    return only(results, "max_regression")


def test_a_clear_loss_fails_and_names_baseline_counts_and_p_value():
    result = run_against([1] * 75, [0] * 20 + [1] * 55)
    assert result.verdict is Verdict.FAIL
    for words in (
        "iris (joint)",
        "commit abc",
        "of 75 examples",
        "20 worse",
        "p < 0.0001",
        "not chance",
        "Proven beyond",
    ):
        assert words in result.message
    assert result.details["worse"][:2] == ["e000", "e001"]


def test_no_loss_passes_and_says_what_is_ruled_out_by_which_test():
    result = run_against([1] * 75, [1] * 75)
    assert result.verdict is Verdict.PASS
    assert "A drop of 0.05 or more is ruled out (p = 0.022; exact unconditional test)" in result.message
    assert "90 % interval" in result.message


def test_a_small_loss_is_undecided_and_says_how_many_examples_would_decide():
    result = run_against([1] * 75, [0] * 6 + [1] * 69, margin=0.1)
    assert result.verdict is Verdict.UNDECIDED
    assert result.details["rows_to_decide"] > 75
    assert "would decide it" in result.message
    assert "It did drop" in result.message
    assert "can have been lost (95 %)" in result.message


def test_without_margin_an_unchanged_score_is_undecided_with_advice():
    result = run_against([1, 0] * 20, [0, 1] * 20, margin=0)
    assert result.verdict is Verdict.UNDECIDED
    assert "allow a small drop" in result.message


def test_identical_requests_pass_any_margin_without_a_test():
    accepted = Accepted({f"e{i:03}": float(i % 2) for i in range(20)})
    run = JudgedRun(evaluation([0, 1] * 9 + [1, 1]), baseline=accepted, is_identical=True)
    result = only(judge(run, Gates(max_regression=0.0)), "max_regression")
    assert result.verdict is Verdict.PASS
    assert "identical requests" in result.message
    assert "1 example scored differently" in result.message
    assert "p_worse" not in result.details
    assert result.details["difference"] == pytest.approx(0.05)
    assert (result.details["n_better"], result.details["n_worse"]) == (1, 0)


@pytest.mark.parametrize("part", ["data", "split", "metric"])
def test_changed_data_split_or_metric_are_not_comparable_and_named(part):
    result = run_against([1] * 20, [0] * 20, theirs={part: "a" * 64}, ours={part: "b" * 64})
    assert result.verdict is Verdict.NOT_COMPARABLE
    assert result.message.startswith(f"the {part} changed since")
    assert ("in common" in result.message) == (part != "metric")


def test_runs_without_a_common_example_are_not_comparable():
    accepted = Accepted({"z1": 1.0})
    result = only(judge(JudgedRun(evaluation([1]), baseline=accepted), Gates(max_regression=0.1)), "max_regression")
    assert result.verdict is Verdict.NOT_COMPARABLE


def test_a_fingerprint_unknown_on_one_side_is_not_compared():
    assert run_against([1] * 75, [1] * 75, theirs={"metric": "a"}).verdict is Verdict.PASS


def test_examples_scored_on_one_side_only_are_mentioned():
    result = run_against([1] * 75, [1] * 74)
    assert "1 example scored on one side only" in result.message


def test_the_gravest_verdict_wins():
    order = [Verdict.ERROR, Verdict.FAIL, Verdict.NOT_COMPARABLE, Verdict.UNDECIDED, Verdict.PASS]
    gates = [GateResult("g", verdict, "") for verdict in reversed(order)]
    for expected in order:
        assert overall(gates) is expected
        gates.pop()
    assert overall([]) is Verdict.PASS


@pytest.mark.parametrize(
    ("verdict", "lenient", "strict"),
    [
        (Verdict.PASS, False, False),
        (Verdict.UNDECIDED, False, True),
        (Verdict.NOT_COMPARABLE, False, True),
        (Verdict.FAIL, True, True),
        (Verdict.ERROR, True, True),
    ],
)
def test_undecided_fails_only_when_asked(verdict, lenient, strict):
    assert is_failure(verdict, undecided_fails=False) is lenient
    assert is_failure(verdict, undecided_fails=True) is strict


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"min_score": 85}, "write 0.85 for 85 %"),
        ({"min_score": -0.1}, "a number from 0 to 1, such as 0.85"),
        ({"min_score": math.nan}, "a number from 0 to 1, such as 0.85"),
        ({"min_score": "high"}, "such as 0.85"),
        ({"max_regression": True}, "such as 0.05"),
        ({"max_calls": -1}, "such as 400"),
        ({"max_error_rate": None}, "such as 0.02"),
        ({"alpha": 0.9}, "a number from 0 to 0.5, such as 0.05"),
    ],
)
def test_gates_refuse_values_that_mean_nothing(wrong, words):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))) as refusal:
        Gates(**wrong)
    assert words in str(refusal.value)


def test_every_detail_is_plain_json():
    for result in (
        run_against([1] * 75, [0] * 20 + [1] * 55),
        run_against([1], [0]),
        *judge(JudgedRun(evaluation([0.5] * 9, failed=1), calls=4), Gates(min_score=0.9, max_calls=3)),
    ):
        assert json.loads(json.dumps(to_jsonable(result.details, fallback=None), allow_nan=False)) is not None


def test_changed_data_are_told_with_how_many_examples_are_left_to_compare():
    accepted = Accepted({f"e{i:03}": 1.0 for i in range(2, 12)}, {"data": "a" * 20})
    answers = judge(
        JudgedRun(evaluation([1] * 8), baseline=accepted, fingerprints={"data": "b" * 20}), Gates(max_regression=0.05)
    )
    gate = only(answers, "max_regression")
    assert gate.verdict is Verdict.NOT_COMPARABLE
    assert "10 examples then, 8 now, 6 in common." in gate.message


def unparsed(n, *, parsed=0, failed=0, truncated=0):
    rows = [ExampleResult(f"u{i}", 0.0, "unparsed", error="no fields", answer="Sure!\n42") for i in range(n)]
    rows += [ExampleResult(f"p{i}", 0.0) for i in range(parsed)]
    rows += [ExampleResult(f"f{i}", None, "provider_error", error="down") for i in range(failed)]
    interval = mean_interval([0.0] * (n + parsed))
    return EvaluationResult("test", "embedded", tuple(rows), interval, Usage(paid_calls=n, truncated_calls=truncated))


def test_an_evaluation_in_which_no_answer_parses_is_an_error_that_shows_one_and_says_what_helps():
    answers = judge(JudgedRun(unparsed(20, truncated=3)), Gates(min_score=0.0))
    assert overall(answers) is Verdict.ERROR
    found = only(answers, "answers parse")
    assert "none of 20 answers could be parsed" in found.message
    assert "'Sure!\\n42'" in found.message
    assert "--copa-constrain" in found.message
    assert "3 answers reached the ceiling" in found.message


def test_answers_that_never_came_do_not_make_unparsed_ones_a_score():
    assert overall(judge(JudgedRun(unparsed(4, failed=4)), Gates(max_error_rate=0.5))) is Verdict.ERROR


def test_one_answer_that_parses_makes_it_a_score():
    assert overall(judge(JudgedRun(unparsed(19, parsed=1)), Gates())) is Verdict.PASS
    assert not unparsed(0, parsed=1).nothing_parses
    assert not unparsed(0, failed=3).nothing_parses
