"""What a sequential run found, saved and cost, in numbers and in words. Knows nothing of how it was watched."""

from __future__ import annotations

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
    details = dict(answer.details) | {
        "n_used": n_used, "n_total": n_total, "p_sequential": p_value, "alpha": monitor.alpha,
    }  # fmt: skip
    against = "a drop" if monitor.margin == 0 else f"a drop of more than {monitor.margin:g}"
    found = f"{against} is shown" if failed else f"{against} is ruled out" if monitor.margin else "a gain is shown"
    so_far = number(details.get("difference"), signed=True)
    message = (
        f"{found} after {n_used:,} of {counted(n_total, 'example')} (betting e-process, p = {p_value:.2g}, valid "
        f"however often it looks). The difference so far is {so_far}; having ended the run, it looks larger than it is."
    )
    if failed:
        message += (
            f" Next: {'use ' + name + ', or ' if answer.gate.startswith('better_than') and name else ''}look at the "
            f"worst examples; for the exact size of the drop run without --copa-sequential."
        )
    return GateResult(answer.gate, monitor.verdict, message, details)
