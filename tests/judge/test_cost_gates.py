import pytest

from copa_harness.errors import ConfigurationError
from copa_harness.judge.gates import cost_per_answer, judge, judge_spending
from copa_harness.judge.intervals import mean_interval
from copa_harness.judge.options import Gates
from copa_harness.judge.paired_gates import JudgedRun
from copa_harness.results import EvaluationResult, ExampleResult, Usage, Verdict

SPENT = Usage(paid_calls=10, input_tokens=900, output_tokens=100, usd=0.5, wall_s=12.5)


def evaluation(usage, n=4):
    rows = tuple(ExampleResult(f"e{i}", 1.0) for i in range(n))
    return EvaluationResult("test", "lm", rows, mean_interval([1] * n), usage)


@pytest.mark.parametrize(
    ("gates", "verdict", "words"),
    [
        ({"max_tokens": 1000}, Verdict.PASS, "1,000 tokens of 1,000 tokens"),
        ({"max_tokens": 999}, Verdict.FAIL, "1 tokens too many"),
        ({"max_usd": 0.5}, Verdict.PASS, "$0.50"),
        ({"max_usd": 0.4}, Verdict.FAIL, "expected at most $0.40"),
        ({"max_seconds": 10}, Verdict.FAIL, "seconds too many"),
        ({"max_seconds": 12.5}, Verdict.PASS, "allowed"),
    ],
)
def test_what_was_spent_is_held_to_its_ceiling(gates, verdict, words):
    (answer,) = judge_spending(JudgedRun(None, usage=SPENT), Gates(**gates))
    assert answer.verdict is verdict
    assert words in answer.message


def test_a_failure_says_where_to_look_and_what_to_change():
    (answer,) = judge_spending(JudgedRun(None, usage=SPENT), Gates(max_usd=0.1))
    assert "table of phases" in answer.message
    assert "raise max_usd" in answer.message


def test_dollars_without_a_price_are_undecided_and_tokens_are_offered():
    (answer,) = judge_spending(JudgedRun(None, usage=Usage(paid_calls=5, unpriced_calls=2)), Gates(max_usd=1))
    assert answer.verdict is Verdict.UNDECIDED
    assert "max_tokens" in answer.message


def test_a_ceiling_without_usage_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="max_tokens without usage"):
        judge_spending(JudgedRun(None), Gates(max_tokens=1))


def test_replayed_answers_are_priced_like_the_paid_ones():
    run = evaluation(Usage(paid_calls=2, cached_calls=6, usd=0.02))
    assert cost_per_answer(run) == pytest.approx(0.02)
    (answer,) = judge_spending(JudgedRun(run), Gates(max_cost_per_answer=0.01))
    assert answer.verdict is Verdict.FAIL
    assert "per answer" in answer.message


def test_answers_from_the_cache_only_have_no_price():
    (answer,) = judge_spending(JudgedRun(evaluation(Usage(cached_calls=4))), Gates(max_cost_per_answer=1))
    assert answer.verdict is Verdict.UNDECIDED
    assert "cache" in answer.message


def test_spending_stands_behind_the_other_gates():
    answers = judge(JudgedRun(evaluation(SPENT), usage=SPENT), Gates(min_score=0.5, max_tokens=10))
    assert [answer.gate.split("=")[0] for answer in answers] == ["max_error_rate", "min_score", "max_tokens"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_usd": -1},
        {"max_tokens": "many"},
        {"better_than": ""},
        {"better_than": 3},
        {"min_pass_all": 90},
    ],
)
def test_gates_refuse_what_means_nothing(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Gates(**wrong)
