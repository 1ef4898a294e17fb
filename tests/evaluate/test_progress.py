"""Lines of progress of an evaluation, and the early word on answers that do not parse."""

import threading

import dspy
import pytest

from copa_harness.evaluate import run_examples
from copa_harness.evaluate.progress import EvaluationProgress, Urgent, lines_to
from copa_harness.lm.budget.cost import Cost
from copa_harness.lm.call_context import current_scope, in_context, open_scope
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.results import ExampleResult, Usage


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def made():
    """Makes a progress on the scope of the test; its lines are in the list returned with it."""
    lines, clock = [], Clock()
    with open_scope("test") as scope, lines_to(lines.append):
        yield lambda n, **more: (
            EvaluationProgress("iris, none", n, split="test", scope=scope, clock=clock, **more),
            lines,
            clock,
        )


def ended(outcome="ok", score=1.0, **more):
    return ExampleResult("e", score, outcome, **more)


def mumbled():
    return ended("unparsed", 0.0, answer="Sure!\nIt is 7")


def test_a_line_says_examples_score_so_far_unparsed_time_and_time_to_go(made):
    progress, lines, clock = made(75)
    for number in range(31):
        progress.done(mumbled() if number > 28 else ended(score=float(number % 2)))
    clock.now += 61
    progress.tick()
    assert lines == ["iris, none: 31 of 75 test examples, 0.452 so far, 2 unparsed, 61 s, about 87 s to go"]


def test_the_first_few_answers_do_not_tell_how_long_the_others_take(made):
    progress, lines, clock = made(60)
    for _ in range(2):
        progress.done(ended())
    clock.now += 120
    progress.tick()
    assert lines == ["iris, none: 2 of 60 test examples, 1.000 so far, 2 min"]


def test_replayed_answers_do_not_tell_how_long_the_others_take(made):
    progress, lines, clock = made(80)
    for i in range(40):
        current_scope().replay(f"request {i}", cost=Cost)
        progress.done(ended())
    clock.now += 20
    progress.tick()
    for i in range(25):
        current_scope().charge(f"more {i}").settle(Cost(), Usage(paid_calls=1))
        progress.done(ended())
    clock.now += 20
    progress.tick()
    assert lines[0] == "iris, none: 40 of 80 test examples, 1.000 so far, 20 s"
    assert lines[1] == "iris, none: 65 of 80 test examples, 1.000 so far, 40 s, about 24 s to go"


def test_before_the_first_answer_a_line_says_how_long_it_takes(made):
    progress, lines, clock = made(75)
    clock.now += 20
    progress.tick()
    clock.now += 10
    progress.tick()
    assert lines == ["iris, none: 0 of 75 test examples, 20 s"]


def test_when_most_of_the_first_answers_do_not_parse_it_is_said_once(made):
    progress, lines, _ = made(75)
    for _ in range(4):
        progress.done(ended())
    for _ in range(20):
        progress.done(mumbled())
    (line,) = lines
    assert isinstance(line, Urgent)
    assert line.startswith("iris, none: 6 of the first 10 answers do not parse; they look like 'Sure!\\nIt is 7'. What")
    assert "--copa-constrain" in line


def test_examples_without_an_answer_say_nothing_of_the_format(made):
    progress, lines, _ = made(8)
    for _ in range(6):
        progress.done(ended("provider_error", None))
    progress.done(mumbled())
    assert not lines
    progress.done(mumbled())
    assert "2 of the first 2 answers do not parse" in lines[0]


def test_half_of_the_first_answers_is_not_most(made):
    progress, lines, _ = made(75)
    for _ in range(5):
        progress.done(ended())
        progress.done(mumbled())
    assert not lines


def test_nothing_is_said_where_nobody_is_to_be_warned(made):
    progress, lines, _ = made(10, warns=False)
    for _ in range(10):
        progress.done(mumbled())
    assert not lines


def test_every_example_is_told_and_a_line_comes_while_none_ends(made):
    release, comes = threading.Event(), threading.Event()

    def slow(messages):
        release.wait(10)
        return {"answer": "0"}

    progress, lines, clock = made(3, every_s=0.01)
    clock.now += 1
    progress._write = lambda line: (lines.append(line), comes.set())
    comes_first = threading.Thread(target=lambda: (comes.wait(10), release.set()))
    comes_first.start()
    rows = [dspy.Example(question=f"q{i}", answer="0").with_inputs("question") for i in range(3)]
    with progress.following():
        run_examples(dspy.Predict("question -> answer"), rows, metric=lambda *_: 1.0, split="test", lm=ScriptedLM(slow))
    comes_first.join()
    assert lines[0].startswith("iris, none: 0 of 3 test examples, ")
    assert len(progress._results) == 3


def test_examples_that_a_metric_evaluates_do_not_count(made):
    program = dspy.Predict("question -> answer")
    rows = [dspy.Example(question=f"q{i}", answer="0").with_inputs("question") for i in range(3)]
    lm = ScriptedLM({"answer": "0"})

    def judge(example, prediction, trace=None):
        run_examples(program, rows, metric=lambda *_: 1.0, split="judged", lm=lm)
        return 1.0

    progress, _, _ = made(3)
    with progress.following():
        run_examples(program, rows, metric=judge, split="test", lm=lm)
    assert len(progress._results) == 3


@pytest.mark.parametrize(("asked_again", "calls"), [(False, 3), (True, 6)])
def test_json_is_asked_for_only_on_request(asked_again, calls):
    rows = [dspy.Example(question=f"q{i}", answer="0").with_inputs("question") for i in range(3)]
    lm = ScriptedLM(lambda messages: '{"answer": "0"}' if "JSON" in messages[-1]["content"] else "well")
    with in_context(json_fallback=asked_again):
        runs = run_examples(dspy.Predict("question -> answer"), rows, metric=lambda *_: 1.0, split="test", lm=lm)
    assert lm.calls == calls
    assert {run.result.outcome for run in runs} == {"ok" if asked_again else "unparsed"}
