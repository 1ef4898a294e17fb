"""Gates: rules a run is held to, and their answers in words a person can act on.

A gate answers pass, fail, undecided, not comparable or error; `overall` says which of them wins. `min_score` is about
the number measured (a plain assert would decide alike); `max_regression` and `better_than` are paired tests
(`paired_gates`). An evaluation that was cut short has no score and fails nothing: it is undecided. Gates on what a run
spent (calls, tokens, dollars, seconds, dollars per answer) pass or fail, since spending is counted and not estimated;
they are undecided only where a price is unknown. An evaluation without examples, with more failures than allowed, or
without a single answer that parses is an error whatever its gates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from copa_harness.formatting import counted, dollars, number
from copa_harness.judge.explanations import interval_text, shortened, unparsed_text, what_makes_answers_parse
from copa_harness.judge.flaky import flaky_report, min_pass_all
from copa_harness.judge.intervals import group_labels, mean_interval, rows_to_settle
from copa_harness.judge.options import Gates
from copa_harness.judge.paired_gates import BLESS, JudgedRun, better_than, max_regression
from copa_harness.judge.violations import max_violation_rate
from copa_harness.results import EvaluationResult, GateResult, Usage, Verdict

_ROUNDING = 1e-9


def judge(
    run: JudgedRun, gates: Gates, *, pass_score: float = 1.0, bless: str = BLESS, seed: int = 0
) -> tuple[GateResult, ...]:
    """Hold a run to its gates.

    Args:
        run: scores, what they are compared with, what was spent.
        gates: the rules.
        pass_score: least score that counts as passed by `min_pass_all`, 0..1.
        bless: how to accept this run as baseline, for the messages.
        seed: of the resampling methods.

    Returns:
        One answer per active gate, in the order errors, score, regression, opponent, repeats, violations, spending.
        Empty evaluations are errors, and so are those in which no answer parses.

    Raises:
        ValueError: `max_calls` is set without `calls`, another spending gate without `usage`, or `max_violation_rate`
            without `violations`.
    """
    answers: list[GateResult] = []
    evaluation = run.evaluation
    complete = evaluation is not None and (run.n_expected is None or evaluation.n >= run.n_expected)
    if evaluation is None or not complete:
        answers.append(_truncated(evaluation, run.n_expected))
    if evaluation is not None:
        answers.append(_error_rate(evaluation, gates.max_error_rate))
        answers.extend(answers_parse(evaluation))
    if evaluation is not None and complete:
        alpha = gates.alpha
        if gates.min_score is not None:
            answers.append(_min_score(evaluation, gates.min_score, groups=run.groups, seed=seed))
        if gates.max_regression is not None:
            margin = gates.max_regression
            answers.append(max_regression(run, margin=margin, alpha=alpha, bless=bless, seed=seed))
        if gates.better_than is not None:
            answers.append(better_than(run, name=gates.better_than, alpha=alpha, seed=seed))
        if gates.min_pass_all is not None:
            single = {row.example_id: (row.score,) for row in evaluation.results}
            report = flaky_report(run.repeats or single, pass_score=pass_score)
            answers.append(min_pass_all(report, gates.min_pass_all))
        if gates.max_violation_rate is not None:
            if run.violations is None:
                raise ValueError("got max_violation_rate without violations; expected what changed forms were answered")
            most, errors = gates.max_violation_rate, gates.max_error_rate
            answers.append(max_violation_rate(run.violations, most, max_error_rate=errors, seed=seed))
    answers.extend(judge_spending(run, gates))
    return tuple(answers)


_RANK = (Verdict.ERROR, Verdict.FAIL, Verdict.NOT_COMPARABLE, Verdict.UNDECIDED, Verdict.PASS)


def overall(results: Iterable[GateResult]) -> Verdict:
    """The verdict of a run: the gravest of its gates' (error > fail > not comparable > undecided > pass)."""
    return min((result.verdict for result in results), key=_RANK.index, default=Verdict.PASS)


def is_failure(verdict: Verdict, *, undecided_fails: bool) -> bool:
    """Whether a verdict fails the test; undecided and not comparable do only when the setting says so."""
    if verdict in {Verdict.UNDECIDED, Verdict.NOT_COMPARABLE}:
        return undecided_fails
    return verdict is not Verdict.PASS


def _truncated(evaluation: EvaluationResult | None, n_expected: int | None) -> GateResult:
    done = evaluation.n if evaluation is not None else 0
    of = f" after {done} of {counted(n_expected, 'example')}" if n_expected is not None else ""
    message = (
        f"budget exhausted: the evaluation stopped{of}, so there is no score to judge. "
        f"Next: raise the budget (--copa-budget=medium or calls=N) and run again; what was answered is cached and free."
    )
    return GateResult("completed", Verdict.UNDECIDED, message, {"n": done, "n_expected": n_expected})


def _error_rate(evaluation: EvaluationResult, most: float) -> GateResult:
    gate = f"max_error_rate={most:g}"
    details = {"n": evaluation.n, "n_failed": evaluation.n_failed}
    if not evaluation.n:
        message = (
            f"the {evaluation.split} split has no examples, so nothing was measured. Next: give the task examples."
        )
        return GateResult(gate, Verdict.ERROR, message, details)
    failed = [row for row in evaluation.results if row.score is None]
    rate = len(failed) / evaluation.n
    if rate <= most + _ROUNDING:
        extra = "" if not failed else f" ({100 * rate:.1f} %), within what is allowed"
        return GateResult(
            gate, Verdict.PASS, f"{len(failed)} of {evaluation.n} examples without a score{extra}.", details
        )
    kinds = []
    for outcome, words in (("provider_error", "got no answer from the model"), ("metric_error", "broke the metric")):
        rows = [row for row in failed if row.outcome == outcome]
        if rows:
            first = shortened(rows[0].error or "no message recorded")
            kinds.append(f"{len(rows)} {words} (first: {rows[0].example_id}: {first})")
    message = (
        f"{len(failed)} of {evaluation.n} examples have no score ({100 * rate:.1f} %, allowed {100 * most:g} %): "
        f"{'; '.join(kinds) or 'no reason recorded'}. They are failures, not wrong answers, and are in no mean. "
        f"Next: mend the cause and run again (what was answered is cached and free), or allow a share: max_error_rate."
    )
    return GateResult(gate, Verdict.ERROR, message, details)


def answers_parse(evaluation: EvaluationResult) -> tuple[GateResult, ...]:
    """An error if the model answered and not one answer parses: a score of 0 then measures nothing; else nothing."""
    if not evaluation.nothing_parses:
        return ()
    n_truncated = min(evaluation.usage.truncated_calls, evaluation.n_unparsed)
    message = (
        f"none of {counted(evaluation.n_unparsed, 'answer')} could be parsed, so this is no score of the task. They "
        f"look like {unparsed_text(evaluation.results)}. Next: {what_makes_answers_parse(n_truncated)}."
    )
    details = {"n": evaluation.n, "n_unparsed": evaluation.n_unparsed, "n_truncated": n_truncated}
    return (GateResult("answers parse", Verdict.ERROR, message, details),)


def _min_score(
    evaluation: EvaluationResult, least: float, *, groups: Mapping[str, str] | None, seed: int
) -> GateResult:
    gate = f"min_score={least:g}"
    n = evaluation.n - evaluation.n_failed
    if not n:
        return GateResult(gate, Verdict.UNDECIDED, "no example has a score, so there is nothing to compare.", {"n": 0})
    score, interval = evaluation.score, evaluation.interval
    labels = group_labels([row.example_id for row in evaluation.results if row.score is not None], groups)
    if labels is not None:
        interval = mean_interval(evaluation.scores, groups=labels, seed=seed)
    details = {"score": score, "n": n, "low": interval.low, "high": interval.high, "level": interval.level}
    measured = f"on {counted(n, evaluation.split + ' example')} ({interval_text(interval)})"
    if score >= least - _ROUNDING:
        message = f"got {number(score)}, expected at least {least:g}, {measured}."
        if interval.low < least:
            message += f" The interval reaches below {least:g}: on other examples it may fall short."
        return GateResult(gate, Verdict.PASS, message, details)
    message = f"got {number(score)}, expected at least {least:g} ({number(least - score)} short), {measured}."
    if interval.high >= least:
        rows = rows_to_settle(score, least)
        needed = "" if rows is None else f"; about {counted(max(rows, n + 1), 'example')} would settle it"
        message += (
            f" Within noise: the interval reaches {least:g}{needed}. Next: add test examples, look at the worst "
            f"ones, or set a threshold the program clears with room to spare."
        )
    else:
        message += (
            f" Not noise: the interval ends below {least:g}. Next: look at the worst examples, give the optimizer "
            f"more budget, or lower the threshold; about {number(interval.low)} is what this program reaches reliably."
        )
    return GateResult(gate, Verdict.FAIL, message, details)


def judge_spending(run: JudgedRun, gates: Gates) -> tuple[GateResult, ...]:
    """The answers of the spending gates that are set.

    Raises:
        ValueError: a gate is set and what it needs is not given.
    """
    answers: list[GateResult] = []
    calls, usage, evaluation = run.calls, run.usage, run.evaluation
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
        f"are unknown (at least {dollars(usage.usd)}). Next: bound tokens instead (max_tokens), or use a "
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
    got, allowed = dollars(cost), dollars(most)
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
        return dollars(value)
    return f"{value:,.0f} {unit}" if value >= 10 or value == int(value) else f"{value:,.2g} {unit}"
