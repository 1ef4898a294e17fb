"""What the evaluations of a session leave behind for its end.

An `Entry` goes from the process that ran a test to the one that reports as plain JSON types (`to_row`, `from_row`), so
the process that reports knows every run alike, its own and those of xdist's workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from copa_harness.credentials import mask_secrets
from copa_harness.documents import from_json, to_json
from copa_harness.report.examples import RunDetails
from copa_harness.report.records import RunRecord
from copa_harness.session.evaluation import FailedCalls
from copa_harness.session.plan import PlanLine
from copa_harness.store.baselines import Baseline


@dataclass(frozen=True, slots=True)
class ComparisonBasis:
    """What other runs need to compare themselves with a run, beside its scores.

    Attributes:
        key: Fingerprints of task and base model: runs with another key are of something else.
        fingerprints: Of data, split, metric, program and lm.
        groups: Group by example id, where examples share one.
    """

    key: tuple[str, str]
    fingerprints: Mapping[str, str]
    groups: Mapping[str, str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One evaluation, or one step of a plan.

    Attributes:
        test: Id of the test that asked.
        order: Position of that test in the collection.
        record: The evaluation; None for a step of a plan.
        plan: What a step would pay; None for an evaluation.
        baseline: What the run becomes if the session is blessed.
        not_accepted: Why it must not become one though the session is blessed; empty if it may.
        failures: Attempts at a call that failed, by kind.
        notes: Sentences for the summary.
        asides: Sentences for whoever asks for the full summary.
        details: What the page shows of the run beyond its record.
        comparison: For other runs to compare with; None unless it is a whole test split of a named strategy.
        checked: Whether the test called `copa_run.check()`; None where there was no run to check.
        undecided_fails: Whether its gates fail when they are undecided or not comparable.
    """

    test: str
    order: int = -1
    record: RunRecord | None = None
    plan: PlanLine | None = None
    baseline: Baseline | None = None
    failures: Mapping[str, FailedCalls] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    asides: tuple[str, ...] = ()
    details: RunDetails | None = None
    comparison: ComparisonBasis | None = None
    checked: bool | None = None
    undecided_fails: bool = False
    not_accepted: str = ""


def to_row(entry: Entry) -> dict[str, Any]:
    """As plain JSON types; credentials are masked."""
    row: dict[str, Any] = mask_secrets(to_json(entry))
    return row


def from_row(row: Mapping[str, Any]) -> Entry:
    """The entry that `to_row` wrote."""
    return from_json(Entry, row)
