"""The pytest door: options, marker, fixtures, hooks. It translates; every decision is made in `session.py` and below.

This module imports pytest and the standard library only, and an installed but unused plugin does nothing: settings
are read, and the rest of the package imported, once a copa test has been collected (one that carries the `copa`
marker or asks for a `copa_*` fixture).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from copa_harness.fixtures import (
    MARKER_ARGUMENTS,
    REFUSED,
    REPORT,
    RUNS,
    STATE,
    WORKER_RECORDS,
    State,
    copa_base_lm,
    copa_evaluate,
    copa_finetuned_lm,
    copa_prompt_lm,
    copa_run,
    copa_session,
    copa_task,
    given_settings,
)

if TYPE_CHECKING:
    from copa_harness.session.settings import MarkerArguments

__all__ = [
    "copa_base_lm",
    "copa_evaluate",
    "copa_finetuned_lm",
    "copa_prompt_lm",
    "copa_run",
    "copa_session",
    "copa_task",
]

OPTIONS: dict[str, tuple[str, str]] = {
    "budget": ("LEVEL", "ceiling of each optimization run: light (400 calls), medium (1,600), heavy (6,400) or calls=N "
               "[default: light]"),
    "lm": ("MODEL", "base model: embedded, hf:<path or id>, or a name DSPy knows, such as openai/<name> "
           "[default: embedded]"),
    "prompt-lm": ("MODEL", "model that proposes instructions [default: none]"),
    "seed": ("N", "seed of every random choice [default: 0]"),
    "threads": ("N", "examples in flight at once [default: 32]"),
    "cache-dir": ("DIR", "answers, finished stages, LoRA adapters and artifacts [default: .copa_cache in the rootdir]"),
    "report-dir": ("DIR", "latest.json, latest.md and numbered copies [default: reports in the rootdir]"),
    "api-base": ("URL", "endpoint of the model, when it has one [default: DSPy's]"),
}  # fmt: skip
"""Name, metavar and help of every option with a value; each has an ini and an environment twin."""

MARKER = (
    "copa(strategy='p -> w -> p', budget=None, min_score=None, max_regression=None, max_calls=None, "
    "max_error_rate=None, lm=None, prompt_lm=None, seed=None, threads=None, max_cycles=None, epsilon=None, "
    "optimizer_kwargs=None, undecided_fails=False): optimize the task's program before the test and gate the result."
)


# Options and marker


def pytest_addoption(parser: pytest.Parser) -> None:
    """Registers `--copa-*`, with ini twins `copa_*`."""
    group = parser.getgroup("copa", "copa: improve and gate DSPy programs (command line > COPA_* > ini > marker)")
    for name, (metavar, text) in OPTIONS.items():
        group.addoption(f"--copa-{name}", metavar=metavar, default=None, help=text)
        parser.addini(f"copa_{name.replace('-', '_')}", help=f"like --copa-{name}", default=None)
    group.addoption("--copa-disable", action="store_true", default=None, help="skip every copa test [default: off]")
    parser.addini("copa_disable", help="like --copa-disable", type="bool", default=False)
    group.addoption(
        "--copa-bless",
        action="store_true",
        default=False,
        help="accept the results as new baselines [default: off; command line only]",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker, so that `--strict-markers` knows it."""
    config.addinivalue_line("markers", MARKER)


def _is_disabled(config: pytest.Config) -> bool:
    if config.getoption("copa_disable"):
        return True
    variable = os.environ.get("COPA_DISABLE", "").strip().lower()
    return variable not in ("0", "false", "no", "off") if variable else bool(config.getini("copa_disable"))


# Collection


def _fixture_names(item: pytest.Item) -> list[str]:
    return [name for name in getattr(item, "fixturenames", ()) if name.startswith("copa_")]


def _is_copa(item: pytest.Item) -> bool:
    return item.get_closest_marker("copa") is not None or bool(_fixture_names(item))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Reads settings and markers of the copa tests that are left after deselection.

    Raises:
        pytest.UsageError: An option or a marker argument cannot be used.
    """
    copa_items = [item for item in items if _is_copa(item)]
    if not copa_items:
        return
    if _is_disabled(config):
        for item in copa_items:
            item.add_marker(pytest.mark.skip(reason="copa tests are disabled (--copa-disable)"))
        return
    from copa_harness.errors import ConfigurationError
    from copa_harness.session.settings import Settings

    refused: dict[str, str] = {}
    try:
        settings = Settings.from_given(
            given_settings(config), root=config.rootpath, bless=bool(config.getoption("copa_bless"))
        )
        config.stash[STATE] = State(settings, order={item.nodeid: n for n, item in enumerate(items)})
    except ConfigurationError as error:
        refused = {item.nodeid: str(error) for item in copa_items}
    else:
        for item in copa_items:
            try:
                item.stash[MARKER_ARGUMENTS] = _marker_arguments(item)
            except ConfigurationError as error:
                refused[item.nodeid] = f"{item.nodeid}: {error}"
    if refused and hasattr(config, "workerinput"):
        # A usage error would take the xdist worker down without a word; the tests say it instead.
        for item in copa_items:
            if item.nodeid in refused:
                item.stash[REFUSED] = refused[item.nodeid]
    elif refused:
        raise pytest.UsageError(*dict.fromkeys(refused.values()))


def _marker_arguments(item: pytest.Item) -> MarkerArguments:
    """The arguments of all `copa` markers of a test, the closest winning, completed by parametrization."""
    from copa_harness.errors import ConfigurationError
    from copa_harness.session.settings import MarkerArguments

    markers = list(item.iter_markers("copa"))
    keywords: dict[str, Any] = {}
    for marker in reversed(markers):
        MarkerArguments.from_marker(marker.args, marker.kwargs)
        keywords.update(marker.kwargs)
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    for name in ("strategy", "budget", "seed"):
        if markers and name in parameters and isinstance(parameters[name], (str, int)):
            keywords.setdefault(name, parameters[name])
    if markers and not _fixture_names(item) and "request" not in getattr(item, "fixturenames", ()):
        raise ConfigurationError(
            "marked copa, but the test takes no copa fixture, so nothing would run; add copa_run to its arguments."
        )
    return MarkerArguments.from_marker((), keywords)


def pytest_report_collectionfinish(config: pytest.Config) -> str | list[str]:
    """One line with the ceilings in force, when there are copa tests."""
    state = config.stash.get(STATE, None)
    return state.settings.describe() if state else []


# Running and failing


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Makes the base model that was asked for, so that a wrong name or an unusable cache is one error, not many.

    Raises:
        pytest.UsageError: There is no such model, or the cache directory cannot be used.
    """
    config = session.config
    state = config.stash.get(STATE, None)
    if state is None or config.option.collectonly or hasattr(config, "workerinput"):
        return
    from copa_harness.errors import ConfigurationError
    from copa_harness.session.models import Models

    try:
        models = Models(state.settings)
        if "lm" in state.settings.forced:
            models.named(state.settings.lm)
        models.close()
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
    if call.excinfo is not None and _is_copa(item) and item.config.getoption("tbstyle", "auto") in ("auto", "short"):
        from copa_harness.errors import CopaError

        if isinstance(call.excinfo.value, CopaError):
            where = _last_line_of_the_user(call.excinfo)
            report.longrepr = f"{type(call.excinfo.value).__name__}: {call.excinfo.value}{where}"
    if report.when == "call" and report.failed:
        said = "" if call.excinfo is None else str(call.excinfo.value)  # check() has said it all already
        descriptions = [run.describe() for run in item.stash.get(RUNS, [])]
        report.sections.extend(("copa", text) for text in dict.fromkeys(descriptions) if text not in said)
    return report


def _last_line_of_the_user(excinfo: pytest.ExceptionInfo[BaseException]) -> str:
    """`(file:line)` of the innermost frame that belongs to no installed package, or nothing."""
    package = str(Path(__file__).parent)
    for entry in reversed(excinfo.traceback):
        path = str(entry.path)
        if Path(path).is_file() and not path.startswith(package) and "site-packages" not in path:
            return f"\n({path}:{entry.lineno + 1})"
    return ""


# Reports


def _rows(config: pytest.Config) -> list[dict[str, Any]]:
    """Records of this process as JSON, each with the position of its test, so that workers' records can be sorted."""
    state = config.stash.get(STATE, None)
    if state is None or state.session is None:
        return []
    return [{**row, "order": state.order.get(row["record"]["test"], -1)} for row in state.session.rows()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """xdist: takes over the records of a worker that has finished."""
    rows = getattr(node, "workeroutput", {}).get("copa_records", [])
    node.config.stash.setdefault(WORKER_RECORDS, []).extend(rows)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the report files, in the one process that has all records; a worker hands its records on."""
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["copa_records"] = _rows(config)
        return
    rows = [*config.stash.get(WORKER_RECORDS, []), *_rows(config)]
    if rows:
        from copa_harness.session.ending import finish
        from copa_harness.session.settings import Settings

        settings = Settings.from_given(given_settings(config), root=config.rootpath)
        config.stash[REPORT] = finish(rows, settings=settings)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the tables when copa tests ran."""
    report = config.stash.get(REPORT, None)
    if report is None:
        return
    terminalreporter.section("copa")
    for title, table in report.tables:
        terminalreporter.write_line(f"{title}:", bold=True)
        for line in table.splitlines():
            terminalreporter.write_line(line)
        terminalreporter.write_line("")
    if report.gates:
        terminalreporter.write_line("gates that did not pass:", bold=True)
        terminalreporter.write_line(report.gates)
        terminalreporter.write_line("")
    for remark in report.remarks:
        terminalreporter.write_line(remark, red=True)
    where = f"; report: {report.written}" if report.written else ""
    terminalreporter.write_line(f"runs: {report.verdicts}{where}")
