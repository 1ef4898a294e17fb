"""The gate `better_than`: this run beats another strategy or an accepted baseline, example by example.

A pass needs the gain to be shown, not just measured; a loss that is shown fails; anything between is undecided, with
the examples it would take and the smallest gain these could have shown. The tests are those of `noninferiority.py`
with no margin. Knows nothing of files, models or pytest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from copa_harness.judge.messages import counted, interval_text, number
from copa_harness.judge.noninferiority import Noninferiority, noninferiority
from copa_harness.judge.paired import pair_up, scores_by_id
from copa_harness.judge.regression import Reference, changed_parts, gate_numbers, in_groups, not_comparable
from copa_harness.results import EvaluationResult, GateResult, Verdict


def better_than(
    evaluation: EvaluationResult,
    rival: Reference | None,
    *,
    name: str,
    alpha: float,
    fingerprints: Mapping[str, str],
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
    note: str = "",
) -> GateResult:
    """Hold an evaluation to "better than `rival`".

    Args:
        evaluation: the complete test evaluation.
        rival: what it has to beat; None when there is no such result, which is undecided.
        name: how the gate calls it.
        alpha: error rate of either decision.
        fingerprints: of this run; data, split and metric have to agree with the rival's where both are known.
        seed: of the resampling methods.
        groups: group by example id, where examples share one.
        note: a sentence to put after the message.
    """
    gate = f"better_than={name}"
    if rival is None:
        message = (
            f"there is no result of {name!r} to compare with. Next: run that strategy on this task before this test "
            f"(same file, same model), or accept it as a baseline with --copa-bless."
        )
        return GateResult(gate, Verdict.UNDECIDED, message, {"rival": None})
    named = rival.name + (f" ({rival.origin})" if rival.origin else "")
    pairs = pair_up(rival.scores, scores_by_id(evaluation))
    changed = changed_parts(rival, fingerprints)
    if changed or not pairs.ids:
        next_step = f"run {name} again on what is tested now"
        return not_comparable(
            gate, named, changed, pairs, rival, fingerprints, next_step=next_step, seed=seed, groups=groups
        )
    answer = noninferiority(pairs, margin=0.0, alpha=alpha, seed=seed, groups=groups)
    paired = answer.paired
    measured = (
        f"got {number(paired.difference, signed=True)} against {named}, expected a gain; "
        f"{counted(paired.n, 'paired example')}{in_groups(paired)}, {paired.n_better} better, {paired.n_worse} worse, "
        f"{interval_text(paired.interval, signed=True)}, {paired.method} p = {paired.p_value:.2g}."
    )
    message = f"{measured} {_meaning(answer, name)}" + (f" {note}" if note else "")
    # The gain is what is tested here: a loss must not be counted as a regression gate of the suite.
    numbers: dict[str, Any] = gate_numbers(answer, pairs)
    numbers["p_better"] = numbers.pop("p_not_worse")
    numbers["p_loss"] = numbers.pop("p_worse")
    numbers.pop("p_any_drop")
    return GateResult(gate, answer.verdict, message, numbers)


def _meaning(answer: Noninferiority, name: str) -> str:
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
