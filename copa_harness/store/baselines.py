"""Baselines: accepted per-example results, in a JSON file made to be committed and reviewed.

    baselines/<task>/<name>.json     one example per line, sorted by id, so that a diff shows which examples changed

Only scores and outcomes by example id are kept, never inputs or answers. Fingerprints say what must agree before scores
are compared (data, split, metric) and what was judged (program, lm). The file is made for `git diff`; `diff_baselines`
reads two of them for `copa baseline diff`, with the paired difference beside the list of examples.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from copa_harness.atomic_files import write_atomic
from copa_harness.credentials import mask_secrets
from copa_harness.documents import from_json, parse_json, to_json
from copa_harness.errors import ArtifactError
from copa_harness.formatting import counted, number, probability
from copa_harness.judge.explanations import interval_text
from copa_harness.judge.paired_gates import COMPARED
from copa_harness.judge.paired_tests import GATE_LEVEL, PairedDifference, pair_up, paired_difference, scores_by_id
from copa_harness.results import SCHEMA, EvaluationResult, Interval, Outcome

KIND = "copa_harness baseline"

_HEAD = (
    "schema",
    "kind",
    "task",
    "name",
    "split",
    "lm",
    "score",
    "n",
    "interval",
    "commit",
    "created",
    "fingerprints",
    "versions",
    "families",
)
"""What stands above the examples, in this order."""

_BY_EXAMPLE = {"repeats": "repeats", "outcome": "outcomes", "requests": "requests", "group": "groups", "human": "human"}
"""What else an example's row may hold, by its key there."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """An accepted result.

    Attributes:
        task: the task's name.
        name: which run of the task (its strategy, or any name).
        split: the split the scores are of.
        lm: the model.
        score: mean score, 0..1.
        interval: around it.
        scores: score per example id; None where there was none.
        outcomes: outcome per example id, where it is not "ok".
        fingerprints: hashes by part: `data`, `split`, `metric`, `program`, `lm`.
        versions: package versions.
        commit: the commit it was made at; may be empty.
        created: ISO date; may be empty.
        repeats: scores of every repeat per example id, when the examples were answered several times.
        requests: digest per example id of what was asked (`ExampleResult.requests`); empty in older files.
        groups: the group's digest per example id, where examples share one.
        families: how many gates of its suite ask the same question, by the gate's name; empty in older files.
        human: what people said of the answers, by example id, where they did.
    """

    task: str
    name: str
    split: str
    lm: str
    score: float
    interval: Interval
    scores: Mapping[str, float | None]
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str = ""
    created: str = ""
    repeats: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    requests: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    families: Mapping[str, int] = field(default_factory=dict)
    human: Mapping[str, float] = field(default_factory=dict)

    @property
    def noise(self) -> float | None:
        """The mean distance of two draws of one example's score, for right/wrong the share that differs; None for one.

        What `max_regression` has to tell a drop from, if both sides answer once.
        """
        several = [draws for draws in map(_scored, self.repeats.values()) if len(draws) > 1]
        if not several:
            return None
        return statistics.fmean(statistics.fmean(abs(a - b) for a, b in combinations(one, 2)) for one in several)

    @property
    def origin(self) -> str:
        """When and at which commit it was made."""
        return ", ".join(part for part in (self.created, f"commit {self.commit[:10]}" if self.commit else "") if part)

    @classmethod
    def from_evaluation(
        cls,
        evaluation: EvaluationResult,
        *,
        task: str,
        name: str,
        fingerprints: Mapping[str, str],
        versions: Mapping[str, str] | None = None,
        commit: str = "",
        created: str = "",
        repeats: Mapping[str, Sequence[float | None]] | None = None,
    ) -> Baseline:
        """The baseline an evaluation would become.

        An example that occurs twice in the split keeps both scores, the second under its id with `#2`.

        Raises:
            ArtifactError: some examples have no score, or none was evaluated: nothing to hold later runs to.
        """
        if not evaluation.n or evaluation.n_failed:
            raise ArtifactError(
                f"not accepted as baseline of {task} ({name}): {evaluation.n_failed} of {evaluation.n} examples have "
                f"no score; expected all. Next: mend the failures and bless again (answered examples are cached)."
            )
        scores = scores_by_id(evaluation)
        return cls(
            task=task,
            name=name,
            split=evaluation.split,
            lm=evaluation.lm,
            score=evaluation.score,
            interval=evaluation.interval,
            scores=scores,
            outcomes={
                example_id: row.outcome
                for example_id, row in zip(scores, evaluation.results, strict=True)
                if row.outcome != "ok"
            },
            fingerprints=dict(fingerprints),
            versions=dict(versions or {}),
            commit=commit,
            created=created,
            repeats={example_id: tuple(several) for example_id, several in (repeats or {}).items()},
            requests={
                example_id: row.requests
                for example_id, row in zip(scores, evaluation.results, strict=True)
                if row.requests
            },
        )


def baseline_path(directory: Path, *, task: str, name: str) -> Path:
    """`<directory>/<task>/<name>.json` with names made safe for any file system."""
    return Path(directory) / _slug(task) / f"{_slug(name)}.json"


def save_baseline(directory: Path, baseline: Baseline) -> Path:
    """Write a baseline under `baseline_path`; an older one is replaced, unless only date and commit would change.

    So accepting results that are the accepted ones already leaves nothing to review.

    Raises:
        OSError: the folder cannot be written; the older baseline is intact.
    """
    document = to_json(baseline) | {"score": round(baseline.score, 6)}
    document["interval"] |= {name: round(getattr(baseline.interval, name), 6) for name in ("low", "high")}
    for name in ("fingerprints", "versions"):
        document[name] = dict(sorted(document[name].items()))
    by_example = {name: document.pop(name) for name in ("scores", *_BY_EXAMPLE.values())}
    document = {"schema": SCHEMA, "kind": KIND, "n": len(baseline.scores)} | document
    head = mask_secrets({name: document[name] for name in _HEAD})
    rows = [
        json.dumps(
            {"id": example_id, "score": score}
            | {
                key: by_example[name][example_id] for key, name in _BY_EXAMPLE.items() if example_id in by_example[name]
            },
            ensure_ascii=False,
            allow_nan=False,
        )
        for example_id, score in sorted(by_example["scores"].items())
    ]
    text = json.dumps(head, indent=2, ensure_ascii=False, allow_nan=False)
    examples = ",\n".join(f"    {row}" for row in rows)
    path = baseline_path(directory, task=baseline.task, name=baseline.name)
    content = f'{text[:-2]},\n  "examples": [\n{examples}\n  ]\n}}\n'
    if path.exists() and _undated(path.read_text(encoding="utf-8", errors="replace")) == _undated(content):
        return path
    return write_atomic(path, content)


def _undated(text: str) -> str:
    """The text of a baseline file without the lines that say when it was made."""
    return re.sub(r'^  "(?:commit|created)": .*\n', "", text, flags=re.MULTILINE)


def load_baseline(directory: Path, *, task: str, name: str) -> Baseline | None:
    """The accepted baseline, or None when none was ever blessed.

    Raises:
        ArtifactError: a file is there and cannot be used; a gate must not take that for "no baseline".
    """
    path = baseline_path(directory, task=task, name=name)
    if not path.exists():
        return None
    loaded = read_baseline(path)
    if (loaded.task, loaded.name) != (task, name):
        raise ArtifactError(f"{path} is the baseline of {loaded.task} ({loaded.name}), not of {task} ({name}). {_MEND}")
    return loaded


def read_baseline(path: Path) -> Baseline:
    """The baseline in a file.

    Raises:
        ArtifactError: the file is missing, damaged, or of another schema.
    """
    try:
        document = parse_json(Path(path).read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"there is no baseline {path}. Next: run the suite with --copa-bless.") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"baseline {path} cannot be read ({error}). {_MEND}") from error
    if not isinstance(document, dict) or document.get("kind") != KIND or document.get("schema") != SCHEMA:
        raise ArtifactError(f"{path} is not a baseline of schema {SCHEMA}. {_MEND}")
    try:
        return _from_document(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"baseline {path} is damaged ({type(error).__name__}: {error}). {_MEND}") from error


@dataclass(frozen=True, slots=True)
class BaselineEntry:
    """A baseline file: what it holds, or why it cannot be read."""

    path: Path
    baseline: Baseline | None
    problem: str = ""


def list_baselines(directory: Path, *, task: str | None = None) -> tuple[BaselineEntry, ...]:
    """Every baseline below a folder, sorted by path; a damaged one is listed with its problem, not hidden."""
    entries = []
    for path in sorted(Path(directory).glob("*/*.json")):
        try:
            entry = BaselineEntry(path, read_baseline(path))
        except ArtifactError as error:
            entry = BaselineEntry(path, None, str(error))
        if task is None or entry.baseline is None or entry.baseline.task == task:
            entries.append(entry)
    return tuple(entries)


_MEND = "Next: restore it (git checkout), or accept the present scores with --copa-bless."


def _from_document(document: Mapping[str, Any]) -> Baseline:
    """The baseline in a file's JSON, whose examples are rows there."""
    scores: dict[str, Any] = {}
    for row in document["examples"]:
        name, score = row["id"], row["score"]
        repeats = row.get("repeats", ())
        if not isinstance(name, str) or name in scores or not (_is_score(score) and all(map(_is_score, repeats))):
            raise ValueError(f"example {str(name)[:60]!r} is repeated, has no name, or a score outside 0..1")
        scores[name] = None if score is None else float(score)
    if len(scores) != document["n"]:
        raise ValueError(f"{len(scores)} examples where {document['n']} are announced")
    others = {
        name: {row["id"]: row[key] for row in document["examples"] if key in row} for key, name in _BY_EXAMPLE.items()
    }
    read = from_json(Baseline, {**document, "scores": scores, **others})
    if not (0 <= read.interval.low <= read.interval.high <= 1 and 0 < read.interval.level < 1 and 0 <= read.score <= 1):
        raise ValueError(f"score {read.score} and interval {read.interval}: expected 0 <= low <= high <= 1")
    known = [score for score in scores.values() if score is not None]
    if known and abs(math.fsum(known) / len(known) - read.score) > 2e-6:
        raise ValueError(f"its score is {read.score}, but the mean of its examples {math.fsum(known) / len(known):.6f}")
    if missing := [part for part in COMPARED if not read.fingerprints.get(part)]:
        raise ValueError(f"there is no fingerprint of {', '.join(missing)}: nobody could tell what it is comparable to")
    return read


def digests(groups: Mapping[str, str] | None) -> dict[str, str]:
    """Groups by example id as a baseline keeps them: their names may be somebody's, and do not matter."""
    return {key: hashlib.sha256(label.encode()).hexdigest()[:12] for key, label in (groups or {}).items()}


def _scored(draws: Iterable[float | None]) -> list[float]:
    return [score for score in draws if score is not None]


def _is_score(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)


def _slug(text: str) -> str:
    """A file name for any text: readable, and with a short hash where two texts could meet."""
    plain = re.sub(r"[^a-z0-9_.]+", "-", text.lower().replace("->", " ")).strip("-.")[:80]
    if plain and plain == re.sub(r"\s*->\s*", "-", text):
        return plain
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{plain or 'unnamed'}-{digest[:8]}"


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

    def as_reported(self) -> dict[str, Any]:
        """The diff as plain JSON types."""
        return to_json(self) | {"comparable": self.comparable}

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
                f"({interval_text(common.interval, signed=True)}, {common.method}, one-sided "
                f"{probability(common.p_one_sided)}); "
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
    pairs = pair_up(before.scores, after.scores, groups={**before.groups, **after.groups} or None)
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
        difference=paired_difference(pairs, level=GATE_LEVEL, seed=seed) if comparable_examples else None,
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
