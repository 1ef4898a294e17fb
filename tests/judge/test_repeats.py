import numpy as np
import pytest

from copa_harness.judge.flaky import example_means, merge_repeats, repeated_mean, repeats_of
from copa_harness.judge.intervals import mean_interval
from copa_harness.results import EvaluationResult, ExampleResult, Usage


def evaluation(scores, *, split="test"):
    rows = tuple(
        ExampleResult(f"e{i}", score, "ok" if score is not None else "provider_error") for i, score in enumerate(scores)
    )
    known = [score for score in scores if score is not None]
    return EvaluationResult(split, "lm", rows, mean_interval(known), Usage(paid_calls=len(scores)))


def test_repeats_are_collected_by_example():
    assert repeats_of([evaluation([1, 0]), evaluation([0, 0])]) == {"e0": (1, 0), "e1": (0, 0)}


def test_repeats_over_other_examples_are_refused():
    with pytest.raises(ValueError, match="different examples"):
        repeats_of([evaluation([1]), evaluation([1, 0])])


def test_a_merged_evaluation_has_the_mean_of_every_example_and_the_whole_cost():
    merged = merge_repeats([evaluation([1, 0, 1]), evaluation([1, 1, None])])
    assert merged.scores == (1.0, 0.5, 1.0)
    assert merged.usage.paid_calls == 6
    assert "1 of 2 repeats have no score" in (merged.results[2].error or "")


def test_an_example_that_failed_in_every_repeat_has_no_score():
    assert merge_repeats([evaluation([None, 1]), evaluation([None, 1])]).n_failed == 1


def test_one_repeat_is_itself():
    only = evaluation([1, 0])
    assert merge_repeats([only]) is only


def test_repeats_are_not_taken_for_new_examples():
    scores = [1.0] * 20 + [0.0] * 10
    once, often = merge_repeats([evaluation(scores)]), merge_repeats([evaluation(scores)] * 5)
    assert often.interval == once.interval


def test_an_example_without_any_score_has_no_mean():
    assert example_means({"a": (None, None), "b": (1, None)}) == {"a": None, "b": 1.0}


def test_the_two_sources_of_error_are_those_of_a_one_way_analysis():
    rng = np.random.default_rng(2)
    n, k = 400, 5
    lean = np.where(rng.random(n) < 0.5, 0.2, 0.8)
    scores = {f"e{i}": tuple((rng.random(k) < lean[i]).astype(float)) for i in range(n)}
    answer = repeated_mean(scores)
    assert answer.model_error == pytest.approx(np.sqrt(0.16 / (n * k)), rel=0.06)
    assert answer.example_error == pytest.approx(np.sqrt(0.09 / n), rel=0.12)
    total = np.std([np.mean(s) for s in scores.values()], ddof=1) / np.sqrt(n)
    assert np.hypot(answer.model_error, answer.example_error) == pytest.approx(total, rel=1e-6)


def test_answers_that_never_vary_leave_the_examples_as_the_only_source():
    answer = repeated_mean({f"e{i}": (float(i % 2),) * 3 for i in range(20)})
    assert answer.model_error == 0
    assert answer.example_error > 0
    assert "more examples would help" in answer.advice()


def test_a_coin_flip_leaves_the_model_as_the_main_source():
    rng = np.random.default_rng(1)
    answer = repeated_mean({f"e{i}": tuple(rng.integers(0, 2, 4).astype(float)) for i in range(60)})
    assert "more repeats would help" in answer.advice()


def test_a_single_repeat_says_that_it_cannot_tell():
    assert "--copa-repeat" in repeated_mean({"a": (1.0,), "b": (0.0,)}).advice()
