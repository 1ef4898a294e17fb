"""The command `copa`: looks after what runs leave behind. It translates; the work is done below.

Loads the standard library only until a command asks for more, and never torch or dspy.

    copa cache stats
    copa cache prune --older-than 30d --max-size 500MB
    copa cache clear --yes
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from copa_harness.errors import ConfigurationError, CopaError

DEFAULT_CACHE_DIR = Path(".copa_cache")
"""Where the pytest plugin keeps its cache unless told otherwise, seen from the project's root."""

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
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help(sys.stderr)
        return 2
    try:
        message, status = options.run(options)
    except ConfigurationError as error:
        print(f"copa: {error}", file=sys.stderr)  # noqa: T201 - this is the terminal's door
        return 2
    except CopaError as error:
        print(f"copa: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(message, file=sys.stdout if status == 0 else sys.stderr)
    return int(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="copa", description="Look after what copa-harness runs leave behind.")
    rooms = parser.add_subparsers(title="commands", metavar="")
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
            default=DEFAULT_CACHE_DIR,
            help="the cache directory of the runs (default: %(default)s here)",
        )
    return parser


def _stats(options: argparse.Namespace) -> tuple[str, int]:
    from copa_harness.lm.cache_care import cache_stats

    stats = cache_stats(options.cache_dir)
    lines = [f"{stats.directory}: {stats.n_answers:,} answers, {_size_text(stats.n_bytes)}"]
    if stats.oldest_s is not None and stats.newest_s is not None:
        lines.append(f"stored from {_date(stats.oldest_s)} to {_date(stats.newest_s)}")
    lines += [
        f"moved aside as damaged: {path.name}, {_size_text(n_bytes)} (`copa cache prune` removes it)"
        for path, n_bytes in stats.damaged
    ]
    return "\n".join(lines), 0


def _prune(options: argparse.Namespace) -> tuple[str, int]:
    from copa_harness.lm.cache_care import prune_cache

    older_than_s = None if options.older_than is None else _seconds(options.older_than)
    max_bytes = None if options.max_size is None else _bytes(options.max_size)
    n_dropped, n_freed = prune_cache(options.cache_dir, older_than_s=older_than_s, max_bytes=max_bytes)
    return f"dropped {n_dropped:,} answers, freed {_size_text(n_freed)}", 0


def _clear(options: argparse.Namespace) -> tuple[str, int]:
    from copa_harness.lm.cache_care import cache_stats, clear_cache

    if not options.yes:
        stats = cache_stats(options.cache_dir)
        question = f"Drop all {stats.n_answers:,} answers in {stats.directory}? They would be paid for again. [y/N] "
        if not sys.stdin.isatty():
            return f"copa: nothing was dropped: add --yes to drop {stats.n_answers:,} answers without being asked", 1
        if input(question).strip().lower() not in ("y", "yes"):
            return "copa: nothing was dropped", 1
    n_dropped, n_freed = clear_cache(options.cache_dir)
    return f"dropped {n_dropped:,} answers, freed {_size_text(n_freed)}", 0


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


def _size_text(n_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} bytes"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


if __name__ == "__main__":
    sys.exit(main())
