"""What a person reads when a gate has answered: numbers, worst examples and what to do next.

Turns records into text for a terminal or a CI log.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from copa_harness.credentials import mask_text
from copa_harness.formatting import counted, number, visible
from copa_harness.results import EvaluationResult, ExampleResult, GateResult, Interval, Usage, Verdict

MAX_VALUE_CHARACTERS = 160
"""A field's value is cut beyond this; the report has it whole."""

_MARGIN = 8
"""Columns that pytest puts before every line of a failed assertion."""

_SIGN = {
    Verdict.PASS: "pass",
    Verdict.FAIL: "FAIL",
    Verdict.UNDECIDED: "undecided",
    Verdict.ERROR: "ERROR",
    Verdict.NOT_COMPARABLE: "not comparable",
}


def interval_text(interval: Interval, *, signed: bool = False) -> str:
    """`95 % interval 0.667 to 0.853`."""
    low, high = number(interval.low, signed=signed), number(interval.high, signed=signed)
    return f"{100 * interval.level:g} % interval {low} to {high}"


def score_line(evaluation: EvaluationResult) -> str:
    """`score 0.773 on 75 test examples (95 % interval 0.667 to 0.853), 2 unparsed`."""
    scored = evaluation.n - evaluation.n_failed
    if not scored:
        text = f"no score: none of {counted(evaluation.n, evaluation.split + ' example')} could be scored"
    else:
        text = (
            f"score {number(evaluation.score)} on {counted(scored, evaluation.split + ' example')} "
            f"({interval_text(evaluation.interval)})"
        )
    remarks = []
    if evaluation.n_unparsed:
        remarks.append(f"{counted(evaluation.n_unparsed, 'answer')} did not parse and counted as 0")
    for outcome, words in (("provider_error", "without an answer"), ("metric_error", "with a broken metric")):
        count = sum(row.outcome == outcome for row in evaluation.results)
        if count:
            remarks.append(f"{count} {words}, outside the mean")
    return "; ".join([text, *remarks])


def format_gates(results: Sequence[GateResult], *, width: int = 0) -> str:
    """One block per gate: its verdict, its rule and its message, wrapped and aligned."""
    columns = width or _columns()
    lines = []
    for result in results:
        head = f"{_SIGN[result.verdict]:<14}  {result.gate}: "
        lines.append(
            textwrap.fill(
                head + result.message,
                columns,
                subsequent_indent=" " * 16,
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    return "\n".join(lines)


def _filled(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _columns() -> int:
    return max(80, min(120, shutil.get_terminal_size((120, 24)).columns))


def format_examples(examples: Iterable[ExampleResult]) -> str:
    """The given examples with inputs, expected and predicted values, numbered."""
    lines = []
    for position, row in enumerate(examples, start=1):
        state = number(row.score) if row.score is not None else row.outcome.replace("_", " ")
        note = "" if row.outcome != "unparsed" else " (the answer did not parse)"
        lines.append(f"{position}. {row.example_id}  score {state}{note}")
        for label, values in (("inputs", row.inputs), ("expected", row.expected), ("predicted", row.predicted)):
            if values:
                lines.append(f"   {label:<9} {_fields(values)}")
        if row.error:
            lines.append(f"   {'error':<9} {shortened(row.error)}")
    return "\n".join(lines)


def format_failure(
    evaluation: EvaluationResult | None,
    gates: Sequence[GateResult] = (),
    *,
    title: str = "",
    n_worst: int = 3,
    hints: Sequence[str] = (),
) -> str:
    """The text of a failed assertion about an evaluation.

    Args:
        evaluation: what was measured; None when the evaluation did not finish.
        gates: the gates' answers; those that did not pass come first.
        title: what was judged (`iris, p -> w -> p, embedded`).
        n_worst: how many of the worst examples to show.
        hints: further lines of advice, after the examples.

    Returns:
        Several lines of plain text without a final newline, nothing in them that a terminal obeys.
    """
    width = _columns() - _MARGIN
    lines = [title] if title else []
    if evaluation is None:
        lines.append("no score: the evaluation did not finish")
    else:
        lines.append(_filled(f"{score_line(evaluation)}; model {evaluation.lm}", width))
    ordered = sorted(gates, key=lambda result: result.verdict is Verdict.PASS)
    if ordered:
        lines += ["", format_gates(ordered, width=width)]
    heading, shown = _to_show(evaluation, gates, n_worst)
    if shown:
        lines += ["", heading, textwrap.indent(format_examples(shown), "  ")]
    if hints:
        lines += ["", *(_filled(hint, width) for hint in hints)]
    return visible("\n".join(lines))


def _to_show(
    evaluation: EvaluationResult | None, gates: Sequence[GateResult], count: int
) -> tuple[str, tuple[ExampleResult, ...]]:
    """The examples that explain the failure: those that got worse, when a regression failed; else the worst."""
    if evaluation is None:
        return "", ()
    worse = [
        example_id
        for gate in gates
        if gate.verdict in {Verdict.FAIL, Verdict.UNDECIDED}
        for example_id in gate.details.get("worse", ())
    ]
    if worse:
        rows = {row.example_id: row for row in evaluation.results}
        shown = tuple(rows[example_id] for example_id in worse if example_id in rows)[:count]
        return f"{len(shown)} of {counted(len(worse), 'example')} that got worse than the baseline:", shown
    worst = evaluation.worst(count)
    n_below = sum(row.score is None or row.score < 1.0 for row in evaluation.results)
    return f"worst {len(worst)} of {counted(n_below, 'example')} below a full score:", worst


def unparsed_text(results: Iterable[ExampleResult]) -> str:
    """What the first answer that did not parse looks like, escaped; the error where none was kept."""
    unparsed = [row for row in results if row.outcome == "unparsed"]
    written = next((row.answer for row in unparsed if row.answer), None)
    if written is not None:
        return repr(written)
    return shortened(next((row.error for row in unparsed if row.error), "an empty answer"))


def truncated_text(usage: Usage) -> str:
    """How many answers reached the most tokens an answer may have and were cut off."""
    return (
        f"{usage.truncated_calls:,} of {counted(usage.paid_calls + usage.cached_calls, 'answer')} reached the ceiling "
        "on answers and were cut off (--copa-answer-tokens)"
    )


def what_makes_answers_parse(n_truncated: int) -> str:
    """What to do about answers that do not parse.

    Args:
        n_truncated: answers that were cut off at their ceiling of tokens.
    """
    cut_off = (
        f"; {counted(n_truncated, 'answer')} reached the ceiling on answers and were cut off: raise "
        "--copa-answer-tokens if they were getting somewhere"
        if n_truncated
        else ""
    )
    return (
        "--copa-constrain, if the output fields are Literal, enum or bool (local models); demonstrations (strategy "
        "'p') or LoRA training ('w', 'joint'), which teach the format; another prompt adapter (dspy.configure), or "
        f"--copa-json-fallback, at two calls per such answer; a larger model{cut_off}"
    )


def _fields(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={shortened(value)}" for key, value in values.items())


def shortened(value: Any) -> str:
    """A value on one line, without credentials, cut in the middle: the end of a long answer often tells the most."""
    text = mask_text(" ".join((value if isinstance(value, str) else repr(value)).split()))
    if len(text) > MAX_VALUE_CHARACTERS:
        head = MAX_VALUE_CHARACTERS * 2 // 3
        text = f"{text[:head]} ... {text[-(MAX_VALUE_CHARACTERS - head) :]}"
    return text or "''"
