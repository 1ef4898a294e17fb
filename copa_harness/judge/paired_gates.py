"""The paired gates: no drop below an accepted baseline (`max_regression`), a gain over another result (`better_than`).

First whether the two sides may be compared at all (same data, split and metric), then the test of `noninferiority`,
then the sentence that says what was found and what to do. `max_regression` tests against the margin that is allowed.
`better_than` tests without one: a pass needs the gain to be shown, not just measured; a loss that is shown fails;
anything between is undecided, with the examples it would take and the smallest gain these could have shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from copa_harness.formatting import counted, number
from copa_harness.judge.explanations import interval_text
from copa_harness.judge.noninferiority import Noninferiority, noninferiority
from copa_harness.judge.paired_tests import PairedScores, pair_up, paired_difference, scores_by_id
from copa_harness.judge.violations import Violations
from copa_harness.results import EvaluationResult, GateResult, Usage, Verdict

COMPARED = ("data", "split", "metric")
"""Fingerprints that must agree with the baseline's before scores may be compared."""

SYSTEM = ("program", "lm")
"""Fingerprints of what is judged: when both agree, and all scores, nothing has changed."""


class Reference(Protocol):
    """What a paired gate compares with: an accepted earlier run, or another one of this session."""

    @property
    def name(self) -> str:
        """How messages call it."""

    @property
    def origin(self) -> str:
        """When and from which commit it was made, for people; may be empty."""

    @property
    def scores(self) -> Mapping[str, float | None]:
        """Score per example id."""

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Hashes by part: `data`, `split`, `metric`, `program`, `lm`."""


@dataclass(frozen=True, slots=True)
class JudgedRun:
    """A run as its gates see it: its scores, what it is compared with, and what it spent.

    Attributes:
        evaluation: the test evaluation; None when it did not finish.
        n_expected: examples in the split; fewer evaluated means the budget cut the evaluation short.
        fingerprints: of this run (see `Reference.fingerprints`); parts missing on either side are not compared.
        groups: group by example id, where examples share one.
        repeats: scores of every repeat by example id; needed by `min_pass_all`.
        baseline: the accepted earlier run that `max_regression` compares with; None when there is none.
        opponent: what `better_than` names; None when there is no such result.
        calls: model calls charged to the run; needed by `max_calls`.
        usage: what the run spent; needed by `max_tokens`, `max_usd` and `max_seconds`.
        violations: what changed forms of its examples were answered; needed by `max_violation_rate`.
    """

    evaluation: EvaluationResult | None
    n_expected: int | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, str] | None = None
    repeats: Mapping[str, Sequence[float | None]] | None = None
    baseline: Reference | None = None
    opponent: Reference | None = None
    calls: float | None = None
    usage: Usage | None = None
    violations: Violations | None = None

    def paired_with(self, reference: Reference) -> PairedScores:
        """Scores of the reference and of this run, for the examples in common."""
        scores = {} if self.evaluation is None else scores_by_id(self.evaluation)
        return pair_up(reference.scores, scores, groups=self.groups)


BLESS = "run it once with --copa-bless and commit the file it writes"
"""How a run is accepted as baseline, as a clause."""


def max_regression(
    run: JudgedRun, *, margin: float, alpha: float, bless: str = BLESS, note: str = "", seed: int = 0
) -> GateResult:
    """Hold a run to "no drop of more than `margin` below the baseline".

    Args:
        run: a complete one; without a baseline it is undecided, and the answer says how to make one.
        margin: the largest acceptable drop, 0..1.
        alpha: error rate of either decision.
        bless: how to accept this run as baseline, a clause for the message.
        note: a sentence to put after the message, such as the correction `alpha` already holds.
        seed: of the resampling methods.
    """
    gate, baseline = f"max_regression={margin:g}", run.baseline
    if baseline is None:
        message = f"there is no baseline to compare with yet. Next: if these scores are acceptable, {bless}."
        return GateResult(gate, Verdict.UNDECIDED, message, {"baseline": None})
    named = f"baseline {_named(baseline)}"
    pairs = run.paired_with(baseline)
    if changed_parts(baseline, run.fingerprints) or not pairs.ids:
        next_step = f"if the change is intended, {bless}; otherwise restore what changed"
        return _not_comparable(gate, named, run, baseline, next_step=next_step, seed=seed)
    answer = noninferiority(pairs, margin=margin, alpha=alpha, seed=seed)
    unpaired = pairs.n_only_before + pairs.n_only_after
    missing = f" {counted(unpaired, 'example')} scored on one side only could not be compared." if unpaired else ""
    ours, theirs = run.fingerprints, baseline.fingerprints
    same = all(part in ours and ours[part] == theirs.get(part) for part in SYSTEM)
    if same and not answer.paired.n_better and not answer.paired.n_worse:
        message = (
            f"nothing changed since {named}: the same program and model, and the same score on all "
            f"{counted(answer.paired.n, 'example')}."
        )
        return GateResult(gate, Verdict.PASS, message + missing, gate_numbers(answer, pairs))
    measured = _measured(answer, named, expected=f"a drop of at most {answer.margin:g}")
    message = f"{measured} {_meaning(answer, alpha=alpha, bless=bless)}{missing}"
    message += f" {note}" if note else ""
    return GateResult(gate, answer.verdict, message, gate_numbers(answer, pairs))


def better_than(run: JudgedRun, *, name: str, alpha: float, note: str = "", seed: int = 0) -> GateResult:
    """Hold a run to "better than its opponent".

    Args:
        run: a complete one; without an opponent it is undecided.
        name: how the gate calls the opponent.
        alpha: error rate of either decision.
        note: a sentence to put after the message.
        seed: of the resampling methods.
    """
    gate, opponent = f"better_than={name}", run.opponent
    if opponent is None:
        message = (
            f"there is no result of {name!r} to compare with. Next: run that strategy on this task before this test "
            f"(same file, same model), or accept it as a baseline with --copa-bless."
        )
        return GateResult(gate, Verdict.UNDECIDED, message, {"rival": None})
    pairs = run.paired_with(opponent)
    if changed_parts(opponent, run.fingerprints) or not pairs.ids:
        next_step = f"run {name} again on what is tested now"
        return _not_comparable(gate, _named(opponent), run, opponent, next_step=next_step, seed=seed)
    answer = noninferiority(pairs, margin=0.0, alpha=alpha, seed=seed)
    message = f"{_measured(answer, _named(opponent), expected='a gain')} {_meaning_of_better(answer, name)}"
    message += f" {note}" if note else ""
    # The gain is what is tested here: a loss must not be counted as a regression gate of the suite.
    numbers: dict[str, Any] = gate_numbers(answer, pairs)
    numbers["p_better"] = numbers.pop("p_not_worse")
    numbers["p_loss"] = numbers.pop("p_worse")
    numbers.pop("p_any_drop")
    return GateResult(gate, answer.verdict, message, numbers)


def changed_parts(baseline: Reference, fingerprints: Mapping[str, str]) -> list[str]:
    """Which of data, split and metric differ between a run and a baseline; parts unknown on one side are skipped."""
    return [
        part
        for part in COMPARED
        if part in fingerprints and part in baseline.fingerprints and fingerprints[part] != baseline.fingerprints[part]
    ]


def _named(reference: Reference) -> str:
    return reference.name + (f" ({reference.origin})" if reference.origin else "")


def _measured(answer: Noninferiority, named: str, *, expected: str) -> str:
    paired = answer.paired
    in_groups = f" in {counted(paired.n_groups, 'group')}" if paired.n_groups else ""
    return (
        f"got {number(paired.difference, signed=True)} against {named}, expected {expected}; "
        f"{counted(paired.n, 'paired example')}{in_groups}, {paired.n_better} better, {paired.n_worse} worse, "
        f"{interval_text(paired.interval, signed=True)}, {paired.method} p = {paired.p_value:.2g}."
    )


def _meaning(answer: Noninferiority, *, alpha: float, bless: str) -> str:
    """What the verdict means and what to do, after the numbers."""
    smallest = answer.smallest_visible_drop
    seen = (
        f"The smallest drop these examples could have shown to exceed it (80 % power) is {number(smallest)}."
        if smallest <= 1
        else "So few examples cannot show any drop to exceed it."
    )
    if answer.verdict is Verdict.PASS:
        return f"A drop of more than {answer.margin:g} is ruled out (p = {answer.p_not_worse:.2g}). {seen}"
    if answer.verdict is Verdict.FAIL:
        return (
            f"The drop is real and larger than allowed (p = {answer.p_worse:.2g}). Next: look at the worst "
            f"examples; if the change is intended, {bless}."
        )
    state = (
        f"It did drop (p = {answer.p_any_drop:.2g}), but whether by more than {answer.margin:g} is open."
        if answer.p_any_drop <= alpha
        else "Neither a drop beyond the margin nor its absence is shown."
    )
    if answer.rows_to_decide is None and answer.margin == 0:
        needed = "Next: a margin of 0 is passed only by an improvement; allow a small drop (max_regression=0.05)."
    elif answer.rows_to_decide is None:
        needed = (
            "The difference sits on the margin, so no number of examples would decide it. Next: choose another margin."
        )
    else:
        needed = (
            f"Next: about {counted(answer.rows_to_decide, 'example')} would decide it, if the difference stays as it is"
        )
        needed += "; a margin of 0 is passed only by an improvement." if answer.margin == 0 else "."
    return f"{state} {needed} {seen}"


def _not_comparable(
    gate: str, named: str, run: JudgedRun, reference: Reference, *, next_step: str, seed: int
) -> GateResult:
    """The answer of a gate whose two sides differ in more than what is judged.

    Where the metric is the same, the examples in common are compared all the same: an example's id is its content, so
    each pair is sound. Only the population is another, so it is told and not judged.
    """
    pairs, changed = run.paired_with(reference), changed_parts(reference, run.fingerprints)
    details: dict[str, Any] = {"changed": changed, "n_common": len(pairs.ids)}
    if changed:
        parts = ", ".join(
            f"the {part} changed ({reference.fingerprints[part][:12]} -> {run.fingerprints[part][:12]})"
            for part in changed
        )
    else:
        parts = "no example with a score is in both this run and the one compared with: the test split changed"
    message = f"{parts} since {named}, so the two cannot be compared."
    if "data" in changed or "split" in changed:
        n_before, n_after = (len(pairs.ids) + only for only in (pairs.n_only_before, pairs.n_only_after))
        message += f" {counted(n_before, 'example')} then, {n_after:,} now, {len(pairs.ids):,} in common."
    if pairs.ids and "metric" not in changed:
        common = paired_difference(pairs, seed=seed)
        details |= {
            "difference_in_common": common.difference,
            "low_in_common": common.interval.low,
            "high_in_common": common.interval.high,
        }
        message += (
            f" For orientation: on the {counted(common.n, 'example')} in common the difference is "
            f"{number(common.difference, signed=True)} ({interval_text(common.interval, signed=True)}, "
            f"{common.method} p = {common.p_value:.2g})."
        )
    message += f" Next: {next_step}."
    return GateResult(gate, Verdict.NOT_COMPARABLE, message, details)


def gate_numbers(answer: Noninferiority, pairs: PairedScores) -> dict[str, Any]:
    """The numbers behind a paired gate, for its details; examples that got worse come worst first."""
    paired = answer.paired
    drops = [
        (old - new, name) for name, old, new in zip(pairs.ids, pairs.before, pairs.after, strict=True) if new < old
    ]
    return {
        "difference": paired.difference,
        "low": paired.interval.low,
        "high": paired.interval.high,
        "n": paired.n,
        "n_better": paired.n_better,
        "n_worse": paired.n_worse,
        "worse": [name for _, name in sorted(drops, key=lambda drop: (-drop[0], drop[1]))],
        "method": paired.method,
        "p_value": paired.p_value,
        "p_worse": answer.p_worse,
        "p_not_worse": answer.p_not_worse,
        "p_any_drop": answer.p_any_drop,
        "n_groups": paired.n_groups,
        "rows_to_decide": answer.rows_to_decide,
        "smallest_visible_drop": None if math.isinf(answer.smallest_visible_drop) else answer.smallest_visible_drop,
    }


def _meaning_of_better(answer: Noninferiority, name: str) -> str:
    if answer.verdict is Verdict.PASS:
        return f"The gain is shown (p = {answer.p_not_worse:.2g})."
    if answer.verdict is Verdict.FAIL:
        return (
            f"It is worse, and not by chance (p = {answer.p_any_drop:.2g}). Next: use {name}, or look at the examples "
            f"that got worse."
        )
    if answer.paired.difference <= 0 or answer.rows_to_decide is None:
        return (
            f"No gain was measured. Next: use {name}, which is no worse and already there, or give the optimizer more "
            f"budget."
        )
    smallest = answer.smallest_visible_drop
    seen = (
        f" The smallest gain these examples could have shown (80 % power) is {number(smallest)}."
        if math.isfinite(smallest)
        else ""
    )
    return (
        f"The gain may be chance (p = {answer.p_not_worse:.2g}). Next: about "
        f"{counted(answer.rows_to_decide, 'example')} would decide it, if it stays as it is.{seen}"
    )
