"""The pytest plugin: options, marker, fixtures, hooks. It translates; every decision is made in `session` and below.

An installed but unused plugin registers its options and does nothing: it imports pytest, the standard library and the
modules that say which options there are. Settings are read, and the rest of the package is imported, once a copa test
has been collected (one that carries the `copa` marker or asks for a `copa_*` fixture).
"""

from __future__ import annotations

import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from copa_harness.fixtures import (
    N_REFUSED,
    REFUSED,
    REPORT,
    RUNS,
    SAID,
    STATE,
    TEST_SETTINGS,
    WORKER_RECORDS,
    State,
    copa_base_lm,
    copa_evaluate,
    copa_finetuned_lm,
    copa_prompt_lm,
    copa_run,
    copa_session,
    copa_task,
    families_of,
    is_whole_suite,
)
from copa_harness.formatting import counted, visible
from copa_harness.pytest_options import RUN_ID, add_options, is_disabled, marker_text, run_id, settings_of
from copa_harness.session.options import marker_arguments

if TYPE_CHECKING:
    from copa_harness.session.finish import Report, Tests

__all__ = [
    "copa_base_lm",
    "copa_evaluate",
    "copa_finetuned_lm",
    "copa_prompt_lm",
    "copa_run",
    "copa_session",
    "copa_task",
]

# Options and marker


def pytest_addoption(parser: pytest.Parser) -> None:
    """Registers `--copa-*`, with ini twins `copa_*`."""
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker, so that `--strict-markers` knows it."""
    config.addinivalue_line("markers", marker_text())


# Collection


def _fixture_names(item: pytest.Item) -> list[str]:
    return [name for name in getattr(item, "fixturenames", ()) if name.startswith("copa_")]


def _is_copa(item: pytest.Item) -> bool:
    return item.get_closest_marker("copa") is not None or bool(_fixture_names(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Any:
    """Reads settings and markers of the copa tests that are left after deselection; the others count, too.

    Raises:
        pytest.UsageError: An option or a marker argument cannot be used.
    """
    collected = [item for item in items if _is_copa(item)]
    yield
    _read_markers(config, items, collected)


def _read_markers(config: pytest.Config, items: list[pytest.Item], collected: list[pytest.Item]) -> None:
    """Gives every copa test its settings.

    `collected` are the copa tests there were before any was deselected.
    """
    copa_items = [item for item in items if _is_copa(item)]
    if not copa_items:
        return
    if is_disabled(config):
        for item in copa_items:
            item.add_marker(pytest.mark.skip(reason="copa tests are disabled (--copa-disable)"))
        return
    from copa_harness.errors import ConfigurationError

    refused: dict[str, str] = {}
    try:
        settings = settings_of(config)
    except ConfigurationError as error:
        refused = {item.nodeid: str(error) for item in copa_items}
    else:
        said, chosen = {}, set(copa_items)
        for item in dict.fromkeys((*copa_items, *collected)):
            try:
                said[item] = _marker_arguments(item)
            except ConfigurationError as error:
                if item in chosen:
                    refused[item.nodeid] = f"{item.nodeid}: {error}"
        skipped = {item: why for item in said if (why := settings.merged(**said[item]).why_skipped) is not None}
        for item, why in skipped.items():
            item.add_marker(pytest.mark.skip(reason=why))
            del said[item]
        skipped = {item: why for item, why in skipped.items() if item in chosen}
        settings = replace(settings, one_of_many=hasattr(config, "workerinput"))
        families = families_of(settings, said)
        for item in chosen.intersection(said):
            item.stash[TEST_SETTINGS] = replace(
                settings.merged(**said[item]),
                families=families.get(item, {}),
                is_whole_suite=is_whole_suite(item.path.parent, config),
            )
        order = {item.nodeid: n for n, item in enumerate(items)}
        config.stash[STATE] = State(settings, order=order, skipped=Counter(skipped.values()))
    if refused and hasattr(config, "workerinput"):
        # A usage error would take the xdist worker down without a word; the tests say it instead.
        for item in copa_items:
            if item.nodeid in refused:
                item.stash[REFUSED] = refused[item.nodeid]
    elif refused:
        raise pytest.UsageError(*dict.fromkeys(refused.values()))


def _marker_arguments(item: pytest.Item) -> dict[str, Any]:
    """The arguments of all `copa` markers of a test, the closest winning, completed by parametrization."""
    from copa_harness.errors import ConfigurationError

    markers = list(item.iter_markers("copa"))
    keywords: dict[str, Any] = {}
    for marker in reversed(markers):
        keywords.update(marker_arguments(marker.args, marker.kwargs))
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    for name in ("strategy", "budget", "seed"):
        if markers and name in parameters and isinstance(parameters[name], (str, int)):
            keywords.setdefault(name, parameters[name])
    if markers and not _fixture_names(item) and "request" not in getattr(item, "fixturenames", ()):
        raise ConfigurationError(
            "marked copa, but the test takes no copa fixture, so nothing would run; add copa_run to its arguments."
        )
    return marker_arguments((), keywords)


def pytest_report_collectionfinish(config: pytest.Config) -> str | list[str]:
    """The ceilings in force, when there are copa tests, and why some of them are skipped."""
    state = config.stash.get(STATE, None)
    if state is None:
        return []
    return [
        state.settings.describe(),
        *(f"copa: {counted(n, 'test')} skipped: {why}" for why, n in state.skipped.items()),
    ]


# Running and failing


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Makes the models that were asked for, so that a wrong name or an unusable cache is one error, not many.

    Raises:
        pytest.UsageError: There is no such model, or the cache directory cannot be used.
    """
    config = session.config
    state = config.stash.get(STATE, None)
    if config.option.collectonly or hasattr(config, "workerinput"):
        return
    if state is not None or config.pluginmanager.hasplugin("dsession"):
        _run_base(config)
    if state is None:
        return
    from copa_harness.errors import ConfigurationError
    from copa_harness.session.models import Models, check_names

    try:
        check_names(state.settings)
        Models(state.settings).close()
    except ConfigurationError as error:
        raise pytest.UsageError(str(error)) from None


def _run_base(config: pytest.Config) -> None:
    """The suite of the commit that this one is to be compared with, if one was named.

    Raises:
        pytest.UsageError: There is no such commit, or its suite cannot be run.
    """
    from copa_harness.errors import ConfigurationError

    try:
        settings = settings_of(config)
        if settings.against is None or settings.plan or is_disabled(config):
            return
        from copa_harness.session.against import named, run_base

        terminal = config.pluginmanager.getplugin("terminalreporter")
        if terminal is not None:
            terminal.write_line(f"copa: first the suite of {named(settings)}, to compare with")
        invocation = config.invocation_params
        run_base(settings, arguments=[str(one) for one in invocation.args], directory=invocation.dir)
    except ConfigurationError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fails a test whose marker or settings were refused in an xdist worker."""
    if message := item.stash.get(REFUSED, None):
        pytest.fail(message, pytrace=False)


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Says behind a failed comparison of a score what the number means."""
    for value in (left, right):
        if type(value).__module__ == "copa_harness.session.runs" and hasattr(value, "summary"):
            shown = [f"{side:.3f}" if isinstance(side, float) else repr(side) for side in (left, right)]
            return [f"{shown[0]} {op} {shown[1]}", value.summary()]
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Shows errors of this package as one paragraph, and what was measured beside a failed test."""
    report = yield
    report.copa_test = _is_copa(item)
    if report.when == "call" and report.copa_test:
        item.user_properties.extend(_properties(item))
        report.user_properties = list(item.user_properties)
    if call.excinfo is not None and _is_copa(item) and _is_refusal(call.excinfo.value):
        # Neither passed nor failed: there was not enough to spend to find out.
        path, line, _ = item.reportinfo()
        report.outcome = "skipped"
        report.longrepr = (str(path), (line or 0) + 1, f"undecided: budget exhausted: {call.excinfo.value}")
        report.copa_refused = True
        item.config.stash[N_REFUSED] = item.config.stash.get(N_REFUSED, 0) + 1
        return report
    if call.excinfo is not None and _is_copa(item) and item.config.getoption("tbstyle", "auto") in ("auto", "short"):
        from copa_harness.errors import CopaError

        if isinstance(call.excinfo.value, CopaError):
            said = f"{type(call.excinfo.value).__name__}: {call.excinfo.value}"
            first = item.config.stash.setdefault(SAID, {}).setdefault(said, item.nodeid)
            where = _last_line_of_the_user(call.excinfo)
            report.longrepr = f"{said}{where}" if first == item.nodeid else f"as in {first}: {said[:60]}..."
    if report.when == "call" and report.failed:
        said = "" if call.excinfo is None else str(call.excinfo.value)  # check() has said it all already
        descriptions = [run.describe() for run in item.stash.get(RUNS, [])]
        report.sections.extend(("copa", text) for text in dict.fromkeys(descriptions) if text not in said)
    return report


def _properties(item: pytest.Item) -> list[tuple[str, object]]:
    """What JUnit's file and others say of a test's runs: score, interval, n, verdict, drift, calls, dollars."""
    from copa_harness.session.runs import CopaRun

    found: list[tuple[str, object]] = []
    for run in item.stash.get(RUNS, []):
        evaluation = run.evaluation if isinstance(run, CopaRun) else run
        usage = run.record.usage if isinstance(run, CopaRun) else run.usage
        interval = evaluation.interval
        told = {
            "task": evaluation.task,
            "strategy": evaluation.strategy,
            "score": f"{float(evaluation.score):.6g}",
            "interval": f"{interval.low:.6g} {interval.high:.6g}",
            "n": evaluation.n,
            "calls": usage.paid_calls,
            "usd": f"{usage.usd:.6g}",
        }
        if isinstance(run, CopaRun):
            told["verdict"] = run.verdict.value
            if run.record.drift is not None:
                told["drift"] = run.record.drift.text()
        found += [(f"copa_{name}", value) for name, value in told.items()]
    return found


def _is_refusal(error: BaseException) -> bool:
    from copa_harness.errors import BudgetExhausted

    return isinstance(error, BudgetExhausted)


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.CollectReport | pytest.TestReport) -> tuple[str, str, str] | None:
    """A test that ended for want of budget is an outcome of its own."""
    return ("budget exhausted", "B", "BUDGET EXHAUSTED") if getattr(report, "copa_refused", False) else None


def _last_line_of_the_user(excinfo: pytest.ExceptionInfo[BaseException]) -> str:
    """`(file:line)` of the innermost frame that belongs to no installed package nor to Python, or nothing."""
    ours = str(Path(__file__).parent), sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")
    for entry in reversed(excinfo.traceback):
        path = str(entry.path)
        if Path(path).is_file() and not path.startswith(ours) and "site-packages" not in path:
            return f"\n({path}:{entry.lineno + 1})"
    return ""


# Reports


def _rows(config: pytest.Config) -> list[dict[str, Any]]:
    """Records of this process as JSON, each with the position of its test, so that workers' records can be sorted."""
    state = config.stash.get(STATE, None)
    if state is None or state.session is None:
        return []
    return [{**row, "order": state.order.get(row["test"], -1)} for row in state.session.rows()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """xdist: takes over the records of a worker that has finished."""
    output, stash = getattr(node, "workeroutput", {}), node.config.stash
    stash.setdefault(WORKER_RECORDS, []).extend(output.get("copa_records", []))
    stash[N_REFUSED] = stash.get(N_REFUSED, 0) + output.get("copa_refused", 0)
    if "copa_run_id" in output:
        stash[RUN_ID] = output["copa_run_id"]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes report files and baselines, in the one process that has all records; a worker hands its records on."""
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["copa_records"] = _rows(config)
        config.workeroutput["copa_refused"] = config.stash.get(N_REFUSED, 0)
        config.workeroutput["copa_run_id"] = run_id(config)
        return
    rows = [*config.stash.get(WORKER_RECORDS, []), *_rows(config)]
    tests = _tests(config, interrupted=session.exitstatus == pytest.ExitCode.INTERRUPTED)
    if rows:
        from copa_harness.session.finish import finish

        config.stash[REPORT] = report = finish(rows, settings=settings_of(config), tests=tests)
        if report.exit_status and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = report.exit_status
    elif tests.failed or tests.n_refused or (tests.interrupted and config.stash.get(STATE, None) is not None):
        from copa_harness.session.finish import finish_without_runs

        if (left := finish_without_runs(settings_of(config))) is not None:
            config.stash[REPORT] = left


def _tests(config: pytest.Config, *, interrupted: bool) -> Tests:
    """What pytest knows of the copa tests of all processes."""
    from copa_harness.session.finish import Tests

    terminal = config.pluginmanager.getplugin("terminalreporter")
    reports = [one for some in getattr(terminal, "stats", {}).values() for one in some]
    ours = [one for one in reports if getattr(one, "copa_test", False)]
    return Tests(
        n_refused=config.stash.get(N_REFUSED, 0),
        locations={one.nodeid: (one.location[0], (one.location[1] or 0) + 1) for one in ours},
        failed={one.nodeid: _why(one) for one in ours if one.failed},
        interrupted=interrupted,
    )


def _why(report: pytest.TestReport) -> str:
    """Why a test failed: the message of its error, without the traceback."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash is not None else str(report.longrepr)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Iterator[None]:
    """Prints what came of the copa tests; a reason for the exit status that no test gives is the very last."""
    try:
        return (yield)
    finally:
        report = config.stash.get(REPORT, None)
        if report is not None:
            _print(terminalreporter, report, is_full=_is_full(config))


def _is_full(config: pytest.Config) -> bool:
    return config.get_verbosity() > 0 or settings_of(config).report == "full"


def _print(terminal: pytest.TerminalReporter, report: Report, *, is_full: bool) -> None:
    terminal.section("copa")
    for title, table in report.tables if is_full else ():
        terminal.write_line(f"{title}:", bold=True)
        _write(terminal, table, "")
    _write(terminal, report.summary, "")
    if report.gates:
        terminal.write_line("gates that did not pass:", bold=True)
        _write(terminal, report.gates, "")
    _write(terminal, *report.notes, *(report.asides if is_full else ()))
    for remark in report.remarks:
        terminal.write_line(visible(remark), red=True)
    _write(terminal, report.totals)
    if report.written:
        _write(terminal, f"report: {report.written}")
    if os.environ.get("GITHUB_ACTIONS") == "true":
        _write(terminal, *report.annotations)
    for reason in report.reasons:
        terminal.write_line(visible(f"exit status {report.exit_status}: {reason}"), red=True)
    for verdict, count in report.open_runs.items():  # into pytest's own last line, where a person looks
        terminal.stats[verdict] = [object()] * count


def _write(terminal: pytest.TerminalReporter, *texts: str) -> None:
    for line in (line for text in texts for line in text.split("\n")):
        terminal.write_line(visible(line))
