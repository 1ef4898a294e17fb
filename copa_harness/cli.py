"""The command `copa`: looks after what runs leave behind. It translates; the work is done below.

Loads the standard library only until a command asks for more, and never torch or dspy.

    copa init
    copa cache stats
    copa cache prune --older-than 30d --max-size 500MB
    copa cache clear --yes
    copa baseline list
    copa baseline show iris/p
    copa baseline diff iris/none iris/p
    copa baseline bless suites/ -k iris
    copa power iris/p --margin 0.05
    copa show
    copa compare main.json reports/latest.json
    copa history
    copa export .copa_cache/artifacts/<run> --to dspy
    copa export .copa_cache/artifacts/<run> adapter.gguf --base model.gguf
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from copa_harness.errors import ArtifactError, ConfigurationError, CopaError
from copa_harness.export.formats import FORMS
from copa_harness.formatting import counted, size, visible
from copa_harness.option_fields import default_of
from copa_harness.session.options import Settings

if TYPE_CHECKING:
    from copa_harness.store.baselines import Baseline

_SIZES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TIMES_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command line without the program's name; that of the process by default.

    Returns:
        Exit status: 0 done, 1 not done (the reason is on standard error), 2 not understood.
    """
    parser = _parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What follows is pytest's: argparse would take a leading option for one of its own.
    n_own = 2 if given[:2] == ["baseline", "bless"] else len(given)
    options = parser.parse_args(given[:n_own])
    options.pytest_arguments = given[n_own:]
    if not hasattr(options, "run"):
        parser.print_help(sys.stderr)
        return 2
    try:
        message, status = options.run(options)
    except ConfigurationError as error:
        print(f"copa: {visible(str(error))}", file=sys.stderr)  # noqa: T201 - this module talks to the terminal
        return 2
    except CopaError as error:
        print(f"copa: {visible(str(error))}", file=sys.stderr)  # noqa: T201
        return 1
    if message:
        try:
            print(visible(message), file=sys.stdout if status == 0 else sys.stderr, flush=True)
        except BrokenPipeError:  # `copa ... | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="copa", description="Look after what copa-harness runs leave behind.")
    rooms = parser.add_subparsers(title="commands", metavar="")
    init = rooms.add_parser("init", help="write a suite that runs, and the workflow that runs it on pull requests")
    init.set_defaults(run=_init)
    init.add_argument("folder", type=Path, nargs="?", default=Path(), help="the repository (default: here)")
    cache = rooms.add_parser("cache", help="the stored answers of models")
    cache.set_defaults(run=lambda options: (cache.format_help(), 2))
    commands = cache.add_subparsers(title="commands", metavar="")
    stats = commands.add_parser("stats", help="what the cache holds")
    stats.set_defaults(run=_stats)
    prune = commands.add_parser("prune", help="drop old answers, and stores moved aside as damaged")
    prune.set_defaults(run=_prune)
    prune.add_argument("--older-than", metavar="AGE", help="drop answers stored longer ago: 90m, 12h, 30d, 8w")
    prune.add_argument("--max-size", metavar="SIZE", help="then drop the oldest until this is left: 500MB, 2GB")
    clear = commands.add_parser("clear", help="drop every answer; all would be paid for again")
    clear.set_defaults(run=_clear)
    clear.add_argument("--yes", action="store_true", help="do not ask")
    for command in (stats, prune, clear):
        command.add_argument(
            "--cache-dir",
            type=Path,
            default=default_of(Settings, "cache_dir"),
            help="the cache directory of the runs (default: %(default)s here)",
        )
    _add_baseline_commands(rooms)
    _add_report_commands(rooms)
    _add_power_command(rooms)
    export = rooms.add_parser("export", help="write an artifact's program in a form that needs no suite")
    export.set_defaults(run=_export)
    export.add_argument("artifact", type=Path, help="the artifact's folder, as the report names it")
    export.add_argument(
        "place", type=Path, nargs="?", help="the folder to make (default: <task>-<form>); for gguf a file"
    )
    export.add_argument("--to", choices=[*FORMS, "gguf"], help="the form; gguf: the LoRA adapter alone, for llama.cpp")
    export.add_argument(
        "--base", type=Path, metavar="GGUF", help="for gguf: the base model in GGUF (default: what it was trained on)"
    )
    return parser


def _add_baseline_commands(rooms: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    baseline = rooms.add_parser("baseline", help="the accepted results that later runs are compared with")
    baseline.set_defaults(run=lambda options: (baseline.format_help(), 2))
    commands = baseline.add_subparsers(title="commands", metavar="")
    listed = commands.add_parser("list", help="every baseline, with its score")
    listed.set_defaults(run=_baseline_list)
    shown = commands.add_parser("show", help="one baseline: score, fingerprints, versions")
    shown.set_defaults(run=_baseline_show)
    shown.add_argument("baseline", help="a file, or <task>/<name> as `copa baseline list` shows it")
    diff = commands.add_parser("diff", help="what changed from one baseline to another, example by example")
    diff.set_defaults(run=_baseline_diff)
    diff.add_argument("before", help="a file, or <task>/<name>")
    diff.add_argument("after", help="a file, or <task>/<name>")
    for command in (listed, shown, diff):
        command.add_argument(
            "--baseline-dir",
            type=Path,
            default=default_of(Settings, "baseline_dir"),
            help="the folder of the baselines (default: %(default)s here)",
        )
    bless = commands.add_parser(
        "bless", help="run a suite and accept its results: pytest --copa-bless with your arguments", add_help=False
    )
    bless.set_defaults(run=_baseline_bless)


def _add_report_commands(rooms: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    show = rooms.add_parser("show", help="a report in words: every table of its page")
    show.set_defaults(run=_show)
    show.add_argument("report", nargs="?", default="", help="a number or a file (default: the latest)")
    compare = rooms.add_parser("compare", help="two reports, run by run and example by example")
    compare.set_defaults(run=_compare)
    compare.add_argument("before", help="a number or a file")
    compare.add_argument("after", nargs="?", default="", help="a number or a file (default: the latest)")
    history = rooms.add_parser("history", help="verdicts, costs and scores of the numbered reports")
    history.set_defaults(run=_history)
    for command in (show, compare, history):
        command.add_argument(
            "--report-dir",
            type=Path,
            default=default_of(Settings, "report_dir"),
            help="the folder of the reports (default: %(default)s here)",
        )


def _init(options: argparse.Namespace) -> tuple[str, int]:
    from copa_harness.starter import write_starter

    said = write_starter(options.folder)
    local = "" if importlib.util.find_spec("torch") else " --copa-lm=openai/gpt-4o-mini"
    return "\n".join([*said, f"next: pytest suites/{local}; then commit, and open a pull request"]), 0


def _add_power_command(rooms: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    power = rooms.add_parser("power", help="what so many rows decide about max_regression, before they are paid for")
    power.set_defaults(run=_power)
    power.add_argument("rows", help="how many test rows, or a baseline whose rows, gates and noise are meant")
    power.add_argument("--margin", type=float, default=0.05, help="the drop that is allowed (default: %(default)s)")
    power.add_argument("--gates", type=int, default=1, help="gates of the suite that ask the same")
    power.add_argument(
        "--differ", type=float, nargs="+", metavar="SHARE", help="answers in which two runs differ (default: 0.1 0.2)"
    )
    power.add_argument("--usd-per-row", type=float, help="what one row costs, for what a run would")
    power.add_argument("--baseline-dir", type=Path, default=default_of(Settings, "baseline_dir"))


def _power(options: argparse.Namespace) -> tuple[str, int]:
    from copa_harness.session.plan import DISAGREEMENTS, power_told

    rows, family, differ = options.rows, options.gates, options.differ
    if not rows.isdecimal():
        found = _baseline(rows, options.baseline_dir)
        rows, family = len(found.scores), found.families.get("max_regression", family)
        differ = differ or ([found.noise] if found.noise is not None else None)
    if int(rows) < 1 or not 0 <= options.margin < 1 or family < 1 or not all(0 <= one <= 1 for one in differ or ()):
        raise ConfigurationError(
            f"got {rows} rows, margin {options.margin}, {family} gates, shares {differ or DISAGREEMENTS}; expected at "
            "least one row and gate, and shares from 0 to 1"
        )
    gate, cases = power_told(
        int(rows),
        margin=options.margin,
        family=family,
        disagreements=differ or DISAGREEMENTS,
        usd_per_row=options.usd_per_row,
    )
    return "\n  ".join([f"{gate}:", *cases]), 0


def _show(options: argparse.Namespace) -> tuple[str, int]:
    from copa_harness.report.history import read_report, report_path, report_text

    return report_text(read_report(report_path(options.report, options.report_dir))), 0


def _compare(options: argparse.Namespace) -> tuple[str, int]:
    from copa_harness.report.history import compare_reports, read_report, report_path

    before, after = (read_report(report_path(one, options.report_dir)) for one in (options.before, options.after))
    return compare_reports(before, after), 0


def _history(options: argparse.Namespace) -> tuple[str, int]:
    from copa_harness.report.history import history_text

    return history_text(options.report_dir), 0


def _stats(options: argparse.Namespace) -> tuple[str, int]:
    from copa_harness.lm.cache.maintenance import cache_stats

    stats = cache_stats(options.cache_dir)
    lines = [f"{stats.directory}: {stats.n_answers:,} answers, {size(stats.n_bytes)}"]
    if stats.oldest_s is not None and stats.newest_s is not None:
        lines.append(f"stored from {_date(stats.oldest_s)} to {_date(stats.newest_s)}")
    lines += [
        f"moved aside as damaged: {path.name}, {size(n_bytes)} (`copa cache prune` removes it)"
        for path, n_bytes in stats.damaged
    ]
    return "\n".join(lines), 0


def _prune(options: argparse.Namespace) -> tuple[str, int]:
    from copa_harness.lm.cache.maintenance import prune_cache

    older_than_s = None if options.older_than is None else _seconds(options.older_than)
    max_bytes = None if options.max_size is None else _bytes(options.max_size)
    n_dropped, n_freed = prune_cache(options.cache_dir, older_than_s=older_than_s, max_bytes=max_bytes)
    return f"dropped {n_dropped:,} answers, freed {size(n_freed)}", 0


def _clear(options: argparse.Namespace) -> tuple[str, int]:
    from copa_harness.lm.cache.maintenance import cache_stats, clear_cache

    if not options.yes:
        stats = cache_stats(options.cache_dir)
        question = f"Drop all {stats.n_answers:,} answers in {stats.directory}? They would be paid for again. [y/N] "
        if not sys.stdin.isatty():
            return f"copa: nothing was dropped: add --yes to drop {stats.n_answers:,} answers without being asked", 1
        if input(question).strip().lower() not in ("y", "yes"):
            return "copa: nothing was dropped", 1
    n_dropped, n_freed = clear_cache(options.cache_dir)
    return f"dropped {n_dropped:,} answers, freed {size(n_freed)}", 0


def _baseline_list(options: argparse.Namespace) -> tuple[str, int]:
    from copa_harness.store.baselines import list_baselines

    entries = list_baselines(options.baseline_dir)
    if not entries:
        return f"no baselines in {options.baseline_dir}; accept results with pytest --copa-bless", 0
    lines = []
    for entry in entries:
        found = entry.baseline
        if found is None:
            lines.append(f"{entry.path}: {entry.problem}")
        else:
            name = f"{found.task}/{found.name}"
            measured = f"{found.score:.3f} on {counted(len(found.scores), found.split + ' example')}"
            lines.append(f"{name:<32} {measured}  {found.origin}")
    return "\n".join(lines), int(any(entry.baseline is None for entry in entries))


def _baseline_show(options: argparse.Namespace) -> tuple[str, int]:
    from copa_harness.store.baselines import baseline_text

    return baseline_text(_baseline(options.baseline, options.baseline_dir)), 0


def _baseline_diff(options: argparse.Namespace) -> tuple[str, int]:
    from copa_harness.store.baselines import diff_baselines

    before, after = (_baseline(name, options.baseline_dir) for name in (options.before, options.after))
    return diff_baselines(before, after).text(), 0


def _baseline_bless(options: argparse.Namespace) -> tuple[str, int]:
    command = [sys.executable, "-m", "pytest", "--copa-bless", *options.pytest_arguments]
    status = subprocess.run(command, check=False).returncode
    return ("", 0) if status == 0 else (f"copa: pytest ended with status {status}; see above for what was accepted", 1)


def _export(options: argparse.Namespace) -> tuple[str, int]:
    to = options.to or ("gguf" if options.place is not None and options.place.suffix == ".gguf" else None)
    if to is None:
        raise ConfigurationError(f"got no form to export to; expected --to and one of {', '.join(FORMS)}, gguf")
    if to == "gguf":
        return _export_gguf(options), 0
    from copa_harness.export.writing import export_artifact

    folder, said = export_artifact(options.artifact, to=to, place=options.place)
    return "\n".join([f"written: {folder}", *said, f"replay the test rows: python {folder / 'check.py'}"]), 0


def _export_gguf(options: argparse.Namespace) -> str:
    from copa_harness.lm.local.sources.gguf_lora import write_gguf_lora
    from copa_harness.store.artifacts import load_artifact

    if options.place is None:
        raise ConfigurationError("got no file for the adapter; expected one, for instance adapter.gguf")
    artifact = load_artifact(options.artifact)
    if artifact.lora_directory is None:
        raise ConfigurationError(
            f"got the artifact {options.artifact}, whose weights are the base model's; expected one with a LoRA adapter"
        )
    write_gguf_lora(artifact.lora_directory, options.place, base=options.base)
    return f"written: {options.place}, {size(options.place.stat().st_size)}"


def _baseline(name: str, directory: Path) -> Baseline:
    """The baseline in a file, or of the name `<task>/<name>`."""
    from copa_harness.store.baselines import list_baselines, read_baseline

    if Path(name).is_file():
        return read_baseline(Path(name))
    known = {}
    for entry in list_baselines(directory):
        if entry.baseline is not None:
            known[f"{entry.baseline.task}/{entry.baseline.name}"] = entry.baseline
        elif entry.path == directory / f"{name}.json":
            raise ArtifactError(entry.problem)
    if name not in known:
        listed = ", ".join(known) or "none"
        raise ConfigurationError(f"got the baseline {name!r}, expected a file or one of those in {directory}: {listed}")
    return known[name]


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip().lower())
    if match is None:
        raise ConfigurationError(f"got the age {text!r}, expected a number and a unit: 90m, 12h, 30d, 8w")
    return float(match.group(1)) * _TIMES_S[match.group(2)]


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?b?)", text.strip().lower())
    if match is None or match.group(2) not in _SIZES:
        raise ConfigurationError(f"got the size {text!r}, expected bytes or a number and a unit: 500MB, 2GB, 1GiB")
    return int(float(match.group(1)) * _SIZES[match.group(2)])


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


if __name__ == "__main__":
    sys.exit(main())
