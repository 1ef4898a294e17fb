"""Lines of progress: what they say, how often, and in which characters."""

import threading

import pytest

from copa_harness import COPA
from copa_harness.lm.budget.cost import Cost
from copa_harness.lm.call_context import open_scope
from copa_harness.optimize.search.progress import Progress, incumbent_text
from copa_harness.results import Budget, Usage
from copa_harness.tune.progress import Progress as Training
from copa_harness.tune.progress import report_progress_to


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def pay(scope, n: int, *, first: int = 0) -> None:
    for i in range(first, first + n):
        scope.charge(f"request {i}").settle(Cost(), Usage(paid_calls=1))


def test_a_line_says_phase_trial_incumbent_with_interval_calls_and_time_to_go():
    lines, clock = [], Clock()
    with open_scope("test", budget=Budget(calls=400)) as scope:
        pay(scope, 100)
        progress = Progress(scope, write=lines.append, clock=clock)
        clock.now += 20
        progress.trial("p", 7, scores=[1.0] * 20 + [0.0] * 5, ceiling=300)
    (line,) = lines
    assert line == "p: trial 7, best 0.800 [0.61, 0.91] on 25 rows, 100 of 300 calls, 20 s, at most about 40 s to go"


def test_while_weights_are_trained_the_time_to_go_is_the_trainings_and_no_measure_of_calls_later():
    lines, clock = [], Clock()
    with open_scope("test", budget=Budget(calls=400)) as scope:
        pay(scope, 100)
        progress = Progress(scope, write=lines.append, clock=clock)
        progress.at("step 2: w", scores=[1.0] * 5)
        clock.now += 10
        with report_progress_to(progress.doing), Training(16) as training:
            clock.now += 20
            progress.tick()
            training.step(1, 0.5)
            clock.now += 600
            progress.tick()
        progress.doing("")
        clock.now += 20
        progress.trial("3: p", 1, scores=[1.0] * 5, ceiling=400)
    assert lines[0].endswith("100 of 400 calls, 30 s, LoRA step 0 of 16")
    assert " on 5 rows, 100 of 400 calls, 10 min, LoRA step 1 of 16, " in lines[1]
    assert lines[2].endswith("100 of 400 calls, 11 min, at most about 90 s to go".replace("90 s", "2 min"))


def test_replayed_calls_take_no_time_and_few_paid_ones_tell_no_time_to_go():
    lines, clock = [], Clock()
    with open_scope("test", budget=Budget(calls=400)) as scope:
        progress = Progress(scope, write=lines.append, clock=clock, every_s=0)
        for i in range(100):
            scope.replay(f"request {i}", cost=Cost)
        progress.trial("p", 3, scores=[1.0], ceiling=300)
        for n in (10, 30):
            pay(scope, n, first=scope.charged_calls)
            clock.now += 20
            progress.trial("p", 4, scores=[1.0], ceiling=300)
    assert lines[0].endswith("100 of 300 calls, 0 s")
    assert lines[1].endswith("110 of 300 calls, 20 s")
    assert lines[2].endswith("140 of 300 calls, 40 s, at most about 3 min to go")


def test_a_step_that_need_not_use_its_calls_tells_no_time_to_go():
    lines, clock = [], Clock()
    with open_scope("test", budget=Budget(calls=400)) as scope:
        progress = Progress(scope, write=lines.append, clock=clock, every_s=0)
        pay(scope, 25)
        clock.now += 170
        progress.at("step 1: w", scores=[1.0])
        progress.tick()
    assert lines[0].endswith("25 of 400 calls, 3 min")


def test_what_comes_after_a_study_is_held_to_the_budget_and_not_to_the_studys_share():
    lines, clock = [], Clock()
    with open_scope("test", budget=Budget(calls=400)) as scope:
        progress = Progress(scope, write=lines.append, clock=clock, every_s=0)
        progress.at("p", scores=[1.0], number=3, ceiling=320)
        for i in range(357):
            scope.charge(f"request {i}")
        progress.tick()
    assert ", 357 of 400 calls, " in lines[0]


def test_scoring_the_program_as_written_tells_its_rows():
    lines, clock = [], Clock()
    with open_scope("test", budget=Budget(calls=400)) as scope:
        progress = Progress(scope, write=lines.append, clock=clock, every_s=0)
        done = progress.scoring(25)
        for _ in range(14):
            done(None)
        progress.tick()
        progress.at("p", scores=[1.0])
        progress.tick()
    assert lines[0].startswith("baseline: 14 of 25 rows, 0 of 400 calls, ")
    assert lines[1].startswith("p: best 1.000 ")


def test_every_part_of_a_run_is_named_while_it_runs(toy):
    seen = []

    class Named(Progress):
        def at(self, phase, **more):
            seen.append((phase, more.get("ceiling")))
            super().at(phase, **more)

    from copa_harness.optimize import copa

    original, copa.Progress = copa.Progress, Named
    try:
        COPA(metric=toy.metric, strategy="p", budget=300, lm=toy.lm(), threads=4).compile(
            toy.program(), trainset=toy.train, valset=toy.val
        )
    finally:
        copa.Progress = original
    names = list(dict.fromkeys(phase for phase, _ in seen))
    assert names[:2] == ["baseline", "p"]
    assert "last look" in names


def test_lines_are_limited_by_time_and_not_by_trials():
    lines, clock = [], Clock()
    with open_scope("test") as scope:
        progress = Progress(scope, write=lines.append, clock=clock, every_s=10)
        for number in range(100):
            clock.now += 1
            progress.trial("p", number, scores=[1.0])
        assert len(lines) == 10
        progress.say("step\n over")
        assert lines[-1] == "step over"


def test_a_line_comes_also_where_no_trial_ends_for_long():
    lines, comes = [], threading.Event()
    with open_scope("test", budget=Budget(calls=400)) as scope:
        progress = Progress(scope, write=lambda line: (lines.append(line), comes.set()), every_s=0.01)
        progress.at("step 2: w", scores=[1.0, 0.0])
        with progress.ticking():
            assert comes.wait(10)
    assert lines[0].startswith("step 2: w: best 0.500 [")
    assert " rows, 0 of 400 calls, " in lines[0]
    assert not any(thread.name == "copa-progress" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("settings", "stopped", "reason"),
    [
        ({"strategy": "demos -> instructions", "budget": 2000}, "converged", "no improvement over a full cycle"),
        (
            {"strategy": "demos -> instructions", "budget": 2000, "max_cycles": 1, "epsilon": 0.0},
            "max_cycles",
            "max_cycles = 1, the last of which still improved",
        ),
        ({"strategy": "p", "budget": 60}, "budget", "the budget: "),
        (
            {"strategy": "p", "budget": 900, "patience": 2, "n_rounds": 1},
            "completed",
            "all steps taken; the last search: no improvement in 2 trials",
        ),
    ],
)
def test_the_record_and_the_last_line_say_why_it_ended(toy, settings, stopped, reason):
    lines = []
    optimizer = COPA(metric=toy.metric, lm=toy.lm(), on_progress=lines.append, **settings)
    result = optimizer.compile(toy.program(), trainset=toy.train, valset=toy.val).copa_result
    assert result.stopped == stopped
    assert result.reason.startswith(reason)
    assert lines[-1].endswith(f" ended: {result.reason}")


def test_a_perfect_score_ends_it_and_is_said(toy):
    metric = lambda example, prediction, trace=None: 1.0  # noqa: E731
    result = (
        COPA(metric=metric, lm=toy.lm(), strategy="p")
        .compile(toy.program(), trainset=toy.train, valset=toy.val)
        .copa_result
    )
    assert (result.stopped, result.reason) == ("perfect score", "perfect score on 16 validation examples")


def test_a_run_tells_its_steps_without_control_characters(toy):
    lines = []
    optimizer = COPA(metric=toy.metric, strategy="p", budget=60, lm=toy.lm(), n_demo_sets=2, on_progress=lines.append)
    optimizer.compile(toy.program(), trainset=toy.train, valset=toy.val)
    assert lines[0].startswith("baseline: best 0.")
    assert lines[1].startswith("step p: from best 0.")
    assert all(character.isprintable() for line in lines for character in line)


def test_numbers_are_written_for_people():
    assert incumbent_text([None]) == "no score yet"


def test_one_row_is_not_said_as_several():
    assert incumbent_text([1.0]).endswith(" on 1 row")
    assert incumbent_text([1.0, None, 0.0]).endswith(" on 2 rows")
