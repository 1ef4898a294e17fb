"""The history of a baseline: an anchor that accepting new results does not move, and a ledger of how often one looked.

    baselines/history/<task>/<name>.json      the anchor: the first accepted result, in the form of a baseline
    baselines/history/<task>/<name>.jsonl     one line per accepted result, made to be committed and reviewed

Who accepts every green result moves what the next one is compared with, so that ten losses of a point each pass one by
one. The anchor stays: `max_regression` compares with it too (`judge.paired_gates`). It begins anew where data, split or
metric have changed, and where somebody deletes its file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from copa_harness.atomic_files import write_atomic
from copa_harness.documents import parse_json
from copa_harness.errors import ArtifactError
from copa_harness.judge.paired_gates import changed_parts
from copa_harness.judge.paired_tests import pair_up, paired_difference
from copa_harness.store.baselines import Baseline, baseline_path, load_baseline, save_baseline

FOLDER = "history"


@dataclass(frozen=True, slots=True)
class Anchor:
    """What a baseline began as.

    Attributes:
        baseline: the first accepted result.
        n_looks: results accepted since, the first one not counted.
    """

    baseline: Baseline
    n_looks: int


def load_anchor(directory: Path, *, task: str, name: str) -> Anchor | None:
    """The anchor of a baseline; None where nothing was accepted since there are anchors.

    Raises:
        ArtifactError: a file is there and cannot be read.
    """
    first = load_baseline(directory / FOLDER, task=task, name=name)
    if first is None:
        return None
    return Anchor(first, max(0, len(_lines(_ledger(directory, first))) - 1))


def note_accepted(directory: Path, accepted: Baseline) -> None:
    """Write an accepted result into the ledger; the first comparable one becomes the anchor.

    Raises:
        ArtifactError: the files of the history cannot be read.
        OSError: they cannot be written.
    """
    anchor = load_anchor(directory, task=accepted.task, name=accepted.name)
    path = _ledger(directory, accepted)
    lines = [] if anchor is None or changed_parts(anchor.baseline, accepted.fingerprints) else _lines(path)
    if not lines or anchor is None:
        save_baseline(directory / FOLDER, accepted)
        lines, change = [], 0.0
    else:
        change = paired_difference(pair_up(anchor.baseline.scores, accepted.scores)).difference
    score, n = round(accepted.score, 6), len(accepted.scores)
    look = {"created": accepted.created, "commit": accepted.commit, "score": score, "n": n}
    told = json.dumps(look | {"since_anchor": round(change, 6)})
    if not lines or parse_json(lines[-1].encode())["score"] != score or f'"{accepted.commit}"' not in lines[-1]:
        write_atomic(path, "".join(f"{line}\n" for line in (*lines, told)))


def _ledger(directory: Path, baseline: Baseline) -> Path:
    return baseline_path(directory / FOLDER, task=baseline.task, name=baseline.name).with_suffix(".jsonl")


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            parse_json(line.encode())
    except (OSError, ValueError) as error:
        message = f"{path} cannot be read ({error}). Next: restore it (git checkout), or delete it."
        raise ArtifactError(message) from error
    return lines
