"""A run and its gates: what it is compared with, and whether it becomes what later runs are compared with.

Baselines are files made to be committed, `baselines/<task>/<strategy>.json` below the root. The statistics are
`judge`'s; nothing here decides.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from copa_harness.results import GateResult
from copa_harness.session.optimizations import Optimized, program_fingerprint
from copa_harness.session.settings import DEFAULT_LM, MarkerArguments, Settings

if TYPE_CHECKING:
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.session.runs import ScoredEvaluation
    from copa_harness.tasks.task import Task

BASELINES = "baselines"
"""Folder of accepted results below the root."""

_GATES = ("min_score", "max_regression", "max_calls", "max_error_rate", "undecided_fails")


def judged(
    task: Task,
    evaluation: ScoredEvaluation,
    optimized: Optimized,
    *,
    base: MeteredLM,
    marker: MarkerArguments,
    settings: Settings,
) -> tuple[GateResult, ...]:
    """The gates' answers; if settings say so, the evaluation becomes the baseline first.

    Args:
        task: What was evaluated on.
        evaluation: The final evaluation.
        optimized: The optimization behind it.
        base: The base model; its name is part of the baseline's unless it is the default one.
        marker: The gates.
        settings: In force for this run.

    Raises:
        ArtifactError: The baseline file is damaged, or the evaluation cannot become one.
    """
    from copa_harness.judge.gates import Gates, judge
    from copa_harness.report.surroundings import git_commit, versions
    from copa_harness.store.baselines import Baseline, load_baseline, save_baseline
    from copa_harness.store.stages import hash_examples, hash_source

    fingerprints = {
        "data": hash_examples(task.testset),
        "split": evaluation.split,
        "metric": hash_source(task.metric),
        "program": program_fingerprint(optimized.program),
        "lm": optimized.lm.fingerprint,
    }
    directory = settings.root / BASELINES
    name = evaluation.strategy if base.model == DEFAULT_LM else f"{evaluation.strategy} on {base.model}"
    if settings.bless:
        accepted = Baseline.from_evaluation(
            evaluation,
            task=task.name,
            name=name,
            fingerprints=fingerprints,
            versions=versions(),
            commit=git_commit(settings.root),
            created=datetime.date.today().isoformat(),
        )
        save_baseline(directory, accepted)
    is_compared = marker.max_regression is not None
    return judge(
        evaluation,
        Gates(**{gate: getattr(marker, gate) for gate in _GATES if getattr(marker, gate) is not None}),
        calls=optimized.result.charged_calls,
        baseline=load_baseline(directory, task=task.name, name=name) if is_compared else None,
        fingerprints=fingerprints,
        n_expected=len(task.testset),
        seed=settings.seed,
    )
