"""The `copa_*` fixtures, and what the plugin remembers between its hooks.

It translates a test's settings into calls of `CopaSession` and decides nothing; a fixture imports what it needs when it
is first asked for.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import pytest

from copa_harness.formatting import visible
from copa_harness.pytest_options import settings_of
from copa_harness.session.options import COMPARING, Settings, comparisons_in

if TYPE_CHECKING:
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.session.finish import Report
    from copa_harness.session.runs import CopaRun, ScoredEvaluation
    from copa_harness.session.session import CopaSession
    from copa_harness.tasks.task import Task


@dataclass(slots=True)
class State:
    """What the plugin remembers in `config.stash`; created when the first copa test is collected."""

    settings: Settings
    order: dict[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    session: CopaSession | None = None


STATE = pytest.StashKey[State]()
WORKER_RECORDS = pytest.StashKey[list[dict[str, Any]]]()
TEST_SETTINGS: pytest.StashKey[Settings] = pytest.StashKey()
REFUSED = pytest.StashKey[str]()
RUNS = pytest.StashKey[list[Any]]()
SAID: pytest.StashKey[dict[str, str]] = pytest.StashKey()
"""Errors of this package that were shown, and of which test: the next tests refer to it."""

REPORT: pytest.StashKey[Report] = pytest.StashKey()
N_REFUSED = pytest.StashKey[int]()
"""Tests that ended because the session's ceilings refused a call."""

LOGGED_EVERY_S = 60.0
"""Seconds between two lines of progress where the output is no terminal: a CI log stays readable, and the job is not
taken for dead."""

PROGRESS_EVERY_S = 2.0
"""The same on a terminal, where the line is written over the last one."""

REPEATED_AFTER_S = 30.0
"""Seconds before an urgent line is said again that has not changed."""


class TerminalLines:
    """Writes lines of progress past pytest's capturing: on a terminal one line in place, else a line now and then."""

    def __init__(self, reporter: pytest.TerminalReporter, capture: Any) -> None:
        self._reporter, self._capture = reporter, capture
        self._last = time.monotonic()
        self._said: dict[str, float] = {}
        self._in_place = False

    def write(self, line: str) -> None:
        """Write a line, if it is time for one or it is urgent."""
        from copa_harness.evaluate.progress import Urgent

        now, line = time.monotonic(), line if isinstance(line, Urgent) else visible(line)
        if isinstance(line, Urgent):
            if now - self._said.get(line, -math.inf) < REPEATED_AFTER_S:
                return
            self._said[line] = now
            self._write(lambda: self._reporter.write_line(f"copa: {visible(line)}"))
        elif self._reporter.isatty:
            if now - self._last >= PROGRESS_EVERY_S:
                self._last = now
                self._write(lambda: self._over(f"copa: {line}"))
        elif now - self._last >= LOGGED_EVERY_S:
            self._last = now
            self._write(lambda: self._reporter.write_line(f"copa: {line}"))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self) -> None:
        """Make room for what pytest writes next."""
        if self._in_place:
            self._write(lambda: None)

    def _write(self, write: Callable[[], None]) -> None:
        with nullcontext() if self._capture is None else self._capture.global_and_fixture_disabled():
            if self._in_place:
                self._reporter.write("\r\x1b[2K", flush=True)
                self._in_place = False
            else:
                self._reporter.ensure_newline()
            write()

    def _over(self, line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._reporter.write(line if len(line) <= width else f"{line[: width - 3]}...", flush=True)
        self._in_place = True


def _terminal_lines(config: pytest.Config) -> TerminalLines | None:
    """Where progress is written; None without a terminal of our own (xdist workers, `-q`)."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is None or config.get_verbosity() < 0:
        return None
    return TerminalLines(reporter, config.pluginmanager.getplugin("capturemanager"))


@pytest.fixture(scope="session")
def copa_session(pytestconfig: pytest.Config) -> Iterator[CopaSession]:
    """The session that runs and remembers everything: cache, engines, finished stages, records."""
    from copa_harness.session.session import CopaSession

    state = pytestconfig.stash.get(STATE, None)
    if state is None:  # reached by getfixturevalue() from a test that names no copa fixture
        state = State(settings_of(pytestconfig))
        pytestconfig.stash[STATE] = state
    lines = _terminal_lines(pytestconfig)
    if lines is not None:
        pytestconfig.pluginmanager.register(lines)
    with CopaSession(state.settings, on_progress=None if lines is None else lines.write) as session:
        state.session = session
        yield session


@pytest.fixture(scope="session")
def copa_task() -> Task:
    """The task under test: a program, a metric and three splits. Define your own."""
    pytest.fail(
        "no task to test: define a fixture copa_task in this module or in a conftest.py, for instance\n\n"
        "    @pytest.fixture(scope='module')\n"
        "    def copa_task():\n"
        "        return copa_harness.tasks.iris()",
        pytrace=False,
    )


def _settings(request: pytest.FixtureRequest) -> Settings:
    """What holds for the test that asks: the session's settings, merged with its marker."""
    stash, config = cast("pytest.Item", request.node).stash, request.config
    return stash.get(TEST_SETTINGS, None) or config.stash[STATE].settings


def _only_planned(
    request: pytest.FixtureRequest, session: CopaSession, task: Task, settings: Settings, **models: Any
) -> NoReturn:
    """Note what the test would pay, and skip it."""
    session.plan(task, settings=settings, test=cast("pytest.Item", request.node).nodeid, **models)
    pytest.skip("plan only: no call was made (--copa-plan)")


@pytest.fixture
def copa_base_lm(request: pytest.FixtureRequest, copa_session: CopaSession) -> MeteredLM:
    """The base model (`--copa-lm`, or the marker's). Override it to test with a model of your own making."""
    return copa_session.base_lm(_settings(request))


@pytest.fixture
def copa_prompt_lm(request: pytest.FixtureRequest, copa_session: CopaSession) -> MeteredLM | None:
    """The model that proposes instructions (`--copa-prompt-lm`), or None. Override it like `copa_base_lm`."""
    return copa_session.prompt_lm(_settings(request))


@pytest.fixture
def copa_finetuned_lm(
    request: pytest.FixtureRequest, copa_session: CopaSession, copa_task: Task, copa_base_lm: MeteredLM
) -> MeteredLM:
    """The base model after fine-tuning on the task: what the strategy `w` comes up with."""
    settings = _settings(request)
    if settings.plan:
        _only_planned(request, copa_session, copa_task, replace(settings, strategy="w"), lm=copa_base_lm)
    return copa_session.finetuned_lm(copa_task, lm=copa_base_lm, settings=settings)


@pytest.fixture
def copa_evaluate(
    request: pytest.FixtureRequest, copa_session: CopaSession, copa_task: Task, copa_base_lm: MeteredLM
) -> Callable[..., ScoredEvaluation]:
    """A function `(program=None, *, lm=None, split="test")` that scores a program on a split of the task.

    Default program: the task's, as written. Default model: the base model.
    """
    item = cast("pytest.Item", request.node)

    def evaluate(program: Any = None, *, lm: MeteredLM | None = None, split: str = "test") -> ScoredEvaluation:
        settings = _settings(request)
        if settings.plan:
            plain = replace(settings, strategy="none")
            _only_planned(request, copa_session, copa_task, plain, lm=copa_base_lm if lm is None else lm)
        evaluation = copa_session.evaluate(
            copa_task,
            program=program,
            lm=copa_base_lm if lm is None else lm,
            split=split,
            settings=settings,
            test=item.nodeid,
        )
        item.stash.setdefault(RUNS, []).append(evaluation)
        return evaluation

    return evaluate


@pytest.fixture
def copa_run(
    request: pytest.FixtureRequest,
    copa_session: CopaSession,
    copa_task: Task,
    copa_base_lm: MeteredLM,
    copa_prompt_lm: MeteredLM | None,
) -> CopaRun:
    """The task's program after the optimization the marker asks for, scored once on the test split."""
    item = cast("pytest.Item", request.node)
    settings = _settings(request)
    if settings.plan:
        _only_planned(request, copa_session, copa_task, settings, lm=copa_base_lm, prompt_lm=copa_prompt_lm)
    run = copa_session.run(copa_task, lm=copa_base_lm, prompt_lm=copa_prompt_lm, settings=settings, test=item.nodeid)
    item.stash.setdefault(RUNS, []).append(run)
    return run


def families_of(settings: Settings, said: Mapping[pytest.Item, Mapping[str, Any]]) -> dict[pytest.Item, dict[str, int]]:
    """How many gates of a suite ask the same question as a test's: they share one error rate.

    A suite is a folder. Gates of a marker, of the ini file and those that the test's own code gives to `check()` are
    counted, before anything runs and before `-k` takes anything away.

    Args:
        settings: Of the session.
        said: The marker's arguments by test.
    """
    declared: dict[pytest.Item, frozenset[str]] = {}
    for item, arguments in said.items():
        if {"copa_run", "request"} & set(getattr(item, "fixturenames", ())):
            gates = settings.merged(**arguments).gates
            code = getattr(getattr(item, "function", None), "__code__", None)
            asked = comparisons_in(code) if code is not None else frozenset()
            declared[item] = asked | {name for name in COMPARING if gates.get(name) is not None}
    suites: dict[Path, Counter[str]] = {}
    for item, names in declared.items():
        suites.setdefault(item.path.parent, Counter()).update([*names, ""])
    return {
        item: {name: suites[item.path.parent][name if name in names else ""] for name in COMPARING}
        for item, names in declared.items()
    }


def is_whole_suite(folder: Path, config: pytest.Config) -> bool:
    """Whether the command line asks for all tests of a folder, not for a file or a test in it."""
    asked = [config.invocation_params.dir / argument for argument in config.args if "::" not in argument]
    return any(folder.is_relative_to(path.resolve()) for path in asked if path.is_dir())
