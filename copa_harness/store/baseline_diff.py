"""What changed between two accepted results: parts, versions, and examples, as data and in words.

A baseline's own file is made for `git diff`; this is the reading of it for `copa baseline show` and `diff`, with the
paired difference beside the list of examples. Knows nothing of how baselines are stored.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from copa_harness.documents import to_jsonable
from copa_harness.judge.messages import counted, interval_text, number
from copa_harness.judge.paired import PairedDifference, pair_up, paired_difference
from copa_harness.judge.regression import COMPARED
from copa_harness.results import Interval
from copa_harness.store.baselines import Baseline

Change = tuple[str, str]
"""Old and new value; "" where there is none."""


@dataclass(frozen=True, slots=True)
class BaselineDiff:
    """Two baselines, `before` and `after`, compared.

    Attributes:
        before: what the first is called.
        after: what the second is called.
        scores: mean score of each, 0..1.
        fingerprints: parts (data, split, metric, program, lm) that differ, old and new hash.
        versions: packages whose version differs.
        settings: other entries that differ (lm, split, commit, created).
        better: examples with a higher score now: id, old score, new score; the greatest change first.
        worse: examples with a lower score now.
        only_before: ids in the first only.
        only_after: ids in the second only.
        difference: over the examples in common, when the metric is the same and there are any.
    """

    before: str
    after: str
    scores: tuple[float, float]
    fingerprints: Mapping[str, Change]
    versions: Mapping[str, Change]
    settings: Mapping[str, Change]
    better: tuple[tuple[str, float, float], ...]
    worse: tuple[tuple[str, float, float], ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    difference: PairedDifference | None

    @property
    def comparable(self) -> bool:
        """Whether the mean scores may be compared: data, split and metric are the same."""
        return not any(part in self.fingerprints for part in COMPARED)

    def to_json(self) -> dict[str, Any]:
        """The diff as plain JSON types."""
        document: dict[str, Any] = to_jsonable(self)
        return document | {"comparable": self.comparable}

    def text(self, *, n_shown: int = 10) -> str:
        """Lines for a terminal: scores, the paired difference, what else changed, the examples that moved."""
        lines = [f"{self.before} -> {self.after}", f"score   {number(self.scores[0])} -> {number(self.scores[1])}"]
        if not self.comparable:
            changed = ", ".join(part for part in COMPARED if part in self.fingerprints)
            lines.append(f"not comparable as a whole: {changed} changed")
        if self.difference is not None:
            common = self.difference
            lines.append(
                f"paired  {number(common.difference, signed=True)} on {counted(common.n, 'example')} in common "
                f"({interval_text(common.interval, signed=True)}, {common.method} p = {common.p_value:.2g}); "
                f"{common.n_better} better, {common.n_worse} worse"
            )
        elif "metric" in self.fingerprints:
            lines.append("paired  - (the metric changed: the scores of one example mean different things)")
        for title, changes, width in (
            ("changed", self.fingerprints, 12),
            ("setting", self.settings, 60),
            ("version", self.versions, 60),
        ):
            for name, (old, new) in changes.items():
                lines.append(f"{title:<8}{name} {old[:width] or '(none)'} -> {new[:width] or '(none)'}")
        for title, rows in (("worse", self.worse), ("better", self.better)):
            lines += [f"{title:<8}{name}  {number(old)} -> {number(new)}" for name, old, new in rows[:n_shown]]
            lines += [f"{'':<8}and {len(rows) - n_shown} more"] if len(rows) > n_shown else []
        for title, ids in (("gone", self.only_before), ("new", self.only_after)):
            if ids:
                more = f", and {len(ids) - 5} more" if len(ids) > 5 else ""
                lines.append(f"{title:<8}{counted(len(ids), 'example')}: {', '.join(ids[:5])}{more}")
        moved = (self.fingerprints, self.settings, self.versions, self.worse, self.better)
        if not any((*moved, self.only_before, self.only_after)):
            lines.append("nothing changed")
        return "\n".join(lines)


def diff_baselines(before: Baseline, after: Baseline, *, seed: int = 0) -> BaselineDiff:
    """Compare two baselines, whatever they are of.

    Args:
        before: the older one.
        after: the newer one.
        seed: of the resampling methods.
    """
    fingerprints = _changes(before.fingerprints, after.fingerprints)
    pairs = pair_up(before.scores, after.scores)
    moved = sorted(
        ((name, old, new) for name, old, new in zip(pairs.ids, pairs.before, pairs.after, strict=True) if old != new),
        key=lambda row: (-abs(row[2] - row[1]), row[0]),
    )
    comparable_examples = bool(pairs.ids) and "metric" not in fingerprints
    settings = {
        name: (str(getattr(before, name)), str(getattr(after, name)))
        for name in ("task", "name", "lm", "split", "commit", "created")
    }
    return BaselineDiff(
        before=_called(before),
        after=_called(after),
        scores=(before.score, after.score),
        fingerprints=fingerprints,
        versions=_changes(before.versions, after.versions),
        settings={name: change for name, change in settings.items() if change[0] != change[1]},
        better=tuple(row for row in moved if row[2] > row[1]),
        worse=tuple(row for row in moved if row[2] < row[1]),
        only_before=tuple(sorted(before.scores.keys() - after.scores.keys())),
        only_after=tuple(sorted(after.scores.keys() - before.scores.keys())),
        difference=paired_difference(pairs.before, pairs.after, ids=pairs.ids, seed=seed)
        if comparable_examples
        else None,
    )


def baseline_text(baseline: Baseline) -> str:
    """A baseline in a few lines, for `copa baseline show`."""
    interval: Interval = baseline.interval
    lines = [
        _called(baseline),
        f"score   {number(baseline.score)} on {counted(len(baseline.scores), baseline.split + ' example')} "
        f"({interval_text(interval)}, {interval.method})",
        f"model   {baseline.lm}",
    ]
    if baseline.repeats:
        k = max(len(scores) for scores in baseline.repeats.values())
        lines.append(f"repeats {k} per example")
    lines += [f"{part:<8}{digest[:12]}" for part, digest in sorted(baseline.fingerprints.items())]
    if baseline.versions:
        together = ", ".join(f"{name} {text}" for name, text in sorted(baseline.versions.items()))
        lines.append(textwrap.fill(f"with    {together}", 120, subsequent_indent=" " * 8, break_on_hyphens=False))
    return "\n".join(lines)


def _called(baseline: Baseline) -> str:
    return f"{baseline.task} ({baseline.name})" + (f", {baseline.origin}" if baseline.origin else "")


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Change]:
    names = sorted(before.keys() | after.keys())
    return {name: (before.get(name, ""), after.get(name, "")) for name in names if before.get(name) != after.get(name)}
