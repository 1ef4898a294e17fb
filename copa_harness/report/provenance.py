"""Where a run was made: versions, machine, commit. Enough to tell two reports apart; no names, no paths, no secrets.

Reads installed versions without importing the packages, and asks git once.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "copa-harness",
    "dspy",
    "torch",
    "transformers",
    "peft",
    "optuna",
    "numpy",
    "scipy",
    "scikit-learn",
    "pytest",
)

_GIT_TIMEOUT_S = 5.0


def environment(*, root: Path | None = None, packages: Sequence[str] = PACKAGES, **more: Any) -> dict[str, Any]:
    """What the report says of where it was made.

    Args:
        root: a folder in the git working tree to name; None leaves the commit out.
        packages: distributions whose versions are listed, where installed.
        **more: further entries, such as `seed` and `budget`.
    """
    found: dict[str, Any] = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "versions": versions(packages),
    }
    if root is not None and (commit := git_commit(root)):
        found["commit"] = commit
    return found | more


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of the installed ones among some distributions."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit(root: Path) -> str:
    """The commit checked out at `root`, with `+changes` when tracked files differ; "" outside git or without git."""
    commit = _git(root, "rev-parse", "HEAD")
    if not commit:
        return ""
    return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return ""  # no git, or a tree too slow to ask: a report without a commit is still a report
    return done.stdout.strip() if done.returncode == 0 else ""
