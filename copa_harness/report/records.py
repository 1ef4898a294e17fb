"""One run as every table, file and test body knows it.

A `RunRecord` holds scores with their examples, cost by phase, gates and verdict, and the optimization that led to the
program. It survives the trip through JSON (`documents.to_json`), so the processes of a session hand records to the one
that reports; `as_reported` is the flatter form in which `latest.json` has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from copa_harness.credentials import mask_secrets
from copa_harness.documents import to_json, to_jsonable
from copa_harness.judge.attribution import Attribution
from copa_harness.judge.flaky import Drift
from copa_harness.judge.gates import overall
from copa_harness.judge.human_scores import HumanScores
from copa_harness.judge.paired_tests import scores_by_id
from copa_harness.judge.sequential.stopping import SequentialAnswer
from copa_harness.results import (
    Budget,
    EvaluationResult,
    GateResult,
    Interval,
    OptimizationResult,
    PhaseRecord,
    Usage,
    Verdict,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One evaluation of one program, with the optimization that led to it.

    Attributes:
        test: id of the test that asked.
        task: the task's name.
        strategy: how weights and prompts were searched; "none" for the program as written.
        lm: the base model, as it was named in the settings.
        label: what the tables call the model; empty means `lm`.
        split: the split the score is of.
        score: mean score, 0..1; None when there is none (all failed, or the budget cut the evaluation short).
        interval: around the score; None without a score.
        n: examples evaluated.
        n_failed: examples without a score.
        n_unparsed: answers that did not parse, scored 0.
        n_provider_errors: examples the model gave no answer for.
        n_metric_errors: examples whose metric broke.
        served_lm: the model that answered in the end (a fine-tuned one contains its fingerprint).
        scores: score per example id, for paired comparisons.
        repeats: scores of every repeat per example id, when the examples were answered several times.
        groups: group by example id, where examples share one: paired comparisons keep them together.
        slices: slice by example id, where the task has slices.
        label_scores: of constrained answers, by example id and output field: every allowed value's log-probability.
        requests: digest per example id of what was asked (`ExampleResult.requests`).
        gates: the gates' answers.
        verdict: of all gates together.
        usage: everything the run spent.
        phases: what each phase spent here and now, and did to the validation score; those of the optimization first.
        budget: ceiling of the optimization.
        seed: of all random choices; None when not recorded.
        cut_short: the ceilings of the whole session ended it; it has no score.
        optimization: what led to the program; None for one that was not optimized.
        artifact: path of the artifact, "" for none.
        source: where the task's rows come from, with a hash of their content; "" if nobody said.
        sequential: what stopping early saved and cost; None when all rows were used.
        attribution: what weights and prompts gained, alone and together; None when not measured.
        drift: whether stored answers are still the model's; None where no canary was asked.
        human: the run by people's scores; None where the task has none.
    """

    test: str
    task: str
    strategy: str
    lm: str
    label: str = ""
    split: str
    score: float | None
    interval: Interval | None
    n: int
    n_failed: int
    n_unparsed: int = 0
    n_provider_errors: int = 0
    n_metric_errors: int = 0
    served_lm: str = ""
    scores: Mapping[str, float | None] = field(default_factory=dict)
    repeats: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    slices: Mapping[str, str] = field(default_factory=dict)
    label_scores: Mapping[str, Any] = field(default_factory=dict)
    requests: Mapping[str, str] = field(default_factory=dict)
    gates: tuple[GateResult, ...] = ()
    verdict: Verdict = Verdict.PASS
    usage: Usage = field(default_factory=Usage)
    phases: tuple[PhaseRecord, ...] = ()
    budget: Budget = field(default_factory=Budget)
    seed: int | None = None
    cut_short: bool = False
    optimization: OptimizationResult | None = None
    artifact: str = ""
    source: str = ""
    sequential: SequentialAnswer | None = None
    attribution: Attribution | None = None
    drift: Drift | None = None
    human: HumanScores | None = None

    @property
    def model(self) -> str:
        """What the tables call the model."""
        return self.label or self.lm

    @property
    def worst_slice(self) -> tuple[str, float, int] | None:
        """Name, mean score and examples of the slice with the lowest mean; None without slices."""
        scores: dict[str, list[float]] = {}
        for name, score in self.scores.items():
            if score is not None and name in self.slices:
                scores.setdefault(self.slices[name], []).append(score)
        means = ((fmean(several), name, len(several)) for name, several in scores.items())
        worst = min(means, default=None)
        return None if worst is None else (worst[1], worst[0], worst[2])

    @property
    def notes(self) -> tuple[str, ...]:
        """What the optimization did, in sentences."""
        return () if self.optimization is None else self.optimization.notes

    @property
    def validation(self) -> tuple[float | None, float | None]:
        """Mean validation score of the program as given and of the program evaluated, 0..1."""
        result = self.optimization
        return (None, None) if result is None else (result.score_before, result.score_after)

    @property
    def search_usage(self) -> Usage:
        """What the optimization spent here and now, without evaluations."""
        n_phases = 0 if self.optimization is None else len(self.optimization.phases)
        return sum((phase.usage for phase in self.phases[:n_phases]), Usage())

    @classmethod
    def from_evaluation(
        cls,
        evaluation: EvaluationResult | None,
        *,
        test: str,
        task: str,
        strategy: str,
        lm: str,
        split: str,
        **more: Any,
    ) -> RunRecord:
        """A record of an evaluation; None stands for one that the budget cut short, which has no score.

        `more` are other attributes of the record. `usage` is that of the phases, or of the evaluation without them;
        the verdict is that of the gates.
        """
        rows = () if evaluation is None else evaluation.results
        found: dict[str, Any] = {"score": None, "interval": None}
        if evaluation is not None:
            found |= {"served_lm": evaluation.lm, "scores": scores_by_id(evaluation), "usage": evaluation.usage}
            if evaluation.scores:
                found |= {"score": float(evaluation.score), "interval": evaluation.interval}
        if phases := more.get("phases"):
            found["usage"] = sum((phase.usage for phase in phases), Usage())
        return cls(
            test=test,
            task=task,
            strategy=strategy,
            lm=lm,
            split=split,
            **found
            | {
                "n": len(rows),
                "n_failed": sum(row.score is None for row in rows),
                "n_unparsed": sum(row.outcome == "unparsed" for row in rows),
                "n_provider_errors": sum(row.outcome == "provider_error" for row in rows),
                "n_metric_errors": sum(row.outcome == "metric_error" for row in rows),
                "requests": {row.example_id: row.requests for row in rows if row.requests},
                "label_scores": {row.example_id: row.label_scores for row in rows if row.label_scores},
                "verdict": overall(more.get("gates", ())),
            }
            | more,
        )


def as_reported(run: RunRecord) -> dict[str, Any]:
    """A record as `latest.json` has it (see reports/README.md for the keys); credentials are masked."""
    document, result = to_json(run), run.optimization
    for name in ("optimization", "cut_short"):
        del document[name]
    before, after = run.validation
    document |= {
        "label": run.model,
        "interval": None if run.interval is None else [run.interval.low, run.interval.high],
        "interval_level": None if run.interval is None else run.interval.level,
        "interval_method": None if run.interval is None else run.interval.method,
        "budget": {"name": run.budget.name, "calls": run.budget.calls},
        "validation": {"before": before, "after": after},
        "stopped": "budget" if run.cut_short else "" if result is None else result.stopped,
        "exhausted": run.cut_short or (result is not None and result.exhausted),
        "sequential": {} if run.sequential is None else run.sequential.numbers(),
        "attribution": {} if run.attribution is None else run.attribution.numbers(),
    }
    for name in ("credit", "evidence"):
        document[name] = {} if result is None else getattr(result, name) or {}
    for name in ("learned", "front", "notes"):
        document[name] = () if result is None else getattr(result, name)
    document["search"] = {} if result is None or result.ending is None else result.ending
    masked: dict[str, Any] = mask_secrets(to_jsonable(document))
    return masked
