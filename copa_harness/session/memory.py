"""What a session remembers of its complete evaluations on test splits: later runs are compared with them.

Keyed by what the task is and what answers, so that two fixtures that make the same task share their runs. Knows
nothing of files; what should outlive the session is a baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from copa_harness.session.optimizations import task_fingerprint

if TYPE_CHECKING:
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.session.runs import ScoredEvaluation
    from copa_harness.tasks.task import Task

_Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Earlier:
    """A run of this session that later ones can be compared with."""

    name: str
    scores: Mapping[str, float | None]
    fingerprints: Mapping[str, str]
    origin: str = "this session"


class Memory:
    """Evaluations of whole test splits by task, model and strategy."""

    def __init__(self) -> None:
        self._plain: dict[_Key, ScoredEvaluation] = {}
        self._earlier: dict[_Key, dict[str, Earlier]] = {}

    def remember(
        self, task: Task, lm: MeteredLM, evaluation: ScoredEvaluation, fingerprints: Mapping[str, str]
    ) -> None:
        """Keep an evaluation of all examples.

        Args:
            task: What was evaluated on.
            lm: The base model.
            evaluation: Of the whole test split.
            fingerprints: Of data, split, metric, program and lm.
        """
        from copa_harness.judge.paired import scores_by_id

        key = _key(task, lm)
        if evaluation.strategy == "none":
            self._plain[key] = evaluation
        earlier = Earlier(evaluation.strategy, scores_by_id(evaluation), fingerprints)
        self._earlier.setdefault(key, {})[evaluation.strategy] = earlier

    def standing(
        self, task: Task, lm: MeteredLM, fingerprints: Mapping[str, str], groups: Mapping[str, str] | None
    ) -> dict[str, Any]:
        """What other processes need to compare a run with one of their own, as plain JSON types.

        Args:
            task: What was evaluated on.
            lm: The base model.
            fingerprints: Of data, split, metric, program and lm.
            groups: Group by example id, where examples share one.
        """
        return {"key": list(_key(task, lm)), "fingerprints": dict(fingerprints), "groups": groups}

    def plain(self, task: Task, lm: MeteredLM) -> ScoredEvaluation | None:
        """The program as written on the base model, if it was evaluated."""
        return self._plain.get(_key(task, lm))

    def earlier(self, task: Task, lm: MeteredLM) -> Mapping[str, Earlier]:
        """Runs of the task on the base model, by strategy."""
        return self._earlier.get(_key(task, lm), {})


def _key(task: Task, lm: MeteredLM) -> _Key:
    return (task_fingerprint(task), lm.fingerprint)
