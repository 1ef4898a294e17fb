"""Gates that name another run of the session, judged once all runs are known: `better_than` at the session's end.

A test process knows only its own runs, and of those only the earlier ones. What such a gate compares with must not
depend on how many processes there are, so one rule holds everywhere: the last run of that strategy (same task, same
base model) before the test in collection order; else the accepted baseline; else the first such run after it. A test
process judges at once what it can know by that rule, and leaves the rest open for `settle`. Knows nothing of pytest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from copa_harness.results import EvaluationResult, ExampleResult, GateResult, Interval, Verdict
from copa_harness.session.settings import Settings

if TYPE_CHECKING:
    from copa_harness.judge.regression import Reference
    from copa_harness.report.records import RunRecord

DEFERRED = "deferred"
"""Key in a gate's details: it is judged when the session ends."""


def is_deferred(gate: GateResult) -> bool:
    """Whether a gate is left open until the session ends."""
    return bool(gate.details.get(DEFERRED))


def deferred(gate: GateResult, name: str, *, alpha: float, note: str) -> GateResult:
    """A `better_than` gate whose other side may still come, from a later test or from another process.

    Args:
        gate: Its answer as long as there is nothing to compare with.
        name: What it compares with.
        alpha: Error rate it will be held to.
        note: Sentence to put after its message.
    """
    message = f"open until the session ends: no run of {name!r} is known here yet, another test may still bring one."
    return GateResult(
        gate.gate, Verdict.UNDECIDED, message, {DEFERRED: True, "name": name, "alpha": alpha, "note": note}
    )


def settle(
    rows: Sequence[Mapping[str, Any]], records: Sequence[RunRecord], *, settings: Settings
) -> tuple[list[RunRecord], list[str]]:
    """Judge what was left open, and say which of it fails.

    Args:
        rows: Of all processes, in the order of their tests; `"standing"` says what others may compare a run with
            (see `recording.Entry`).
        records: Of the rows, in the same order.
        settings: Where accepted baselines lie, and the seed.

    Returns:
        The records with every gate judged, and a remark for each that fails though its test could not say so.
    """
    from copa_harness.judge.gates import is_failure, overall

    settled, failed = [], []
    for index, (row, record) in enumerate(zip(rows, records, strict=True)):
        waiting = next((gate for gate in record.gates if is_deferred(gate)), None)
        if waiting is None:
            settled.append(record)
            continue
        answer = _judged(index, waiting, rows, records, settings=settings)
        gates = tuple(answer if gate is waiting else gate for gate in record.gates)
        settled.append(replace(record, gates=gates, verdict=overall(gates)))
        if row["checked"] and is_failure(answer.verdict, undecided_fails=row["undecided_fails"]):
            failed.append(
                f"{record.test}: {answer.gate} is judged now that all runs of the session are known: "
                f"{answer.verdict.value}. {answer.message}"
            )
    return settled, failed


def _judged(
    index: int,
    waiting: GateResult,
    rows: Sequence[Mapping[str, Any]],
    records: Sequence[RunRecord],
    *,
    settings: Settings,
) -> GateResult:
    from copa_harness.judge.superiority import better_than

    record, standing = records[index], rows[index]["standing"]
    name = waiting.details["name"]
    results = tuple(ExampleResult(name, score) for name, score in record.scores.items())
    evaluation = EvaluationResult(record.split, record.served_lm, results, record.interval or Interval(0.0, 1.0))
    return better_than(
        evaluation,
        _rival(name, index, rows, records, settings=settings),
        name=name,
        alpha=waiting.details["alpha"],
        fingerprints=standing["fingerprints"],
        seed=settings.seed if record.seed is None else record.seed,
        groups=standing["groups"],
        note=waiting.details["note"],
    )


def _rival(
    name: str, index: int, rows: Sequence[Mapping[str, Any]], records: Sequence[RunRecord], *, settings: Settings
) -> Reference | None:
    """What the run at `index` is compared with, by the rule above."""
    from copa_harness.session.gating import accepted_rival, canonical
    from copa_harness.session.memory import Earlier

    key = rows[index]["standing"]["key"]
    found = [
        (position, Earlier(record.strategy, record.scores, row["standing"]["fingerprints"]))
        for position, (row, record) in enumerate(zip(rows, records, strict=True))
        if position != index and row.get("standing") and row["standing"]["key"] == key
        and record.strategy == canonical(name)
    ]  # fmt: skip
    before = [run for position, run in found if position < index]
    if before:
        return before[-1]
    baseline = accepted_rival(name, task=records[index].task, model=records[index].lm, settings=settings)
    return baseline or next((run for _, run in found), None)
