"""Lines of progress on the terminal of a pytest run."""

from types import SimpleNamespace

import pytest

from copa_harness import fixtures
from copa_harness.evaluate.progress import Urgent
from copa_harness.optimize.search.progress import titled


class Reporter:
    def __init__(self, isatty=True):
        self.written, self.isatty = "", isatty

    @property
    def lines(self):
        return self.written.splitlines()

    def ensure_newline(self):
        if self.written and not self.written.endswith("\n"):
            self.written += "\n"

    def write(self, text, flush=False):
        self.written += text

    def write_line(self, line):
        self.written += f"{line}\n"


@pytest.fixture
def now(monkeypatch):
    clock = SimpleNamespace(s=0.0)
    monkeypatch.setattr(fixtures.time, "monotonic", lambda: clock.s)
    return clock


def lines_on(reporter, verbosity=0):
    manager = SimpleNamespace(getplugin={"terminalreporter": reporter}.get)
    return fixtures._terminal_lines(SimpleNamespace(pluginmanager=manager, get_verbosity=lambda: verbosity))


def test_a_log_gets_a_line_now_and_then(now):
    reporter = Reporter(isatty=False)
    lines = lines_on(reporter)
    for second in range(150):
        now.s = float(second)
        lines.write(f"p: trial {second}")
    assert reporter.lines == ["copa: p: trial 60", "copa: p: trial 120"]


def test_a_terminal_has_one_line_that_is_written_over(now):
    reporter = Reporter()
    lines = lines_on(reporter)
    for second in range(6):
        now.s = float(second)
        lines.write(f"p: trial {second}")
    assert reporter.written == "copa: p: trial 2\r\x1b[2Kcopa: p: trial 4"


def test_the_line_is_gone_before_pytest_writes_on(now):
    reporter = Reporter()
    lines = lines_on(reporter)
    now.s = 5.0
    lines.write("p: trial 5")
    lines.pytest_runtest_logreport()
    lines.pytest_runtest_logreport()
    assert reporter.written == "copa: p: trial 5\r\x1b[2K"


def test_a_line_too_long_for_the_terminal_is_cut(now, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    reporter = Reporter()
    now.s, lines = 0.0, lines_on(reporter)
    now.s = 5.0
    lines.write("x" * 50)
    assert reporter.written == "copa: xxxxxxxxxx..."


def test_an_urgent_line_is_never_left_out_but_not_repeated_within_half_a_minute(now):
    reporter = Reporter(isatty=False)
    lines = lines_on(reporter)
    say = titled("iris", lines.write)
    lines.write("p: trial 1")
    for now.s in (1.0, 2.0, 29.0, 31.5):
        say(Urgent("no answer parses"))
    assert reporter.lines == ["copa: iris: no answer parses"] * 2


def test_what_a_model_says_cannot_steer_the_terminal(now):
    reporter = Reporter(isatty=False)
    lines_on(reporter).write(Urgent("answers look like '\x1b[31mred\u202e'"))
    assert reporter.lines == ["copa: answers look like '<U+001B>[31mred<U+202E>'"]


def test_workers_and_quiet_runs_write_nothing():
    assert lines_on(None) is None
    assert lines_on(Reporter(), verbosity=-1) is None
