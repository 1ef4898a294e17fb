"""Results on their way to become baselines: from the process that measured them to the one that writes.

A test process never writes a baseline: it hands its candidates on as plain JSON, and the controller writes them when
the session ends. So several workers never write one file, and a session that is killed leaves the old baselines as
they were. Knows nothing of pytest.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copa_harness.errors import CopaError
from copa_harness.results import Interval
from copa_harness.session.settings import DEFAULT_LM, Settings

if TYPE_CHECKING:
    from copa_harness.results import EvaluationResult
    from copa_harness.store.baselines import Baseline


def baseline_name(strategy: str, model: str) -> str:
    """What the baseline of a strategy is called: the model is named unless it is the default one."""
    return strategy if model == DEFAULT_LM else f"{strategy} on {model}"


def candidate(
    evaluation: EvaluationResult,
    *,
    task: str,
    name: str,
    fingerprints: Mapping[str, str],
    repeats: Mapping[str, Sequence[float | None]],
    settings: Settings,
) -> Baseline:
    """The baseline a run would become.

    Raises:
        ArtifactError: Some examples have no score.
    """
    from copa_harness.report.surroundings import git_commit, versions
    from copa_harness.store.baselines import Baseline

    return Baseline.from_evaluation(
        evaluation,
        task=task,
        name=name,
        fingerprints=fingerprints,
        versions=versions(),
        commit=git_commit(settings.root),
        created=datetime.date.today().isoformat(),
        repeats=repeats,
    )


def to_row(baseline: Baseline | None) -> dict[str, Any] | None:
    """A candidate as plain JSON types (a `Score` is no plain float: processes could not hand it on)."""
    if baseline is None:
        return None
    document: dict[str, Any] = json.loads(json.dumps(asdict(baseline)))
    return document


def write_baselines(
    rows: Iterable[Mapping[str, Any]], *, directory: Path
) -> tuple[list[tuple[Path, str]], list[str]]:
    """Write the candidates that rows carry; of several for one file the last one stands.

    Args:
        rows: Rows of the session in their order, each with a candidate under `"baseline"` or None.
        directory: Where baselines lie.

    Returns:
        The files written, each with what changed in it, and what a person should know.
    """
    from copa_harness.store.baselines import Baseline, baseline_path, save_baseline

    found: dict[Path, Baseline] = {}
    remarks = []
    for row in rows:
        document = row.get("baseline")
        if document is None:
            continue
        repeats = {example_id: tuple(scores) for example_id, scores in document["repeats"].items()}
        baseline = Baseline(**{**document, "interval": Interval(**document["interval"]), "repeats": repeats})
        path = baseline_path(directory, task=baseline.task, name=baseline.name)
        if path in found and found[path].scores != baseline.scores:
            remarks.append(
                f"{baseline.task} ({baseline.name}): several runs of this session differ and are one baseline; the "
                f"last one was accepted, of {row['record']['test']}"
            )
        found[path] = baseline
    written = []
    for path, baseline in found.items():
        try:
            changed = _what_changed(path, baseline)
            written.append((save_baseline(directory, baseline), changed))
        except (CopaError, OSError) as error:
            remarks.append(f"the baseline {path} could not be written ({error}); the older one, if any, is intact")
    return written, remarks


def _what_changed(path: Path, accepted: Baseline) -> str:
    """What accepting a run does to the baseline that is in its place: nobody should bless a loss unawares."""
    from copa_harness.judge.messages import counted, number
    from copa_harness.judge.paired import pair_up
    from copa_harness.store.baselines import read_baseline

    now = f"score {number(accepted.score)} on {counted(len(accepted.scores), f'{accepted.split} example')}"
    if not path.exists():
        return f"{now}; the first one"
    try:
        older = read_baseline(path)
    except CopaError:
        return f"{now}; in place of a file that could not be read"
    parts = [part for part, digest in accepted.fingerprints.items() if older.fingerprints.get(part) != digest]
    if older.scores == accepted.scores and not parts:
        return f"{now}; as before"
    pairs = pair_up(older.scores, accepted.scores)
    moves = [after - before for before, after in zip(pairs.before, pairs.after, strict=True)]
    better, worse = sum(move > 0 for move in moves), sum(move < 0 for move in moves)
    changed = f"; changed: {', '.join(parts)}" if parts else ""
    in_common = "" if older.scores.keys() == accepted.scores.keys() else f" of {len(moves):,} in common"
    return f"{now}, was {number(older.score)}: {better} better, {worse} worse{in_common}{changed}"
