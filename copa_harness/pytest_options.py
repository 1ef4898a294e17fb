"""Where options are given: command line, environment, ini file and marker, all derived from the dataclasses of options.

`session/options.py` says which options there are and what their values mean; this module registers them with pytest
and collects what was given. `python -m copa_harness.pytest_options` writes the option tables of the guides anew.
"""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from copa_harness.option_fields import PATH, SWITCH, Option, Place, options_in, options_of, with_tables
from copa_harness.session.options import OPTION_KINDS, Setting, Settings

RUN_ID = pytest.StashKey[str]()


def _all_options() -> list[Option]:
    """Those that pytest hears of; names are unique but for those that are an argument of `COPA` only."""
    kinds = ("Settings", "Gates", "SearchOptions")
    return [one for kind in kinds for one in options_of(OPTION_KINDS[kind]).values() if one.places]


def add_options(parser: pytest.Parser) -> None:
    """Register `--copa-*`, with ini twins `copa_*`."""
    group = parser.getgroup("copa", "copa: improve and gate DSPy programs (command line > COPA_* > ini > marker)")
    for one in _all_options():
        if Place.COMMAND_LINE in one.places:
            if one.check is SWITCH:
                group.addoption(one.flag, action="store_const", const="true", default=None, help=one.line)
            else:
                action = "append" if one.repeated else "store"
                group.addoption(one.flag, action=action, metavar=one.metavar, default=None, help=one.line)
        if Place.INI in one.places:
            parser.addini(one.ini, help=_ini_help(one), default=None)


def _ini_help(one: Option) -> str:
    if Place.COMMAND_LINE in one.places:
        return f"like {one.flag}"
    twin = f" ({one.variable} overrules both)" if Place.ENVIRONMENT in one.places else ""
    return f"{one.name} of every test whose marker does not name it{twin}: {one.line}"


def marker_text() -> str:
    """What `pytest --markers` says."""
    lines = [
        "copa(strategy='p -> w -> p', ...): optimize the task's program before the test and gate the result; keywords "
        "only."
    ]
    for title, kind in (("What is run", "Settings"), ("Gates", "Gates"), ("How it searches", "SearchOptions")):
        lines.append(f"  {title}:")
        lines += [
            f"    {one.name}: {one.help} ({one.check.expected}) [default: {one.default_text}]"
            for one in options_in(OPTION_KINDS[kind], Place.MARKER).values()
        ]
    return "\n".join(lines)


def is_disabled(config: pytest.Config) -> bool:
    """Whether copa tests are to be skipped."""
    given = _given(config, options_of(Settings)["disable"])
    return given is not None and SWITCH.read(given.value) is not False


def settings_of(config: pytest.Config) -> Settings:
    """The settings that were given.

    Raises:
        ConfigurationError: A value cannot be used; the message names its source.
    """
    given = {one.name: setting for one in _all_options() if (setting := _given(config, one)) is not None}
    settings = Settings.from_given(given, root=config.rootpath, worker=worker_number(config), run_id=run_id(config))
    if settings.against is None:
        return settings
    from copa_harness.session.against import aimed

    return aimed(settings)


def run_id(config: pytest.Config) -> str:
    """Names this session: the same in all its processes."""
    workerinput = getattr(config, "workerinput", None)
    if workerinput is not None:
        return str(workerinput["testrunuid"])
    return config.stash.setdefault(RUN_ID, uuid.uuid4().hex)


def worker_number(config: pytest.Config) -> int | None:
    """pytest-xdist's number of this process (`gw3`: 3); None without workers."""
    workerinput = getattr(config, "workerinput", None)
    if workerinput is None:
        return None
    digits = re.search(r"\d+$", str(workerinput["workerid"]))
    return int(digits[0]) if digits else 0  # `--tx` may give names of its own


def _given(config: pytest.Config, one: Option) -> Setting | None:
    """What was given for an option, from the strongest source that has something."""
    if Place.COMMAND_LINE in one.places and (value := config.getoption(f"copa_{one.name}")) is not None:
        value = ",".join(value) if one.repeated else value
        return Setting(_from_here(config, one, value), one.flag)
    if Place.ENVIRONMENT in one.places and (value := os.environ.get(one.variable)):
        return Setting(_from_here(config, one, value), f"environment variable {one.variable}")
    if Place.INI in one.places and (value := config.getini(one.ini)) not in (None, ""):
        return Setting(str(value), f"ini option {one.ini}", overrules_marker=False)
    return None


def _from_here(config: pytest.Config, one: Option, value: str) -> str:
    """A path typed in a shell is relative to where it was typed (one in an ini file to the rootdir)."""
    return str(Path(config.invocation_params.dir, value)) if one.check is PATH else value


def rewrite_tables(guides: Iterable[Path]) -> list[Path]:
    """Write the option tables of guides anew; those that changed."""
    changed = []
    for guide in guides:
        text = guide.read_text(encoding="utf-8")
        if (written := with_tables(text, OPTION_KINDS)) != text:
            guide.write_text(written, encoding="utf-8")
            changed.append(guide)
    return changed


def guides_below(folder: Path) -> list[Path]:
    """Markdown files of a checkout; hidden folders hold none of its own."""
    found = sorted(folder.rglob("*.md"))
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def main(arguments: Sequence[str]) -> None:
    """Write the tables of the named guides anew, or of all below this folder."""
    for path in rewrite_tables(map(Path, arguments) if arguments else guides_below(Path())):
        print(f"written: {path}")  # noqa: T201 - a command


if __name__ == "__main__":
    main(sys.argv[1:])
