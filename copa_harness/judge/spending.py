"""Gates on what a run spent: calls, tokens, dollars, seconds, and dollars per answer.

Spending is counted, not estimated, so these gates pass or fail; they are undecided only where a price is unknown.
Pure functions of records; knows nothing of files, models or pytest.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from copa_harness.judge.messages import counted
from copa_harness.results import EvaluationResult, GateResult, Usage, Verdict

if TYPE_CHECKING:
    from copa_harness.judge.gates import Gates


def judge_spending(
    gates: Gates,
    *,
    calls: float | None = None,
    usage: Usage | None = None,
    evaluation: EvaluationResult | None = None,
) -> tuple[GateResult, ...]:
    """The answers of the spending gates that are set.

    Args:
        gates: the rules.
        calls: calls charged to the run; needed by `max_calls`.
        usage: what the run spent; needed by `max_tokens`, `max_usd` and `max_seconds`.
        evaluation: the evaluation whose answers `max_cost_per_answer` prices.

    Raises:
        ValueError: a gate is set and what it needs is not given.
    """
    answers: list[GateResult] = []
    if gates.max_calls is not None:
        if calls is None:
            raise ValueError("got max_calls without calls; expected the number of calls charged to the run")
        answers.append(_max_calls(calls, gates.max_calls))
    for name, unit in (("max_tokens", "tokens"), ("max_usd", "dollars"), ("max_seconds", "seconds")):
        most = getattr(gates, name)
        if most is None:
            continue
        if usage is None:
            raise ValueError(f"got {name} without usage; expected what the run spent")
        if name == "max_usd" and usage.unpriced_calls:
            answers.append(_unpriced(f"{name}={most:g}", usage))
            continue
        spent = {"max_tokens": usage.tokens, "max_usd": usage.usd, "max_seconds": usage.wall_s}[name]
        answers.append(_at_most(name, float(spent), most, unit=unit))
    if gates.max_cost_per_answer is not None and evaluation is not None and evaluation.n:
        answers.append(_max_cost_per_answer(evaluation, gates.max_cost_per_answer))
    return tuple(answers)


def cost_per_answer(evaluation: EvaluationResult) -> float | None:
    """Dollars per example if every call were paid; None when no call was, or one has no known price.

    Replayed calls cost nothing now but would in production, so they are priced at the mean of the paid ones.
    """
    usage = evaluation.usage
    if usage.unpriced_calls or not usage.paid_calls or not evaluation.n:
        return None
    return usage.usd / usage.paid_calls * (usage.paid_calls + usage.cached_calls) / evaluation.n


def _max_calls(calls: float, most: float) -> GateResult:
    gate, details = f"max_calls={most:g}", {"calls": calls, "max_calls": most}
    if calls <= most:
        return GateResult(gate, Verdict.PASS, f"{calls:,g} calls of {most:,g} allowed.", details)
    message = (
        f"got {calls:,g} model calls, expected at most {most:,g} ({calls - most:,g} too many). Next: see the "
        f"table of phases for where they went; use a smaller budget (calls={most:g}), a shorter strategy, or raise "
        f"max_calls."
    )
    return GateResult(gate, Verdict.FAIL, message, details)


def _at_most(name: str, spent: float, most: float, *, unit: str) -> GateResult:
    gate, details = f"{name}={most:g}", {"spent": spent, "allowed": most}
    got, allowed = _amount(spent, unit), _amount(most, unit)
    if spent <= most:
        return GateResult(gate, Verdict.PASS, f"{got} of {allowed} allowed.", details)
    message = (
        f"got {got}, expected at most {allowed} ({_amount(spent - most, unit)} too many). Next: see the table of "
        f"phases for where they went; use a smaller budget or a shorter strategy, or raise {name}."
    )
    return GateResult(gate, Verdict.FAIL, message, details)


def _unpriced(gate: str, usage: Usage) -> GateResult:
    message = (
        f"{counted(usage.unpriced_calls, 'call')} of {usage.paid_calls:,} have no known price, so the dollars spent "
        f"are unknown (at least {_amount(usage.usd, 'dollars')}). Next: bound tokens instead (max_tokens), or use a "
        f"model whose price DSPy knows."
    )
    return GateResult(gate, Verdict.UNDECIDED, message, {"spent": usage.usd, "unpriced_calls": usage.unpriced_calls})


def _max_cost_per_answer(evaluation: EvaluationResult, most: float) -> GateResult:
    gate = f"max_cost_per_answer={most:g}"
    cost = cost_per_answer(evaluation)
    details = {"cost_per_answer": cost, "allowed": most, "n": evaluation.n}
    if cost is None:
        if evaluation.usage.unpriced_calls:
            return _unpriced(gate, evaluation.usage)
        message = (
            f"all {counted(evaluation.usage.cached_calls, 'call')} were answered from the cache, so the price of an "
            f"answer was not seen. Next: run once with an empty cache (another --copa-cache-dir) to measure it."
        )
        return GateResult(gate, Verdict.UNDECIDED, message, details)
    got, allowed = _amount(cost, "dollars"), _amount(most, "dollars")
    if cost <= most:
        return GateResult(gate, Verdict.PASS, f"{got} per answer of {allowed} allowed.", details)
    message = (
        f"got {got} per answer, expected at most {allowed}; {evaluation.usage.paid_calls:,} paid calls for "
        f"{counted(evaluation.n, 'answer')}. Next: fewer demonstrations or shorter instructions (each is paid for in "
        f"every prompt), a cheaper model, or raise max_cost_per_answer."
    )
    return GateResult(gate, Verdict.FAIL, message, details)


def _amount(value: float, unit: str) -> str:
    if unit == "dollars":
        digits = 2 if value >= 1 or value == 0 else min(8, 1 - math.floor(math.log10(value)))
        return f"${value:,.{digits}f}"
    return f"{value:,.0f} {unit}" if value >= 10 or value == int(value) else f"{value:,.2g} {unit}"
