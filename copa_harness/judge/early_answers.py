"""What a sequential run found, saved and cost, in numbers and in words. Knows nothing of how it was watched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from copa_harness.judge.gates import overall
from copa_harness.judge.messages import counted, number
from copa_harness.judge.power import SequentialPower
from copa_harness.judge.sequential import RegressionMonitor
from copa_harness.results import GateResult, Verdict


@dataclass(frozen=True, slots=True)
class SequentialAnswer:
    """What a sequential run found, and what it saved and cost.

    Attributes:
        gates: the answers of the gates on scores; spending gates are judged apart.
        n_used: examples evaluated.
        n_total: examples in the split.
        usd_saved: dollars the examples not evaluated would have cost; None when no price was seen.
        power: what stopping early costs a regression gate; None without one.
        visible_drop: the true drop `power` is about, 0..1; None without.
    """

    gates: tuple[GateResult, ...]
    n_used: int
    n_total: int
    usd_saved: float | None = None
    power: SequentialPower | None = None
    visible_drop: float | None = None

    @property
    def verdict(self) -> Verdict:
        """All gates together."""
        return overall(self.gates)

    @property
    def n_saved(self) -> int:
        """Examples that were not needed."""
        return self.n_total - self.n_used

    def text(self) -> str:
        """`stopped after 131 of 300 examples: 169 saved (56 %), about $0.34`, and what it costs in power."""
        if self.n_saved:
            saved = f"stopped after {self.n_used:,} of {counted(self.n_total, 'example')}: {self.n_saved:,} saved"
            saved += f" ({100 * self.n_saved / self.n_total:.0f} %)"
            if self.usd_saved:
                saved += f", about ${self.usd_saved:,.2g}"
        else:
            saved = f"all {counted(self.n_total, 'example')} were needed, nothing saved"
        if self.power is None or self.visible_drop is None:
            return saved
        return (
            f"{saved}. What stopping early costs: a true drop of {number(self.visible_drop)}, found in "
            f"{100 * self.power.fixed:.0f} % of runs that look once, at all {self.n_total:,}, is found in "
            f"{100 * self.power.sequential:.0f} % this way"
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers, for a report."""
        return {
            "n_used": self.n_used, "n_total": self.n_total, "usd_saved": self.usd_saved,
            "visible_drop": self.visible_drop,
            "power_fixed": None if self.power is None else self.power.fixed,
            "power_sequential": None if self.power is None else self.power.sequential,
            "mean_rows": None if self.power is None else self.power.mean_rows,
        }  # fmt: skip


def stopped_early(
    answer: GateResult, monitor: RegressionMonitor, *, n_used: int, n_total: int, name: str | None
) -> GateResult:
    """The answer of a paired gate that was decided while looking."""
    assert monitor.verdict is not None
    p_not_worse, p_worse = monitor.p_values
    failed = monitor.verdict is Verdict.FAIL
    p_value = p_worse if failed else p_not_worse
    details = after_looking(answer.details, monitor) | {
        "n_used": n_used, "n_total": n_total, "p_sequential": p_value, "alpha": monitor.alpha,
    }  # fmt: skip
    looked = "exact McNemar test with error spending" if monitor.is_exact else "betting e-process"
    against = "a drop" if monitor.margin == 0 else f"a drop of more than {monitor.margin:g}"
    found = f"{against} is shown" if failed else f"{against} is ruled out" if monitor.margin else "a gain is shown"
    so_far = number(details.get("difference"), signed=True)
    message = (
        f"{found} after {n_used:,} of {counted(n_total, 'example')} ({looked}, p = {p_value:.2g}, valid "
        f"however often it looks). "
    )
    if n_used == n_total:
        message += f"The difference is {so_far}."
    else:
        # A run is stopped by a streak, so what it shows then is too extreme on average.
        message += f"The difference so far is {so_far}; runs are stopped when it looks large, so it tends to shrink."
    if failed:
        message += (
            f" Next: {'use ' + name + ', or ' if answer.gate.startswith('better_than') and name else ''}look at the "
            f"worst examples; for the exact size of the drop run without --copa-sequential."
        )
    return GateResult(answer.gate, monitor.verdict, message, details)


_FIXED_P = ("p_value", "p_worse", "p_not_worse", "p_any_drop", "p_better", "p_loss")


def without_p_values(details: Mapping[str, Any]) -> dict[str, Any]:
    """The details of a paired gate that was cut off: p-values of the rows seen hold for no moment one chose to stop."""
    return {name: value for name, value in details.items() if name not in _FIXED_P}


def after_looking(details: Mapping[str, Any], monitor: RegressionMonitor) -> dict[str, Any]:
    """The details of a paired gate with p-values that hold for all looks together, as the suite's correction needs.

    Args:
        details: of the test of the rows seen, as if they had been looked at once.
        monitor: what looked.
    """
    not_worse, worse = monitor.p_values
    if not monitor.is_exact:
        # Either the looks or the last test may speak: twice the smaller p-value holds for both (Bonferroni).
        last_worse = max(float(details.get("p_worse", 1.0)), float(details.get("p_any_drop", 1.0)))
        last_better = float(details.get("p_not_worse", details.get("p_better", 1.0)))
        seen_all = monitor.verdict is None
        worse = min(1.0, 2 * min(worse, last_worse if seen_all else 1.0))
        not_worse = min(1.0, 2 * min(not_worse, last_better if seen_all else 1.0))
    found = without_p_values(details)
    if "p_better" in details:
        return found | {"p_better": not_worse, "p_loss": worse}
    return found | {"p_worse": worse, "p_any_drop": worse, "p_not_worse": not_worse}
