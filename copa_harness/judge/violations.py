"""Violations: examples that are right as given and wrong in a form that should change nothing; how often, how surely.

The relation (metamorphic testing: Chen et al. 1998; for language models CheckList, Ribeiro et al. 2020): an example and
its changed forms deserve the same answer. Symbols: n = examples right as given that got an answer to at least one
changed form, k = those of them with a changed form that is answered wrongly or unusably; the rate is k / n. Forms of
one example are no independent evidence, so the example is the unit, and the interval is that of Clopper and Pearson
(1934), exact for n independent examples; where examples share groups, it reaches as far as that of `intervals` for
groups, too.

An answer that does not parse breaks the relation, and is told apart from a wrong one. A form without an answer (the
provider or the metric failed) says nothing: it counts in no rate, and too many of them make the gate an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from copa_harness.formatting import counted, number
from copa_harness.judge.explanations import interval_text, shortened
from copa_harness.judge.intervals import group_labels, mean_interval
from copa_harness.results import GateResult, Interval, Verdict

FormOutcome = Literal["held", "wrong", "unparsed", "no answer"]

BROKEN = ("wrong", "unparsed")
"""Outcomes that break the relation."""


@dataclass(frozen=True, slots=True)
class FormAnswer:
    """What became of one changed form of an example that is right as given.

    Attributes:
        example_id: The example.
        form: What was changed: `white_space`, `field_order`.
        outcome: Whether it was still right.
        said: The wrong answer, or the error.
    """

    example_id: str
    form: str
    outcome: FormOutcome
    said: str = ""


@dataclass(frozen=True, slots=True)
class Violations:
    """All changed forms of a run's right examples.

    Attributes:
        answers: One per example and form that changed something.
        forms: The forms asked for.
        n_right: Examples right as given.
        groups: Group by example id, where examples share one.
        smallest: The smallest change that breaks the relation, in words; "" without any.
    """

    answers: tuple[FormAnswer, ...]
    forms: tuple[str, ...]
    n_right: int
    groups: Mapping[str, str] | None = None
    smallest: str = ""

    @property
    def broken(self) -> dict[str, bool]:
        """Whether any form of an example breaks the relation, by example id; examples with no answer are left out."""
        found: dict[str, bool] = {}
        for answer in self.answers:
            if answer.outcome != "no answer":
                found[answer.example_id] = found.get(answer.example_id, False) or answer.outcome in BROKEN
        return found

    @property
    def rate(self) -> float:
        """Share of the examples whose relation is broken; nan without any."""
        broken = self.broken
        return sum(broken.values()) / len(broken) if broken else float("nan")

    def interval(self, *, level: float = 0.95, seed: int = 0) -> Interval:
        """Around the rate."""
        broken = self.broken
        labels = group_labels(list(broken), self.groups)
        exact = exact_interval(sum(broken.values()), len(broken), level=level)
        if labels is None:
            return exact
        grouped = mean_interval([float(one) for one in broken.values()], level=level, seed=seed, groups=labels)
        # That for groups is approximate: one pair among many examples would make it narrower than the exact one.
        return Interval(min(exact.low, grouped.low), max(exact.high, grouped.high), level, grouped.method)

    def outcomes(self, form: str) -> Counter[str]:
        """How many answers of a form had which outcome."""
        return Counter(answer.outcome for answer in self.answers if answer.form == form)

    def by_form(self) -> str:
        """`white_space 1 of 12, field_order 2 of 12 (1 unparsed)`, and which forms change nothing."""
        parts = []
        for form in self.forms:
            found = self.outcomes(form)
            n, n_broken = found.total() - found["no answer"], sum(found[name] for name in BROKEN)
            apart = [f"{found[name]} {name}" for name in ("unparsed", "no answer") if found[name]]
            text = f"{form} {n_broken} of {n}" if found else f"{form} changes nothing here"
            parts.append(text + (f" ({', '.join(apart)})" if apart else ""))
        return ", ".join(parts)


def exact_interval(k: int, n: int, *, level: float = 0.95) -> Interval:
    """Clopper and Pearson's interval of a share: at least at its level whatever the share.

    Args:
        k: how many of `n`.
        n: how many were tried; 0 gives 0..1.
        level: two-sided confidence, 0 < level < 1.

    Raises:
        ValueError: for `k` outside 0..n.

    Source: Clopper & Pearson (1934), Biometrika 26:404; quantiles of the beta distribution.
    """
    if not 0 <= k <= n:
        raise ValueError(f"got {k} of {n}; expected 0 <= k <= n")
    if n == 0:
        return Interval(0.0, 1.0, level, "none")
    from scipy.stats import beta

    tail = (1 - level) / 2
    low = 0.0 if k == 0 else float(beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k == n else float(beta.ppf(1 - tail, k + 1, n - k))
    return Interval(low, high, level, "clopper-pearson")


def max_violation_rate(
    violations: Violations, most: float, *, max_error_rate: float = 0.0, seed: int = 0
) -> GateResult:
    """The gate on the share of right examples that a change makes wrong; about the number measured, like `min_score`.

    Args:
        violations: What was measured.
        most: The largest share that is acceptable.
        max_error_rate: The largest share of forms without an answer that is.
        seed: of the bootstrap, where examples share groups.
    """
    gate = f"max_violation_rate={most:g}"
    broken, lost = violations.broken, [one for one in violations.answers if one.outcome == "no answer"]
    n, k = len(broken), sum(broken.values())
    details: dict[str, Any] = {
        "n": n,
        "n_violated": k,
        "n_right": violations.n_right,
        "by_form": {form: dict(violations.outcomes(form)) for form in violations.forms},
        "smallest": violations.smallest,
    }
    if not violations.n_right:
        return GateResult(gate, Verdict.UNDECIDED, "no example is right as given, so none can be made wrong.", details)
    if not violations.answers:
        message = (
            f"{', '.join(violations.forms)} change nothing in any of {counted(violations.n_right, 'right example')}; "
            "nothing was measured. Next: name others in perturbations=[...]."
        )
        return GateResult(gate, Verdict.ERROR, message, details)
    if len(lost) > max_error_rate * len(violations.answers) + 1e-9:
        message = (
            f"{len(lost)} of {counted(len(violations.answers), 'changed form')} got no answer (first: "
            f"{lost[0].example_id}, {lost[0].form}: {shortened(lost[0].said)}). They are failures, not violations. "
            "Next: mend the cause and run again (answers are cached and free), or allow a share: max_error_rate."
        )
        return GateResult(gate, Verdict.ERROR, message, details)
    if not n:
        return GateResult(gate, Verdict.UNDECIDED, "no changed form got an answer, so nothing was measured.", details)
    interval = violations.interval(seed=seed)
    details |= {"rate": violations.rate, "low": interval.low, "high": interval.high, "level": interval.level}
    measured = (
        f"{k} of {counted(n, 'example')} right as given {'is' if k == 1 else 'are'} not when changed "
        f"({interval_text(interval)}): {violations.by_form()}"
    )
    if violations.rate <= most + 1e-9:
        beyond = f" The interval reaches above {most:g}." if interval.high > most else ""
        return GateResult(gate, Verdict.PASS, f"got {number(violations.rate)}: {measured}.{beyond}", details)
    noise = "Within noise: the interval reaches" if interval.low <= most else "Not noise: the interval begins above"
    smallest = f" The smallest change that does it: {violations.smallest}." if violations.smallest else ""
    message = (
        f"got {number(violations.rate)}, expected at most {most:g}: {measured}.{smallest} {noise} {most:g}. Next: have "
        "the search count the worst form of every row (robust=True), or say in the instruction what does not matter."
    )
    return GateResult(gate, Verdict.FAIL, message, details)
