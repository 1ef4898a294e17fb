"""One run as the report knows it, and its JSON form.

A `RunRecord` holds what the tables and `latest.json` show: scores with their examples, cost by phase, gates, verdict.
It survives the trip through JSON, so test workers can hand records to the process that reports. NaN and infinity have
no JSON form: a missing score is null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from copa_harness.documents import mask_secrets, to_jsonable
from copa_harness.judge.gates import overall
from copa_harness.judge.paired_tests import scores_by_id
from copa_harness.results import Budget, EvaluationResult, GateResult, Interval, PhaseRecord, Usage, Verdict

_USAGE_FIELDS = tuple(entry.name for entry in fields(Usage))


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One evaluation of one program, with the optimization that led to it.

    Attributes:
        test: id of the test that asked.
        task: the task's name.
        strategy: how weights and prompts were searched; "none" for the program as written.
        lm: the base model, as it was named in the settings.
        split: the split the score is of.
        score: mean score, 0..1; None when there is none (all failed, or the budget cut the evaluation short).
        n: examples evaluated.
        n_failed: examples without a score.
        interval: around the score; None without a score.
        usage: everything the run spent.
        phases: what each phase spent and did to the validation score.
        verdict: of all gates together.
        artifact: path of the artifact, "" for none.
        label: what the tables call the model; empty means `lm`.
        served_lm: the model that answered in the end (a fine-tuned one contains its fingerprint).
        n_unparsed: answers that did not parse, scored 0.
        n_provider_errors: examples the model gave no answer for.
        n_metric_errors: examples whose metric broke.
        gates: the gates' answers.
        budget: ceiling of the run.
        validation_before: mean validation score of the program as given, 0..1.
        validation_after: the same of the program evaluated.
        scores: score per example id, for paired comparisons.
        seed: of all random choices; None when not recorded.
        stopped: why the optimization ended.
        exhausted: whether the budget ended it.
        repeats: scores of every repeat per example id, when the examples were answered several times.
        sequential: what stopping early saved and cost (`SequentialAnswer.to_json`); empty when all rows were used.
        attribution: what weights and prompts gained (`Attribution.to_json`); empty when not measured.
        groups: group by example id, where examples share one: paired comparisons keep them together.
        credit: which part of which stage earned the optimization's gain on validation; empty when nothing changed.
        learned: what the optimization learned about its proposals, one entry per arm.
        front: programs on the front of validation score and cost per answer, cheapest first, when one was asked for.
        notes: what the optimization did, in sentences.
        search: why the optimization ended (`reason`), its `n_trials` and distinct `calls`; empty without one.
        label_scores: of constrained answers, by example id and output field: every allowed value's log-probability.
        evidence: what speaks for the optimized program against the one that came in, paired on validation.
    """

    test: str
    task: str
    strategy: str
    lm: str
    split: str
    score: float | None
    n: int
    n_failed: int
    interval: Interval | None
    usage: Usage = field(default_factory=Usage)
    phases: tuple[PhaseRecord, ...] = ()
    verdict: Verdict = Verdict.PASS
    artifact: str = ""
    label: str = ""
    served_lm: str = ""
    n_unparsed: int = 0
    n_provider_errors: int = 0
    n_metric_errors: int = 0
    gates: tuple[GateResult, ...] = ()
    budget: Budget = field(default_factory=Budget)
    validation_before: float | None = None
    validation_after: float | None = None
    scores: Mapping[str, float | None] = field(default_factory=dict)
    seed: int | None = None
    stopped: str = ""
    exhausted: bool = False
    repeats: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    sequential: Mapping[str, Any] = field(default_factory=dict)
    attribution: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    credit: Mapping[str, Any] = field(default_factory=dict)
    learned: Sequence[Mapping[str, Any]] = ()
    front: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    search: Mapping[str, Any] = field(default_factory=dict)
    label_scores: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """What the tables call the model."""
        return self.label or self.lm

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
        gates: Sequence[GateResult] = (),
        usage: Usage | None = None,
        **more: Any,
    ) -> RunRecord:
        """A record of an evaluation; None stands for one that the budget cut short, which has no score.

        Args:
            evaluation: what was measured.
            test: id of the test that asked.
            task: the task's name.
            strategy: how the program was made.
            lm: the base model.
            split: the split.
            gates: their answers; the verdict is the gravest.
            usage: everything spent; default the evaluation's own.
            **more: any other attribute of the record (`phases`, `artifact`, `budget`, ...).
        """
        rows = evaluation.results if evaluation is not None else ()
        has_score = evaluation is not None and bool(evaluation.scores)
        return cls(
            test=test,
            task=task,
            strategy=strategy,
            lm=lm,
            split=split,
            score=float(evaluation.score) if evaluation is not None and has_score else None,
            n=len(rows),
            n_failed=sum(row.score is None for row in rows),
            interval=evaluation.interval if evaluation is not None and has_score else None,
            usage=usage if usage is not None else (evaluation.usage if evaluation is not None else Usage()),
            verdict=more.pop("verdict", None) or overall(gates),
            served_lm=more.pop("served_lm", None) or (evaluation.lm if evaluation is not None else ""),
            n_unparsed=sum(row.outcome == "unparsed" for row in rows),
            n_provider_errors=sum(row.outcome == "provider_error" for row in rows),
            n_metric_errors=sum(row.outcome == "metric_error" for row in rows),
            gates=tuple(gates),
            scores=scores_by_id(evaluation) if evaluation is not None else {},
            label_scores={row.example_id: row.label_scores for row in rows if row.label_scores},
            **more,
        )

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON types (see the README for the schema); credentials are masked."""
        document = {
            "test": self.test,
            "task": self.task,
            "strategy": self.strategy,
            "lm": self.lm,
            "split": self.split,
            "score": self.score,
            "n": self.n,
            "n_failed": self.n_failed,
            "interval": None if self.interval is None else [self.interval.low, self.interval.high],
            "usage": _usage_to_json(self.usage),
            "phases": [
                {
                    "phase": phase.phase,
                    "usage": _usage_to_json(phase.usage),
                    "score_before": phase.score_before,
                    "score_after": phase.score_after,
                    "note": phase.note,
                }
                for phase in self.phases
            ],
            "verdict": self.verdict,
            "artifact": self.artifact,
            "label": self.model,
            "served_lm": self.served_lm,
            "n_unparsed": self.n_unparsed,
            "n_provider_errors": self.n_provider_errors,
            "n_metric_errors": self.n_metric_errors,
            "interval_level": None if self.interval is None else self.interval.level,
            "interval_method": None if self.interval is None else self.interval.method,
            "gates": [
                {"gate": gate.gate, "verdict": gate.verdict, "message": gate.message, "details": gate.details}
                for gate in self.gates
            ],
            "budget": {"name": self.budget.name, "calls": self.budget.calls},
            "validation": {"before": self.validation_before, "after": self.validation_after},
            "seed": self.seed,
            "stopped": self.stopped,
            "exhausted": self.exhausted,
            "scores": self.scores,
            "repeats": self.repeats,
            "sequential": self.sequential,
            "attribution": self.attribution,
            "groups": self.groups,
            "credit": self.credit,
            "learned": list(self.learned),
            "front": list(self.front),
            "notes": list(self.notes),
            "search": self.search,
            "label_scores": self.label_scores,
            "evidence": dict(self.evidence),
        }
        masked: dict[str, Any] = mask_secrets(to_jsonable(document))
        return masked

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RunRecord:
        """The record a JSON mapping stands for; parts beyond the minimum schema may be missing.

        Raises:
            ValueError: a part of the minimum is missing or of the wrong kind.
        """
        try:
            return _from_json(document)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"got a run record without a usable {error}; expected the schema of to_json()") from error


def _from_json(document: Mapping[str, Any]) -> RunRecord:
    bounds, budget, validation = document["interval"], document.get("budget", {}), document.get("validation", {})
    level, method = document.get("interval_level") or 0.95, document.get("interval_method") or "unknown"
    calls = budget.get("calls")
    return RunRecord(
        test=document["test"],
        task=document["task"],
        strategy=document["strategy"],
        lm=document["lm"],
        split=document["split"],
        score=document["score"],
        n=document["n"],
        n_failed=document["n_failed"],
        interval=None if bounds is None else Interval(float(bounds[0]), float(bounds[1]), level, method),
        usage=_usage_from_json(document["usage"]),
        phases=tuple(
            PhaseRecord(
                phase["phase"],
                _usage_from_json(phase["usage"]),
                phase.get("score_before"),
                phase.get("score_after"),
                phase.get("note", ""),
            )
            for phase in document["phases"]
        ),
        verdict=Verdict(document["verdict"]),
        artifact=document["artifact"] or "",
        label=document.get("label", ""),
        served_lm=document.get("served_lm", ""),
        n_unparsed=document.get("n_unparsed", 0),
        n_provider_errors=document.get("n_provider_errors", 0),
        n_metric_errors=document.get("n_metric_errors", 0),
        gates=tuple(
            GateResult(gate["gate"], Verdict(gate["verdict"]), gate["message"], gate.get("details", {}))
            for gate in document.get("gates", ())
        ),
        budget=Budget(math.inf if calls is None else calls, budget.get("name", "unlimited")),
        validation_before=validation.get("before"),
        validation_after=validation.get("after"),
        scores=dict(document.get("scores", {})),
        seed=document.get("seed"),
        stopped=document.get("stopped", ""),
        exhausted=document.get("exhausted", False),
        repeats={key: tuple(scores) for key, scores in document.get("repeats", {}).items()},
        sequential=dict(document.get("sequential", {})),
        attribution=dict(document.get("attribution", {})),
        groups=dict(document.get("groups", {})),
        credit=dict(document.get("credit", {})),
        learned=tuple(document.get("learned", ())),
        front=tuple(document.get("front", ())),
        notes=tuple(document.get("notes", ())),
        search=dict(document.get("search", {})),
        label_scores=dict(document.get("label_scores", {})),
        evidence=document.get("evidence", {}),
    )


def _usage_to_json(usage: Usage) -> dict[str, Any]:
    return {name: getattr(usage, name) for name in _USAGE_FIELDS}


def _usage_from_json(document: Mapping[str, Any]) -> Usage:
    return Usage(**{name: document[name] for name in _USAGE_FIELDS if name in document})
