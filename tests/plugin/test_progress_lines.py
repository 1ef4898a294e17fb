"""Lines of progress on the terminal of a pytest run."""

from types import SimpleNamespace

from copa_harness import fixtures
from copa_harness.evaluate.progress import Urgent
from copa_harness.optimize.search.progress import titled


class Reporter:
    def __init__(self, isatty=True):
        self.lines, self.isatty = [], isatty

    def ensure_newline(self):
        pass

    def write_line(self, line):
        self.lines.append(line)


def config(reporter, verbosity=0):
    plugins = {"terminalreporter": reporter}
    manager = SimpleNamespace(getplugin=plugins.get)
    return SimpleNamespace(pluginmanager=manager, get_verbosity=lambda: verbosity)


def test_a_line_is_written_now_and_then(monkeypatch):
    now, reporter = [0.0], Reporter()
    monkeypatch.setattr(fixtures.time, "monotonic", lambda: now[0])
    write = fixtures._terminal_line(config(reporter))
    for second in range(40):
        now[0] = float(second)
        write(f"p: trial {second}")
    assert reporter.lines == ["copa: p: trial 15", "copa: p: trial 30"]


def test_a_log_gets_fewer_lines_than_a_terminal(monkeypatch):
    now, reporter = [0.0], Reporter(isatty=False)
    monkeypatch.setattr(fixtures.time, "monotonic", lambda: now[0])
    write = fixtures._terminal_line(config(reporter))
    for second in range(150):
        now[0] = float(second)
        write(f"p: trial {second}")
    assert reporter.lines == ["copa: p: trial 60", "copa: p: trial 120"]


def test_an_urgent_line_is_never_left_out(monkeypatch):
    now, reporter = [0.0], Reporter()
    monkeypatch.setattr(fixtures.time, "monotonic", lambda: now[0])
    write = fixtures._terminal_line(config(reporter))
    write("p: trial 1")
    titled("iris", write)(Urgent("no answer parses"))
    assert reporter.lines == ["copa: iris: no answer parses"]


def test_workers_and_quiet_runs_write_nothing():
    assert fixtures._terminal_line(config(None)) is None
    assert fixtures._terminal_line(config(Reporter(), verbosity=-1)) is None
