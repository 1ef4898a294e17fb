"""The paired gates: no drop below an accepted baseline (`max_regression`), a gain over another result (`better_than`).

First whether the two sides may be compared at all (same data, split and metric), then the test of `noninferiority`,
then the sentence that says what was found and what to do. A run whose every request, weight and decoding setting is
the baseline's, answered again the same way, has nothing to test and passes. `better_than` tests without a margin: a
pass needs the gain to be shown, not just measured; a loss that is shown fails; anything between is undecided.

Gates of one suite that ask the same question share the error rate of failing (`JudgedRun.families`): with k of them
each fails at alpha / k. A suite fails under Holm's correction exactly when its smallest p-value does so, and the later
steps of Holm's would only make a gate's verdict depend on which others were run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from copa_harness.formatting import counted, number, probability
from copa_harness.judge.explanations import interval_text
from copa_harness.judge.noninferiority import Noninferiority, noninferiority
from copa_harness.judge.paired_tests import GATE_LEVEL, PairedScores, pair_up, paired_difference, scores_by_id
from copa_harness.judge.ranking import holm_adjusted
from copa_harness.judge.violations import Violations
from copa_harness.results import EvaluationResult, GateResult, Usage, Verdict

COMPARED = ("data", "split", "metric")
"""Fingerprints that must agree with the baseline's before scores may be compared."""


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
        slices: slice by example id; each must not get worse on its own. Empty without slices.
        repeats: scores of every repeat by example id; needed by `min_pass_all`.
        baseline: the accepted earlier run that `max_regression` compares with; None when there is none.
        anchor: the first accepted run, which accepting later ones does not move; None when there is none.
        n_looks: how many runs were accepted since.
        opponent: what `better_than` names; None when there is no such result.
        calls: model calls charged to the run; needed by `max_calls`.
        usage: what the run spent; needed by `max_tokens`, `max_usd` and `max_seconds`.
        violations: what changed forms of its examples were answered; needed by `max_violation_rate`.
        is_identical: whether every request, weight and decoding setting is the baseline's, and the answers are
            deterministic or replayed.
        families: by the name of a paired gate, how many gates of its suite ask the same question; 1 where not told.
    """

    evaluation: EvaluationResult | None
    n_expected: int | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, str] | None = None
    slices: Mapping[str, str] = field(default_factory=dict)
    repeats: Mapping[str, Sequence[float | None]] | None = None
    baseline: Reference | None = None
    anchor: Reference | None = None
    n_looks: int = 0
    opponent: Reference | None = None
    calls: float | None = None
    usage: Usage | None = None
    violations: Violations | None = None
    is_identical: bool = False
    families: Mapping[str, int] = field(default_factory=dict)

    def paired_with(self, reference: Reference) -> PairedScores:
        """Scores of the reference and of this run, for the examples in common."""
        scores = {} if self.evaluation is None else scores_by_id(self.evaluation)
        return pair_up(reference.scores, scores, groups=self.groups)


BLESS = "run it once with --copa-bless and commit the file it writes"
"""How a run is accepted as baseline, as a clause."""


def max_regression(
    run: JudgedRun, *, margin: float, alpha: float, bless: str = BLESS, alpha_fail: float | None = None, seed: int = 0
) -> GateResult:
    """Hold a run to "no drop of more than `margin` below the baseline".

    Args:
        run: a complete one; without a baseline it is not comparable, and the answer says how to make one.
        margin: the largest acceptable drop, 0..1.
        alpha: error rate of a pass, and of a failure of all gates of the suite together.
        bless: how to accept this run as baseline, a clause for the message.
        alpha_fail: error rate of a failure; by default this gate's share of `alpha`.
        seed: of the resampling methods.
    """
    gate, baseline = f"max_regression={margin:g}", run.baseline
    if baseline is None:
        message = f"there is no baseline to compare with yet. Next: if these scores are acceptable, {bless}."
        return GateResult(gate, Verdict.NOT_COMPARABLE, message, {"baseline": None})
    named = f"baseline {_named(baseline)}"
    pairs = run.paired_with(baseline)
    if changed_parts(baseline, run.fingerprints) or not pairs.ids:
        next_step = f"if the change is intended, {bless}; otherwise restore what changed"
        return _not_comparable(gate, named, run, baseline, next_step=next_step, seed=seed)
    if run.is_identical:
        return _identical(gate, named, pairs)
    family = run.families.get("max_regression", 1)
    failing = alpha / family if alpha_fail is None else alpha_fail
    answer = noninferiority(pairs, margin=margin, alpha=alpha, alpha_fail=failing, seed=seed)
    unpaired = pairs.n_only_before + pairs.n_only_after
    missing = f" {counted(unpaired, 'example')} scored on one side only could not be compared." if unpaired else ""
    meaning = _meaning(answer, failing=failing, shared=_shared(family, "regression", alpha), bless=bless)
    message = f"{_measured(answer, named)} {meaning}{missing}"
    numbers = gate_numbers(answer, pairs) | {"family": family}
    result = GateResult(gate, answer.verdict, message, numbers)
    result = _by_slice(result, run, pairs, margin=margin, failing=failing, seed=seed)
    return _anchored(result, run, margin=margin, failing=failing, seed=seed)


def _by_slice(
    result: GateResult, run: JudgedRun, pairs: PairedScores, *, margin: float, failing: float, seed: int
) -> GateResult:
    """The same, failed where a slice of its own fell by the margin or more, and not by chance.

    Slices are a family of their own: Holm's correction over them, at the error rate that the gate fails at.
    """
    names = sorted({run.slices[key] for key in pairs.ids if key in run.slices})
    found = {}
    for name in names:
        here = [row for row in zip(pairs.ids, pairs.before, pairs.after, strict=True) if run.slices.get(row[0]) == name]
        of_slice = replace(pairs, ids=[r[0] for r in here], before=[r[1] for r in here], after=[r[2] for r in here])
        found[name] = paired_difference(of_slice, level=GATE_LEVEL, seed=seed)
    p_values = [one.p_one_sided if one.difference < 0 else 1.0 for one in found.values()]
    adjusted = dict(zip(names, holm_adjusted(p_values), strict=True))
    fell = [name for name in names if adjusted[name] <= failing and found[name].difference <= -margin + 1e-9]
    told = {
        name: {"difference": one.difference, "n": one.n, "p_any_drop": adjusted[name]} for name, one in found.items()
    }
    details = {**result.details, "slices": told} if told else result.details
    if not fell:
        return replace(result, details=details)
    said = "; ".join(
        f"{name!r}: {number(found[name].difference, signed=True)}, {found[name].n_better} better, "
        f"{found[name].n_worse} worse of {found[name].n} ({probability(adjusted[name])}, corrected for "
        f"{counted(len(names), 'slice')})"
        for name in fell
    )
    worse = [key for key in result.details["worse"] if run.slices.get(key) in fell]
    message = f"Worse in {said}. Next: look at the examples that got worse there. All slices together: "
    return GateResult(result.gate, Verdict.FAIL, message + result.message, {**details, "worse": worse})


def _anchored(result: GateResult, run: JudgedRun, *, margin: float, failing: float, seed: int) -> GateResult:
    """The same, failed where this run lost something and all accepted changes together lost what none of them may.

    The rows are those of every look before, so evidence of several looks cannot be multiplied: look t of them all has
    failing / (t (t + 1)) of the error rate, which is valid however they depend on one another and however many follow.
    """
    anchor = run.anchor
    if anchor is None or result.verdict is Verdict.FAIL or not run.n_looks or result.details["difference"] >= 0:
        return result
    pairs, level = run.paired_with(anchor), failing / ((run.n_looks + 1) * (run.n_looks + 2))
    if changed_parts(anchor, run.fingerprints) or not pairs.ids:
        return result
    since = paired_difference(pairs, level=GATE_LEVEL, seed=seed)
    if since.p_one_sided > level or since.difference > -margin + 1e-9:
        return result
    message = (
        f"Little by little: {number(since.difference, signed=True)} since {_named(anchor)}, over "
        f"{counted(run.n_looks, 'accepted change')} and this one ({since.n_better} better, {since.n_worse} worse; "
        f"{probability(since.p_one_sided)}, held to {level:.2g}). Next: look at what became worse since then (copa "
        f"baseline diff); if it is all intended, delete that file in baselines/history. This change alone: "
    )
    details = {**result.details, "since_anchor": since.difference, "p_since_anchor": since.p_one_sided}
    return GateResult(result.gate, Verdict.FAIL, f"{message}{result.message}", details)


def better_than(
    run: JudgedRun, *, name: str, alpha: float, alpha_fail: float | None = None, seed: int = 0
) -> GateResult:
    """Hold a run to "better than its opponent".

    Args:
        run: a complete one; without an opponent it is undecided.
        name: how the gate calls the opponent.
        alpha: error rate of a pass, and of a failure of all such gates of the suite together.
        alpha_fail: error rate of a failure; by default this gate's share of `alpha`.
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
    family = run.families.get("better_than", 1)
    failing = alpha / family if alpha_fail is None else alpha_fail
    answer = noninferiority(pairs, margin=0.0, alpha=alpha, alpha_fail=failing, seed=seed)
    if answer.verdict is Verdict.PASS and float(number(answer.paired.difference)) == 0:  # nobody takes it for a gain
        answer = replace(answer, verdict=Verdict.UNDECIDED)
    meaning = _meaning_of_better(answer, name, shared=_shared(family, "better_than", alpha))
    # The gain is what is tested here: a loss must not be counted as a regression gate of the suite.
    numbers: dict[str, Any] = gate_numbers(answer, pairs) | {"family": family}
    numbers["p_better"] = numbers.pop("p_not_worse")
    numbers["p_loss"] = numbers.pop("p_worse")
    numbers.pop("p_any_drop")
    return GateResult(gate, answer.verdict, f"{_measured(answer, _named(opponent))} {meaning}", numbers)


def changed_parts(baseline: Reference, fingerprints: Mapping[str, str]) -> list[str]:
    """Which of data, split and metric differ between a run and a baseline; parts unknown on one side are skipped."""
    return [
        part
        for part in COMPARED
        if part in fingerprints and part in baseline.fingerprints and fingerprints[part] != baseline.fingerprints[part]
    ]


def _named(reference: Reference) -> str:
    return reference.name + (f" ({reference.origin})" if reference.origin else "")


def _identical(gate: str, named: str, pairs: PairedScores) -> GateResult:
    n = len(pairs.ids)
    changes = [new - old for old, new in zip(pairs.before, pairs.after, strict=True)]
    better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    message = f"identical requests: prompts, weights and decoding of all {counted(n, 'example')} are those of {named}, "
    message += "so there is nothing to test."
    if better or worse:
        message += f" (The answers vary all the same: {counted(better + worse, 'example')} scored differently.)"
    numbers = {"difference": math.fsum(changes) / n, "n": n, "n_better": better, "n_worse": worse}
    return GateResult(gate, Verdict.PASS, message, {"identical": True, **numbers})


def _measured(answer: Noninferiority, named: str) -> str:
    paired = answer.paired
    in_groups = f" in {counted(paired.n_groups, 'group')}" if paired.n_groups else ""
    return (
        f"{number(paired.difference, signed=True)} against {named}: {paired.n_better} better, {paired.n_worse} worse "
        f"of {counted(paired.n, 'example')}{in_groups} ({interval_text(paired.interval, signed=True)})."
    )


def _shared(family: int, kind: str, alpha: float) -> str:
    """What a p-value of a failure is held to, as a clause, where the gate is one of several."""
    return "" if family == 1 else f", held to {alpha / family:.2g}: one of {family} {kind} gates of this suite"


def _meaning(answer: Noninferiority, *, failing: float, shared: str, bless: str) -> str:
    """What the verdict means and what to do, after the numbers."""
    margin, any_drop = answer.margin, probability(answer.p_any_drop)
    if answer.verdict is Verdict.PASS:
        if margin == 0:
            return f"A gain is shown ({probability(answer.p_not_worse)}; {answer.method})."
        return f"A drop of {margin:g} or more is ruled out ({probability(answer.p_not_worse)}; {answer.method})."
    if answer.verdict is Verdict.FAIL:
        allowed = f", and it is no smaller than the {margin:g} allowed" if margin else ""
        proven = margin > 0 and answer.p_worse <= failing
        beyond = f" Proven beyond the margin ({probability(answer.p_worse)})." if proven else ""
        return (
            f"The drop is not chance ({any_drop}{shared}){allowed}.{beyond} Next: look at the examples that got worse "
            f"(the report's page has each beside its answer before); if this loss is acceptable, {bless}."
        )
    if margin == 0:
        return (
            f"Neither a drop nor a gain is shown. {_visible(answer, 'drop')} Next: allow a small drop "
            f"(max_regression=0.05), for a margin of 0 is passed only by an improvement."
        )
    confidence = f"{100 * answer.paired.interval.level / 2 + 50:g} %"
    said = f"At most {number(answer.most_lost)} can have been lost ({confidence})"
    if answer.rows_to_decide is None:
        said += "; no number of examples one would collect decides it. Next: allow a larger drop."
    else:
        rows = counted(answer.rows_to_decide, "example")
        said += (
            f", which does not rule out a drop of {margin:g}; about {rows} would decide it, if nothing changed. Next: "
            "add test examples, or allow a larger drop; as it is, it counts as no failure (undecided_fails=True makes "
            "it one)."
        )
    if answer.p_any_drop <= failing:
        said = f"It did drop ({any_drop}), by less than the {margin:g} allowed as far as measured. {said}"
    return said


def _visible(answer: Noninferiority, what: str) -> str:
    smallest = answer.smallest_visible_drop
    if smallest is None or math.isinf(smallest):
        return f"So few examples cannot show any {what}."
    return f"So many examples show a {what} of {number(smallest)} in 80 % of runs."


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
        parts = "the " + " and the ".join(changed) + " changed"
    else:
        parts = "no example with a score is in both this run and the one compared with: the test split changed"
    message = f"{parts} since {named}, so the two cannot be compared."
    if "data" in changed or "split" in changed:
        n_before, n_after = (len(pairs.ids) + only for only in (pairs.n_only_before, pairs.n_only_after))
        message += f" {counted(n_before, 'example')} then, {n_after:,} now, {len(pairs.ids):,} in common."
    if pairs.ids and "metric" not in changed:
        common = paired_difference(pairs, level=GATE_LEVEL, seed=seed)
        details |= {
            "difference_in_common": common.difference,
            "low_in_common": common.interval.low,
            "high_in_common": common.interval.high,
        }
        message += (
            f" For orientation, and not judged: {common.n_better} better, {common.n_worse} worse of the "
            f"{counted(common.n, 'example')} in common"
        )
        if common.n_better or common.n_worse:
            message += (
                f", {number(common.difference, signed=True)} ({interval_text(common.interval, signed=True)}, "
                f"{common.method}, one-sided {probability(common.p_one_sided)})"
            )
        message += "."
    message += f" Next: {next_step}."
    return GateResult(gate, Verdict.NOT_COMPARABLE, message, details)


def gate_numbers(answer: Noninferiority, pairs: PairedScores) -> dict[str, Any]:
    """The numbers behind a paired gate, for its details; examples that got worse come worst first."""
    paired = answer.paired
    smallest = math.inf if answer.smallest_visible_drop is None else answer.smallest_visible_drop
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
        "decided_by": answer.method,
        "n_groups": paired.n_groups,
        "rows_to_decide": answer.rows_to_decide,
        "smallest_visible_drop": None if math.isinf(smallest) else smallest,
    }


def _meaning_of_better(answer: Noninferiority, name: str, *, shared: str) -> str:
    if answer.verdict is Verdict.PASS:
        return f"The gain is shown ({probability(answer.p_not_worse)}; {answer.method})."
    if answer.verdict is Verdict.FAIL:
        return (
            f"It is worse, and not by chance ({probability(answer.p_any_drop)}{shared}). Next: use {name}, or look at "
            f"the examples that got worse."
        )
    if float(number(answer.paired.difference)) <= 0:
        return (
            f"No gain was measured. Next: use {name}, which is no worse and already there, or give the optimizer more "
            f"budget."
        )
    return (
        f"The gain may be chance ({probability(answer.p_not_worse)}). {_visible(answer, 'gain')} Next: more test "
        f"examples, or more budget for the optimizer."
    )
