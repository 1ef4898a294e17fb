"""The violation rate: its exact interval, what it counts, and every answer of its gate."""

import math

import pytest
from scipy.stats import binom

from copa_harness.judge.gates import judge
from copa_harness.judge.options import Gates
from copa_harness.judge.paired_gates import JudgedRun
from copa_harness.judge.violations import FormAnswer, Violations, exact_interval, max_violation_rate
from copa_harness.results import EvaluationResult, ExampleResult, Interval, Verdict


def violations(*outcomes, forms=("case", "typos"), **more):
    """Outcomes as `"a case wrong"`."""
    answers = tuple(FormAnswer(*text.split(maxsplit=2)) for text in outcomes)
    return Violations(answers, forms, more.pop("n_right", len({one.example_id for one in answers})), **more)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (5, 12), (10, 10)])
def test_the_interval_is_that_of_the_two_binomial_tails(k, n):
    interval = exact_interval(k, n)
    assert k == 0 or binom.sf(k - 1, n, interval.low) == pytest.approx(0.025)
    assert k == n or binom.cdf(k, n, interval.high) == pytest.approx(0.025)
    assert (interval.low == 0) == (k == 0)
    assert (interval.high == 1) == (k == n)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.37])
def test_the_interval_covers_the_true_share_as_often_as_it_says(share):
    n = 25
    covered = sum(
        binom.pmf(k, n, share) for k in range(n + 1) if exact_interval(k, n).low <= share <= exact_interval(k, n).high
    )
    assert covered >= 0.95


def test_an_interval_of_nothing_is_everything_and_impossible_counts_are_refused():
    assert (exact_interval(0, 0).low, exact_interval(0, 0).high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="expected 0 <= k <= n"):
        exact_interval(4, 3)


def test_an_example_counts_once_however_many_of_its_forms_break():
    found = violations("a case wrong", "a typos wrong", "b case held", "b typos held", "c case held", "d typos held")
    assert found.rate == 0.25
    assert found.by_form() == "case 1 of 3, typos 1 of 3"


def test_parse_failures_break_the_relation_and_failures_of_the_provider_say_nothing():
    found = violations("a case unparsed", "b case no answer", "c case held", forms=("case",))
    assert found.broken == {"a": True, "c": False}
    assert found.by_form() == "case 1 of 2 (1 unparsed, 1 no answer)"


def test_examples_of_a_group_are_no_independent_evidence():
    answers = [f"e{i} case {'wrong' if i < 8 else 'held'}" for i in range(40)]
    alone = violations(*answers).interval()
    grouped = violations(*answers, groups={f"e{i}": f"g{i // 8}" for i in range(40)}).interval()
    assert alone.method == "clopper-pearson"
    assert grouped.high - grouped.low > alone.high - alone.low


def test_one_pair_that_shares_a_group_makes_the_interval_no_narrower():
    answers = [f"e{i} case {'wrong' if i < 22 else 'held'}" for i in range(29)]
    alone = violations(*answers).interval()
    paired = violations(*answers, groups={"e27": "twin", "e28": "twin"}).interval()
    assert paired.low <= alone.low
    assert paired.high >= alone.high


def test_the_gate_passes_and_says_how_sure_that_is():
    answer = max_violation_rate(violations(*[f"e{i} case held" for i in range(10)]), 0.0)
    assert answer.verdict is Verdict.PASS
    assert "0 of 10 examples right as given are not when changed (95 % interval 0.000 to 0.308)" in answer.message
    assert "reaches above 0" in answer.message
    assert "typos changes nothing here" in answer.message


def test_the_gate_fails_with_the_smallest_change_and_says_whether_it_is_noise():
    few = violations("a case wrong", "b case held", "c case held", smallest="a, case: 'pen' -> 'PEN'; answered '7'")
    answer = max_violation_rate(few, 0.1)
    assert answer.verdict is Verdict.FAIL
    assert "expected at most 0.1: 1 of 3 examples right as given is not when changed" in answer.message
    assert "The smallest change that does it: a, case: 'pen' -> 'PEN'; answered '7'." in answer.message
    assert "Within noise" in answer.message
    assert "robust=True" in answer.message
    assert answer.details["by_form"] == {"case": {"wrong": 1, "held": 2}, "typos": {}}
    many = violations(*[f"e{i} case {'wrong' if i % 2 else 'held'}" for i in range(60)])
    assert "Not noise: the interval begins above 0.1" in max_violation_rate(many, 0.1).message


def test_where_nothing_is_right_or_nothing_changes_nothing_was_measured():
    assert max_violation_rate(violations(n_right=0), 0.1).verdict is Verdict.UNDECIDED
    nothing = max_violation_rate(violations(n_right=5), 0.1)
    assert nothing.verdict is Verdict.ERROR
    assert "case, typos change nothing in any of 5 right examples" in nothing.message


def test_missing_answers_are_an_error_unless_they_are_allowed():
    lost = violations("a case no answer", *[f"e{i} case held" for i in range(9)])
    answer = max_violation_rate(lost, 0.1)
    assert answer.verdict is Verdict.ERROR
    assert "1 of 10 changed forms got no answer (first: a, case" in answer.message
    assert max_violation_rate(lost, 0.1, max_error_rate=0.1).verdict is Verdict.PASS
    assert max_violation_rate(violations("a case no answer"), 0.1, max_error_rate=1.0).verdict is Verdict.UNDECIDED
    assert math.isnan(violations("a case no answer").rate)


def test_the_gate_is_among_those_of_a_run_and_needs_its_measurement():
    evaluation = EvaluationResult("test", "m", (ExampleResult("a", 1.0),), Interval(0, 1))
    run = JudgedRun(evaluation, violations=violations("a case wrong"))
    assert judge(run, Gates(max_violation_rate=0.5))[-1].verdict is Verdict.FAIL
    assert judge(run, Gates(max_violation_rate=1.0))[-1].verdict is Verdict.PASS
    with pytest.raises(ValueError, match="without violations"):
        judge(JudgedRun(evaluation), Gates(max_violation_rate=0.5))
