"""What the page shows of a run beyond its record: answers before and after, prompts before and after, the search.

A record holds scores only, so that `latest.json` can be shared; these texts go to the page and nowhere else. Each is
cut to `MAX_CHARACTERS`, without credentials.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from copa_harness.credentials import mask_text
from copa_harness.results import EvaluationResult, ExampleResult

MAX_CHARACTERS = 2000
"""Of one text; the middle of longer ones is left out."""

MAX_PROMPT = 20_000
"""Of the messages of one predictor."""

MAX_EXAMPLES = 500
"""Of one run: those that changed first, then those that are wrong."""

MAX_LABELS = 5
"""Allowed values of one output field shown with their log-probability, the likeliest first."""


TRIAL_KEYS = ("study", "outcome", "n", "score", "n_validation")
"""What is kept of a trial: how it ended, on how many of how many validation examples, and its mean score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleShown:
    """One example after the optimization, beside the program as written and the accepted result, of which only scores
    are known; empty texts where there is nothing to show.
    """

    id: str
    score: float | None
    before: float | None = None
    accepted: float | None = None
    outcome: str = "ok"
    inputs: str = ""
    expected: str = ""
    answer: str = ""
    answer_before: str = ""
    error: str = ""
    labels: str = ""

    @property
    def reference(self) -> float | None:
        """What it is compared with: the accepted result, else the program as written."""
        return self.before if self.accepted is None else self.accepted

    @property
    def change(self) -> str:
        """`worse`, `better` or `same`; `same` too where one of the two scores is missing."""
        if self.score is None or self.reference is None or self.score == self.reference:
            return "same"
        return "worse" if self.score < self.reference else "better"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDetails:
    """What one run's part of the page is made of.

    Attributes:
        examples: The most telling first, at most `MAX_EXAMPLES`.
        n_examples: How many there are.
        prompts_before: Messages by predictor, as the program was written.
        prompts_after: Messages by predictor, as they were evaluated.
        trials: What the search tried, each with `TRIAL_KEYS`.
        fingerprints: Of data, split, metric, program and model.
    """

    examples: tuple[ExampleShown, ...] = ()
    n_examples: int = 0
    prompts_before: Mapping[str, str] = field(default_factory=dict)
    prompts_after: Mapping[str, str] = field(default_factory=dict)
    trials: tuple[Mapping[str, Any], ...] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a session has to say beyond its records.

    Attributes:
        details: Of runs, by their position in the report.
        notes: What is good to know.
        remarks: What a person should know and could overlook.
        n_refused: Evaluations and tests that the session's ceilings cut short.
        against: What was compared with, for the first line of a comment; empty for the accepted baselines.
        tables: (title, HTML) of tables beside those of the runs.
    """

    details: Mapping[int, RunDetails] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    n_refused: int = 0
    against: str = ""
    tables: tuple[tuple[str, str], ...] = ()

    @property
    def trials(self) -> list[Mapping[str, Any]]:
        """What all searches tried; a search that two runs share counts once."""
        searches = {repr(one.trials): one.trials for one in self.details.values()}
        return [trial for trials in searches.values() for trial in trials]


NOTHING_TOLD = Told()


def examples_shown(
    after: EvaluationResult, before: EvaluationResult | None, *, accepted: Mapping[str, float | None] | None = None
) -> tuple[ExampleShown, ...]:
    """The examples of an evaluation, those that got worse first, then the better ones, then the wrong ones.

    `before` is the program as written on the same split, None for that program itself; `accepted` are scores of the
    accepted result by example id, if there is one.
    """
    known = {} if before is None else {row.example_id: row for row in before.results}
    shown = [_shown(row, known.get(row.example_id), (accepted or {}).get(row.example_id)) for row in after.results]
    rank = {"worse": 0, "better": 1, "same": 2}
    shown.sort(key=lambda row: (rank[row.change], -1.0 if row.score is None else row.score))
    return tuple(shown[:MAX_EXAMPLES])


def _shown(row: ExampleResult, before: ExampleResult | None, accepted: float | None) -> ExampleShown:
    return ExampleShown(
        id=row.example_id,
        score=row.score,
        before=None if before is None else before.score,
        accepted=accepted,
        outcome=row.outcome,
        inputs=_fields(row.inputs),
        expected=_fields(row.expected),
        answer=_answer(row),
        answer_before="" if before is None else _answer(before),
        error=text_of(row.error or ""),
        labels=_labels(row.label_scores),
    )


def _answer(row: ExampleResult) -> str:
    return _fields(row.predicted) or text_of(row.answer)


def _fields(values: Mapping[str, Any]) -> str:
    if len(values) == 1:
        return text_of(next(iter(values.values())))
    return "\n".join(f"{name}: {text_of(value)}" for name, value in values.items())


def _labels(scores: Mapping[str, Mapping[str, float]]) -> str:
    lines = []
    for name, by_label in scores.items():
        likeliest = sorted(by_label.items(), key=lambda item: -item[1])[:MAX_LABELS]
        lines.append(f"{name}: " + ", ".join(f"{label} {value:.2f}" for label, value in likeliest))
    return "\n".join(lines)


def text_of(value: Any, *, most: int = MAX_CHARACTERS) -> str:
    """A value as text, without credentials, its middle left out where it is long."""
    text = mask_text(value if isinstance(value, str) else repr(value))
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"
