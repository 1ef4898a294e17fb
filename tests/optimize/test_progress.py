"""Lines of progress: what they say, how often, and in which characters."""

from copa_harness import COPA
from copa_harness.lm.scope import open_scope
from copa_harness.optimize.progress import Progress, duration_text, incumbent_text
from copa_harness.results import Budget


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_line_says_phase_trial_incumbent_with_interval_calls_and_time_to_go():
    lines, clock = [], Clock()
    with open_scope("test", budget=Budget(calls=400)) as scope:
        for i in range(100):
            scope.reserve(f"request {i}")
        progress = Progress(scope, write=lines.append, clock=clock)
        clock.now += 20
        progress.trial("p", 7, scores=[1.0] * 20 + [0.0] * 5, ceiling=300)
    (line,) = lines
    assert line == "p: trial 7, best 0.800 [0.61, 0.91] on 25 rows, 100 of 300 calls, 20 s, at most about 40 s to go"


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


def test_a_run_tells_its_steps_without_control_characters(toy):
    lines = []
    optimizer = COPA(metric=toy.metric, strategy="p", budget=60, lm=toy.lm(), n_demo_sets=2, on_progress=lines.append)
    optimizer.compile(toy.program(), trainset=toy.train, valset=toy.val)
    assert lines[0].startswith("baseline: best 0.")
    assert lines[1].startswith("step p: from best 0.")
    assert all(character.isprintable() for line in lines for character in line)


def test_numbers_are_written_for_people():
    assert incumbent_text([None]) == "no score yet"
    assert [duration_text(seconds) for seconds in (7.4, 600, 9000)] == ["7 s", "10 min", "2.5 h"]
