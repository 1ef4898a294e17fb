"""Many gates in one suite: the chance of a false alarm somewhere, kept at alpha by Holm's correction.

With 20 gates at 5 % each, an unchanged suite alarms in up to 64 % of runs. Holm (1979, Scand. J. Stat. 6:65) keeps the
chance of any false alarm at alpha, whatever the dependence between gates, and finds all that Bonferroni's alpha / k
finds. A failing test must speak while it runs, when later gates are unknown: it is held to alpha / k
(`Gates.n_comparisons`), and the suite's end adds what Holm finds beyond that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from copa_harness.results import GateResult, Verdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """One regression gate of a suite, before and after the correction.

    Attributes:
        name: where it was (the test's id, or task and strategy).
        p_value: of "it did not drop by more than allowed", on its own, 0..1.
        adjusted: Holm's adjusted p-value over the suite; at most alpha means failed.
        verdict: the gate's own verdict.
        corrected: the verdict over the suite.
    """

    name: str
    p_value: float
    adjusted: float
    verdict: Verdict
    corrected: Verdict


def holm_adjusted(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjusted p-values, in the order given.

    Raises:
        ValueError: for a p-value outside 0..1.

    Source: Holm (1979); equal to `statsmodels.stats.multitest.multipletests(method="holm")`.
    """
    if any(math.isnan(p) or not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"got p-values {[p for p in p_values if not 0 <= p <= 1]}; expected numbers in 0..1")
    adjusted = [0.0] * len(p_values)
    greatest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        greatest = max(greatest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = greatest
    return tuple(adjusted)


def holm_over_suite(gates: Iterable[tuple[str, GateResult]], *, alpha: float = 0.05) -> tuple[Comparison, ...]:
    """Correct the regression gates of a suite for being many.

    Args:
        gates: (where, answer) of every gate; those without a regression test in their details are left out.
        alpha: chance of any false alarm in the suite.

    Returns:
        One entry per regression gate in the order given. `corrected` is FAIL exactly when the adjusted p-value is at
        most alpha; a gate that failed on its own only becomes UNDECIDED.
    """
    tested = [
        (name, gate, max(float(gate.details["p_worse"]), float(gate.details["p_any_drop"])))
        for name, gate in gates
        if gate.details.get("p_worse") is not None and gate.details.get("p_any_drop") is not None
    ]
    adjusted = holm_adjusted([p_value for _, _, p_value in tested])
    answers = []
    for (name, gate, p_value), after in zip(tested, adjusted, strict=True):
        corrected = gate.verdict
        if after <= alpha:
            corrected = Verdict.FAIL
        elif gate.verdict is Verdict.FAIL:
            corrected = Verdict.UNDECIDED
        answers.append(Comparison(name, p_value, after, gate.verdict, corrected))
    return tuple(answers)


def suite_text(comparisons: Sequence[Comparison], *, alpha: float = 0.05) -> str:
    """What the correction changed, in words; "" when there are fewer than two comparisons."""
    if len(comparisons) < 2:
        return ""
    changed = [row for row in comparisons if row.verdict is not row.corrected]
    failed = sum(row.corrected is Verdict.FAIL for row in comparisons)
    lines = [
        f"{len(comparisons)} regression gates, Holm-corrected so that an unchanged suite alarms in at most "
        f"{100 * alpha:g} % of runs: {failed} failed."
    ]
    for row in changed:
        reason = (
            "fails over the suite (Holm finds more than alpha / k does)"
            if row.corrected is Verdict.FAIL
            else "fails on its own, but not over the suite: one such among so many may be chance. Next: add examples"
        )
        lines.append(f"  {row.name}: {reason}; p = {row.p_value:.2g}, adjusted {row.adjusted:.2g}.")
    return "\n".join(lines)
