"""Running a program over examples."""

import threading
import time

import dspy
import pytest

from copa_harness.errors import BudgetExhausted, ConfigurationError, MetricError, ProviderError, TaskError
from copa_harness.evaluate import evaluate, run_examples
from copa_harness.evaluate.runner import raise_if_nothing_worked
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.results import Budget, Phase


def rows(n=6):
    return [dspy.Example(question=f"q{i}", answer=str(i % 2)).with_inputs("question") for i in range(n)]


def exact(example, prediction, trace=None):
    return prediction.answer == example.answer


def program():
    return dspy.Predict("question -> answer")


def right(messages):
    number = int(messages[-1]["content"].split("q")[-1].split()[0].strip("]["))
    return {"answer": str(number % 2)}


def digits(messages):
    text = messages[-1]["content"]
    return int("".join(c for c in text.split("[[ ## question ## ]]")[1].split("Respond")[0] if c.isdigit()))


def test_scores_come_in_the_order_of_the_examples_whatever_the_threads():
    lm = ScriptedLM(lambda messages: {"answer": str(digits(messages) % 2 if digits(messages) != 3 else 9)})

    def slow(example, prediction, trace=None):
        time.sleep(0.001 * (6 - int(example.question[1])))
        return exact(example, prediction)

    found = [
        evaluate(program(), rows(), metric=slow, split="test", lm=lm, threads=threads).results for threads in (1, 6)
    ]
    assert found[0] == found[1]
    assert [result.score for result in found[0]] == [1, 1, 1, 0, 1, 1]


def test_the_interval_is_wilson_for_right_and_wrong():
    result = evaluate(program(), rows(4), metric=exact, split="test", lm=ScriptedLM({"question": {"answer": "0"}}))
    assert result.score == 0.5
    assert result.interval.method == "wilson"
    assert result.interval.low < 0.5 < result.interval.high


def test_an_unparsable_answer_scores_zero_and_is_named():
    lm = ScriptedLM(lambda messages: "nonsense" if digits(messages) == 2 else {"answer": "0"})
    result = evaluate(program(), rows(3), metric=exact, split="test", lm=lm)
    assert [r.outcome for r in result.results] == ["ok", "ok", "unparsed"]
    assert result.results[2].score == 0
    assert "AdapterParseError" in result.results[2].error
    assert result.n_unparsed == 1
    assert result.n_failed == 0


def test_what_an_unparsable_answer_looks_like_is_kept_from_its_beginning():
    result = evaluate(program(), rows(1), metric=exact, split="test", lm=ScriptedLM("Sure!\n" + "so " * 200))
    assert result.results[0].answer.startswith("Sure!\nso so")
    assert len(result.results[0].answer) == 200
    assert result.nothing_parses


def test_an_unparsable_answer_costs_one_call_and_not_a_second_in_json():
    lm = ScriptedLM("nonsense")
    evaluate(program(), rows(3), metric=exact, split="test", lm=lm)
    assert lm.calls == 3


def test_a_provider_failure_has_no_score_and_stays_out_of_the_mean():
    lm = ScriptedLM(lambda messages: ProviderError("down") if digits(messages) == 1 else {"answer": "0"})
    result = evaluate(program(), rows(3), metric=exact, split="test", lm=lm)
    assert [r.outcome for r in result.results] == ["ok", "provider_error", "ok"]
    assert result.score == 1.0
    assert result.n_failed == 1


def test_a_metric_failure_has_no_score():
    def metric(example, prediction, trace=None):
        if example.question == "q1":
            raise KeyError("oops")
        return 1.0

    result = evaluate(program(), rows(3), metric=metric, split="test", lm=ScriptedLM({"question": {"answer": "0"}}))
    assert result.results[1].outcome == "metric_error"
    assert "KeyError" in result.results[1].error


@pytest.mark.parametrize("returned", [None, "good", 1.5, -0.1, float("nan"), [1]])
def test_a_metric_that_gives_no_number_between_zero_and_one_is_one_clear_error(returned):
    with pytest.raises(MetricError, match=r"0\.\.1"):
        evaluate(program(), rows(2), metric=lambda e, p: returned, split="test", lm=ScriptedLM({"q": {"answer": "0"}}))


def test_a_provider_that_never_answers_is_an_error_and_not_a_score():
    with pytest.raises(ProviderError, match="any of the 3 examples"):
        evaluate(program(), rows(3), metric=exact, split="test", lm=ScriptedLM(lambda m: ProviderError("down")))


def test_an_exception_of_the_program_counts_as_an_unusable_answer():
    class Picky(dspy.Module):
        def __init__(self):
            super().__init__()
            self.step = dspy.Predict("question -> answer")

        def forward(self, question):
            answer = self.step(question=question)
            if question == "q1":
                raise ValueError("cannot use this")
            return answer

    result = evaluate(Picky(), rows(3), metric=exact, split="test", lm=ScriptedLM({"question": {"answer": "0"}}))
    assert [r.outcome for r in result.results] == ["ok", "unparsed", "ok"]
    assert "the program raised ValueError: cannot use this" in result.results[1].error


def test_a_program_that_fails_on_every_example_is_a_broken_task():
    class Broken(dspy.Module):
        def forward(self, question):
            return self.missing

    with pytest.raises(TaskError, match="failed on all 2 examples"):
        evaluate(Broken(), rows(2), metric=exact, split="test", lm=ScriptedLM("x"))


def test_a_spent_budget_ends_the_evaluation_at_once():
    started = []
    lock = threading.Lock()

    def answer(messages):
        with lock:
            started.append(1)
        return {"answer": "0"}

    with open_scope("test", budget=Budget(calls=5)) as scope, pytest.raises(BudgetExhausted):
        evaluate(program(), rows(200), metric=exact, split="test", lm=ScriptedLM(answer), threads=4)
    assert len(started) == 5
    assert scope.exhausted


def test_calls_are_stamped_with_the_phase():
    with open_scope("test") as scope:
        evaluate(
            program(), rows(4), metric=exact, split="v", lm=ScriptedLM({"q": {"answer": "0"}}), phase=Phase.BASELINE
        )
        assert scope.phase_usages()["baseline"].paid_calls == 4


def test_usage_is_what_this_evaluation_added():
    lm = ScriptedLM({"question": {"answer": "0"}})
    with open_scope("test"):
        first = evaluate(program(), rows(4), metric=exact, split="v", lm=lm).usage
        second = evaluate(program(), rows(4), metric=exact, split="v", lm=lm).usage
    assert (first.paid_calls, second.paid_calls, second.cached_calls) == (4, 0, 4)


def test_a_predictors_own_model_comes_before_the_one_given():
    own, given = ScriptedLM({"q": {"answer": "0"}}, model="own"), ScriptedLM({"q": {"answer": "1"}}, model="given")
    module = program()
    module.lm = own
    assert evaluate(module, rows(2), metric=exact, split="test", lm=given).lm == "own"
    assert given.calls == 0


def test_no_model_is_one_clear_error():
    with dspy.context(lm=None), pytest.raises(ConfigurationError, match="no language model for predictor"):
        evaluate(program(), rows(2), metric=exact, split="test")


@pytest.mark.parametrize("examples", [[], [{"question": "q"}], [dspy.Example(question="q", answer="1")]])
def test_a_malformed_split_is_one_clear_error(examples):
    with pytest.raises(TaskError):
        evaluate(program(), examples, metric=exact, split="test", lm=ScriptedLM("x"))


def test_runs_carry_the_trace_of_predictor_calls():
    module = program()
    runs = run_examples(module, rows(2), metric=exact, split="train", lm=ScriptedLM({"question": {"answer": "0"}}))
    assert [len(run.trace) for run in runs] == [1, 1]
    assert runs[0].trace[0][0] is module
    assert runs[0].prediction.answer == "0"


def test_that_every_example_failed_is_raised_where_somebody_asks():
    runs = run_examples(
        program(),
        rows(2),
        metric=exact,
        split="validation",
        lm=ScriptedLM(lambda m: ProviderError("down")),
    )
    assert [run.result.outcome for run in runs] == ["provider_error"] * 2
    with pytest.raises(ProviderError, match="no answer from the model on any of the 2 examples"):
        raise_if_nothing_worked(runs, split="validation")
