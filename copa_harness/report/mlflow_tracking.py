"""The runs of a session in MLflow (`--copa-mlflow`): an experiment per task, a run per record.

Parameters say how the program was made, metrics what it scored and cost, and the artifact is logged where there is one.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from copa_harness.credentials import mask_text
from copa_harness.report.records import RunRecord

LONGEST = 500
"""Characters of a parameter that every store takes."""


def is_installed() -> bool:
    """Whether MLflow can be imported."""
    return importlib.util.find_spec("mlflow") is not None


def track(records: Sequence[RunRecord], *, uri: str, commit: str = "") -> str:
    """Log records; returns why it could not be done, "" if it was."""
    try:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        for record in records:
            known = client.get_experiment_by_name(record.task)
            experiment = client.create_experiment(record.task) if known is None else known.experiment_id
            _log(client, experiment, record, commit=commit)
    except Exception as error:  # noqa: BLE001 - a server of somebody else's; the results stand without it
        return (
            f"MLflow at {mask_text(uri)} did not take the runs ({type(error).__name__}: {mask_text(str(error))[:300]})"
        )
    return ""


def _log(client: Any, experiment: str, record: RunRecord, *, commit: str) -> None:
    from mlflow.entities import Metric, Param

    tags = {"verdict": record.verdict.value, "test": record.test, "mlflow.source.git.commit": commit}
    run = client.create_run(
        experiment, run_name=record.strategy, tags={key: text for key, text in tags.items() if text}
    )
    now = int(time.time() * 1000)
    client.log_batch(
        run.info.run_id,
        metrics=[Metric(name, value, now, 0) for name, value in metrics_of(record).items()],
        params=[Param(name, str(value)[:LONGEST]) for name, value in params_of(record).items()],
    )
    if record.artifact and Path(record.artifact).is_dir():
        client.log_artifacts(run.info.run_id, record.artifact, "artifact")
    client.set_terminated(run.info.run_id, "FINISHED")


def params_of(record: RunRecord) -> dict[str, Any]:
    """How the program was made."""
    found = {
        "strategy": record.strategy,
        "model": record.model,
        "served_model": record.served_lm,
        "split": record.split,
        "seed": record.seed,
        "budget": record.budget.name,
        "rows": record.source,
    }
    return {name: value for name, value in found.items() if value not in ("", None)}


def metrics_of(record: RunRecord) -> dict[str, float]:
    """What it scored and cost."""
    before, after = record.validation
    interval = record.interval
    found = {
        "score": record.score,
        "score_low": None if interval is None else interval.low,
        "score_high": None if interval is None else interval.high,
        "n": record.n,
        "n_failed": record.n_failed,
        "n_unparsed": record.n_unparsed,
        "validation_before": before,
        "validation_after": after,
        "calls": record.usage.paid_calls,
        "cached_calls": record.usage.cached_calls,
        "tokens": record.usage.tokens,
        "usd": record.usage.usd,
        "seconds": record.usage.wall_s,
        "train_steps": record.usage.train_steps,
    }
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}
