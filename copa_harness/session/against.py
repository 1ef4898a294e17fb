"""`--copa-against`: the suite of another commit, run with the same cache and seed, as the baseline of this one.

The controller checks that commit out into a git worktree and runs the same command there, blessing into a folder of
the cache that is named after the commit (`aimed` points every process at it). So every example is paired as with an
accepted baseline, verdicts have the same statistics, and what both sides have in common is paid for once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from copa_harness.errors import ArtifactError, ConfigurationError
from copa_harness.session.options import Settings

if TYPE_CHECKING:
    from copa_harness.report.records import RunRecord

MARGIN = 0.05
"""`max_regression` of every run whose gates say nothing else."""

MERGE_BASE = "merge-base"

_NO_RESULT = (2, 3, 4)
"""Exit statuses of pytest that leave nothing to compare with: interrupted, broken, not understood."""

_OWN = (
    "--copa-against",
    "--copa-sequential",
    "--junitxml",
    "--junit-xml",
    "--html",
    "--alluredir",
    "--basetemp",
    "--copa-mlflow",
)
"""Options that the other side must not have: it would compare on, stop early, or write over this side's files."""

_HERE_ONLY = ("COPA_AGAINST", "COPA_MLFLOW", "COPA_SEQUENTIAL", "GITHUB_STEP_SUMMARY", "GITHUB_ACTIONS")


def aimed(settings: Settings) -> Settings:
    """The settings with the other commit's results as baselines.

    Raises:
        ConfigurationError: There is no such commit.
    """
    commit = _commit(settings)
    gates = {"max_regression": MARGIN, **settings.gates}
    return replace(settings, baseline_dir=_folder(settings, commit) / "baselines", gates=gates)


def named(settings: Settings) -> str:
    """`main (0123456789)`."""
    return f"{settings.against} ({_commit(settings)[:10]})"


def run_base(settings: Settings, *, arguments: Sequence[str], directory: Path) -> None:
    """Run the suite of the other commit.

    `arguments` are pytest's as they were given here, in `directory`.

    Raises:
        ConfigurationError: There is no such commit, or its suite could not be run; the message names the log.
    """
    commit = _commit(settings)
    folder = _folder(settings, commit)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    top = Path(_git(settings.root, "rev-parse", "--show-toplevel"))
    with tempfile.TemporaryDirectory(prefix="copa-against-") as temporary:
        tree = Path(temporary).resolve() / "tree"
        _git(top, "worktree", "add", "--detach", "--force", str(tree), commit)
        try:
            status = _run(settings, arguments=arguments, here=directory.resolve(), top=top, tree=tree, folder=folder)
        finally:
            _git(top, "worktree", "remove", "--force", str(tree))
    if status in _NO_RESULT and not (folder / "reports" / "latest.json").exists() and not _has_no_suite(folder):
        raise ConfigurationError(
            f"--copa-against={settings.against}: the suite of {commit[:10]} could not be run (pytest ended with status "
            f"{status}); its output is in {folder / 'log.txt'}"
        )


def _run(settings: Settings, *, arguments: Sequence[str], here: Path, top: Path, tree: Path, folder: Path) -> int:
    def moved(text: str) -> str:
        return text.replace(str(top), str(tree))

    own = [
        "--copa-bless",
        f"--copa-seed={settings.seed}",
        f"--copa-cache-dir={settings.cache_dir}",
        f"--copa-baseline-dir={folder / 'baselines'}",
        f"--copa-report-dir={folder / 'reports'}",
    ]
    paths = [
        str(tree),
        str(tree / "src"),
        *map(moved, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))),
    ]
    environment = {name: value for name, value in os.environ.items() if name not in _HERE_ONLY}
    given = [moved(one) for one in _without(arguments, _OWN)]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        return subprocess.run(
            [sys.executable, "-m", "pytest", *given, *own],
            cwd=tree / here.relative_to(top),
            env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode


def _without(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """The arguments but for some options and their values."""
    kept: list[str] = []
    skips = False
    for one in arguments:
        if skips:
            skips = False
        elif one in names:
            skips = one != "--copa-sequential"
        elif not one.startswith(tuple(f"{name}=" for name in names)):
            kept.append(one)
    return kept


def _has_no_suite(folder: Path) -> bool:
    """Whether the other commit does not have the tests that were asked for."""
    return "file or directory not found" in (folder / "log.txt").read_text(encoding="utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class Compared:
    """What the two sides look like beside each other."""

    table: str
    page: str
    notes: tuple[str, ...]
    remarks: tuple[str, ...] = ()


def compared(settings: Settings, records: Sequence[RunRecord]) -> Compared:
    """This session's runs beside those of the other commit."""
    from copa_harness.report.history import one_sided, read_report, side_by_side
    from copa_harness.report.summary import drifts_told, totals

    folder = _folder(settings, _commit(settings))
    try:
        theirs = read_report(folder / "reports" / "latest.json").runs
    except ArtifactError:
        return Compared(
            "", "", (f"{named(settings)} has no runs to compare with; its output is in {folder / 'log.txt'}",)
        )
    sides = one_sided(theirs, records, titles=(f"in {settings.against}", "here"))
    notes = (*sides, f"{named(settings)} paid: {totals(theirs)}")
    drifts = drifts_told(theirs, where=f" in {settings.against}")
    notes += tuple(said for name, said in drifts if not name)
    remarks = tuple(said for name, said in drifts if name)
    return Compared(side_by_side(theirs, records), side_by_side(theirs, records, style="html"), notes, remarks)


def _folder(settings: Settings, commit: str) -> Path:
    return settings.cache_dir / "against" / commit[:12]


def _commit(settings: Settings) -> str:
    """The commit that `against` stands for.

    Raises:
        ConfigurationError: There is none.
    """
    ref = settings.against or ""
    if ref == MERGE_BASE:
        base = os.environ.get("GITHUB_BASE_REF")
        known = [f"origin/{base}"] if base else []
        for other in (*known, "origin/HEAD", "origin/main", "origin/master", "main", "master"):
            if found := _git(settings.root, "merge-base", "HEAD", other, may_fail=True):
                return found
    elif found := _git(settings.root, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", may_fail=True):
        return found
    raise ConfigurationError(
        f"--copa-against: got {ref!r}, expected a commit of the repository at {settings.root}, or merge-base with a "
        f"main branch; a shallow clone has its last commit only (git fetch --unshallow, or fetch-depth: 0 of "
        f"actions/checkout)"
    )


def _git(root: Path, *arguments: str, may_fail: bool = False) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigurationError(f"--copa-against needs git, which could not be run ({error})") from error
    if done.returncode and not may_fail:
        raise ConfigurationError(f"--copa-against: git {' '.join(arguments[:2])} failed: {done.stderr.strip()}")
    return done.stdout.strip() if done.returncode == 0 else ""
