"""`copa init`: a suite that runs and the workflow that runs it on every pull request, written into a repository.

Nothing is overwritten: files of the same name are left as they are, and said.
"""

from __future__ import annotations

from pathlib import Path

from copa_harness.atomic_files import write_atomic
from copa_harness.errors import ConfigurationError

FILES = {
    "test_machines.py.txt": "suites/machines/test_machines.py",
    "program.py.txt": "suites/machines/program.py",
    "machines.csv": "suites/machines/machines.csv",
    "copa.yml": ".github/workflows/copa.yml",
    "action.yml": ".github/actions/copa/action.yml",
}
"""What lies in `files`, and where it goes."""

IGNORED = (".copa_cache/", "reports/")
"""What runs leave, which git is not to keep."""


def write_starter(folder: Path) -> list[str]:
    """Write the files; returns a line on each.

    Args:
        folder: The root of a repository; made if need be.

    Raises:
        ConfigurationError: It cannot be written.
    """
    said = []
    try:
        for name, place in FILES.items():
            target = folder / place
            if target.exists():
                said.append(f"{place}: left as it is")
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target, (Path(__file__).parent / "files" / name).read_bytes())
            said.append(f"{place}: written")
        ignore = folder / ".gitignore"
        known = ignore.read_text(encoding="utf-8") if ignore.exists() else ""
        if missing := [line for line in IGNORED if line not in known.splitlines()]:
            gap = "" if not known or known.endswith("\n") else "\n"
            write_atomic(ignore, known + gap + "".join(f"{line}\n" for line in missing))
            said.append(f".gitignore: {', '.join(missing)} added")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot write into {folder} ({error}); expected a folder that takes files") from error
    return said
