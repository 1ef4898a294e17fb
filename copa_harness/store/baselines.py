"""Baselines: accepted per-example results, in a JSON file made to be committed and reviewed.

    baselines/<task>/<name>.json     one example per line, sorted by id, so that a diff shows which examples changed

Only scores and outcomes by example id are kept, never inputs or answers. Fingerprints say what must agree before
scores are compared (data, split, metric) and what was judged (program, lm). Knows nothing of when to bless.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from copa_harness.documents import mask_secrets, to_jsonable, write_atomic
from copa_harness.errors import ArtifactError
from copa_harness.judge.paired import scores_by_id
from copa_harness.results import SCHEMA, EvaluationResult, Interval, Outcome

KIND = "copa_harness baseline"


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
    head: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": KIND,
        "task": baseline.task,
        "name": baseline.name,
        "split": baseline.split,
        "lm": baseline.lm,
        "score": round(baseline.score, 6),
        "n": len(baseline.scores),
        "interval": {
            "low": round(baseline.interval.low, 6),
            "high": round(baseline.interval.high, 6),
            "level": baseline.interval.level,
            "method": baseline.interval.method,
        },
        "commit": baseline.commit,
        "created": baseline.created,
        "fingerprints": dict(sorted(baseline.fingerprints.items())),
        "versions": dict(sorted(baseline.versions.items())),
    }
    head = mask_secrets(to_jsonable(head))
    rows = [
        json.dumps(
            {"id": example_id, "score": score}
            | ({"repeats": list(baseline.repeats[example_id])} if example_id in baseline.repeats else {})
            | ({"outcome": baseline.outcomes[example_id]} if example_id in baseline.outcomes else {}),
            ensure_ascii=False,
            allow_nan=False,
        )
        for example_id, score in sorted(baseline.scores.items())
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
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"there is no baseline {path}. Next: run the suite with --copa-bless.") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"baseline {path} cannot be read ({error}). {_MEND}") from error
    if not isinstance(document, dict) or document.get("kind") != KIND or document.get("schema") != SCHEMA:
        raise ArtifactError(f"{path} is not a baseline of schema {SCHEMA}. {_MEND}")
    try:
        return _from_json(document)
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


def _from_json(document: Mapping[str, Any]) -> Baseline:
    scores: dict[str, float | None] = {}
    outcomes: dict[str, Outcome] = {}
    repeats: dict[str, tuple[float | None, ...]] = {}
    for row in document["examples"]:
        score = row["score"]
        if row["id"] in scores or not (score is None or 0 <= float(score) <= 1):
            raise ValueError(f"example {row['id']!r} is repeated or has a score outside 0..1")
        scores[row["id"]] = None if score is None else float(score)
        if "repeats" in row:
            repeats[row["id"]] = tuple(None if several is None else float(several) for several in row["repeats"])
        if "outcome" in row:
            if row["outcome"] not in get_args(Outcome):
                raise ValueError(f"example {row['id']!r} has the unknown outcome {row['outcome']!r}")
            outcomes[row["id"]] = row["outcome"]
    if len(scores) != document["n"]:
        raise ValueError(f"{len(scores)} examples where {document['n']} are announced")
    return Baseline(
        task=document["task"],
        name=document["name"],
        split=document["split"],
        lm=document["lm"],
        score=float(document["score"]),
        interval=Interval(**document["interval"]),
        scores=scores,
        outcomes=outcomes,
        fingerprints=dict(document["fingerprints"]),
        versions=dict(document["versions"]),
        commit=document["commit"],
        created=document["created"],
        repeats=repeats,
    )


def _slug(text: str) -> str:
    """A file name for any text: readable, and with a short hash where two texts could meet."""
    plain = re.sub(r"[^a-z0-9_.]+", "-", text.lower().replace("->", " ")).strip("-.")[:80]
    usual = re.sub(r"\s*->\s*", "-", text)
    return (
        plain if plain and plain == usual else f"{plain or 'unnamed'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )
