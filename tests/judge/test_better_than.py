from dataclasses import dataclass, field

from copa_harness.judge.gates import judge
from copa_harness.judge.intervals import mean_interval
from copa_harness.judge.options import Gates
from copa_harness.judge.paired_gates import JudgedRun
from copa_harness.results import EvaluationResult, ExampleResult, Verdict


@dataclass(frozen=True)
class Rival:
    scores: dict
    fingerprints: dict = field(default_factory=dict)
    name: str = "iris (none)"
    origin: str = ""


def against(before, after, *, gates=None, **more):
    rows = tuple(ExampleResult(f"e{i:03}", float(s)) for i, s in enumerate(after))
    evaluation = EvaluationResult("test", "lm", rows, mean_interval([float(s) for s in after]))
    rival = None if before is None else Rival({f"e{i:03}": float(s) for i, s in enumerate(before)})
    answers = judge(JudgedRun(evaluation, opponent=rival, **more), gates or Gates(better_than="none"))
    (found,) = [answer for answer in answers if answer.gate.startswith("better_than")]
    return found


def test_a_shown_gain_passes():
    answer = against([0] * 20 + [1] * 30, [1] * 15 + [0] * 5 + [1] * 30)
    assert answer.verdict is Verdict.PASS
    assert "15 better, 0 worse" in answer.message
    assert answer.details["p_better"] < 0.05


def test_a_gain_that_may_be_chance_is_undecided_with_the_gain_that_would_show():
    answer = against([0] * 2 + [1] * 48, [1] * 50)
    assert answer.verdict is Verdict.UNDECIDED
    assert "So many examples show a gain of 0.084" in answer.message


def test_no_gain_advises_the_rival():
    answer = against([1] * 50, [1] * 50)
    assert answer.verdict is Verdict.UNDECIDED
    assert "use none, which is no worse" in answer.message


def test_a_shown_loss_fails():
    answer = against([1] * 50, [0] * 12 + [1] * 38)
    assert answer.verdict is Verdict.FAIL
    assert "not by chance" in answer.message


def test_a_rival_that_was_never_run_is_undecided_and_says_how_to_get_one():
    answer = against(None, [1, 0])
    assert answer.verdict is Verdict.UNDECIDED
    assert "Next: run that strategy" in answer.message


def test_a_rival_of_another_metric_is_not_comparable():
    rows = (ExampleResult("a", 1.0),)
    evaluation = EvaluationResult("test", "lm", rows, mean_interval([1]))
    rival = Rival({"a": 0.0}, {"metric": "a" * 64})
    answers = judge(JudgedRun(evaluation, fingerprints={"metric": "b" * 64}, opponent=rival), Gates(better_than="p"))
    assert answers[-1].verdict is Verdict.NOT_COMPARABLE
    assert "run p again" in answers[-1].message


def test_a_failure_is_shared_among_the_gates_that_ask_the_same_and_a_pass_is_not():
    lost, gained = ([1] * 50, [0] * 7 + [1] * 43), ([0] * 6 + [1] * 44, [1] * 50)
    shared = {"families": {"better_than": 20, "max_regression": 1}}
    assert against(*lost).verdict is Verdict.FAIL
    open_now = against(*lost, **shared)
    assert open_now.verdict is Verdict.UNDECIDED
    assert against(*lost, families={"better_than": 1, "max_regression": 20}).verdict is Verdict.FAIL
    assert against(*gained, **shared).verdict is Verdict.PASS


def test_a_gain_that_rounds_to_nothing_does_not_pass():
    answer = against([0.5] * 50, [0.5004] * 50)
    assert answer.details["p_better"] < 0.05 or answer.details["difference"] > 0
    assert answer.verdict is Verdict.UNDECIDED


def test_a_shown_loss_is_told_with_the_error_rate_it_is_held_to():
    answer = against([1] * 50, [0] * 12 + [1] * 38, families={"better_than": 4})
    assert "held to 0.013: one of 4 better_than gates of this suite" in answer.message
