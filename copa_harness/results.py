"""Frozen records everything else speaks in: usage, budgets, per-example results, evaluations, gates, optimizations.

Scores are floats in 0..1, higher is better. Three things are kept apart everywhere: a wrong answer (`outcome="ok"`, low
score), an answer that could not be parsed (`"unparsed"`, score 0: the model answered, unusably) and an example without
any score because the provider or the metric failed (`"provider_error"`, `"metric_error"`, score None, outside every
mean).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from operator import add, attrgetter, sub
from typing import Any, Literal

SCHEMA = 1
"""Version written into every file these records end in."""


class Phase(str, Enum):
    """What a model call was made for; stamped on every call."""

    BASELINE = "baseline"
    BOOTSTRAP = "bootstrap"
    WEIGHTS = "weights"
    DEMOS = "demos"
    INSTRUCTIONS = "instructions"
    SEARCH = "search"
    EVALUATE = "evaluate"
    METRIC = "metric"


class Verdict(str, Enum):
    """A gate's answer."""

    PASS = "pass"
    FAIL = "fail"
    UNDECIDED = "undecided"
    ERROR = "error"
    NOT_COMPARABLE = "not comparable"


@dataclass(frozen=True, slots=True)
class Usage:
    """What was spent. `paid_calls` reached a model; `cached_calls` were answered from disk and cost nothing.

    Tokens and dollars count paid calls only. `train_steps` are optimizer steps of LoRA training. `estimated_calls`
    are those of the paid calls whose tokens the provider did not report, or whose end it never told (a timeout after
    the request was sent): they are booked at the worst case that was reserved for them. `unpriced_calls` are paid
    calls whose price nobody knows; their dollars are missing from `usd`. `truncated_calls` are answers, paid and cached
    ones, that were cut off because they reached the most tokens an answer may have.
    """

    paid_calls: int = 0
    cached_calls: int = 0
    failed_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    train_steps: int = 0
    wall_s: float = 0.0
    estimated_calls: int = 0
    unpriced_calls: int = 0
    truncated_calls: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(add, _amounts(self), _amounts(other)))

    def __sub__(self, other: Usage) -> Usage:
        """What was spent between two readings of one meter, the later one minus the earlier one."""
        return Usage(*map(sub, _amounts(self), _amounts(other)))

    @property
    def calls(self) -> int:
        """Calls paid in this run (the number a budget in calls bounds)."""
        return self.paid_calls

    @property
    def tokens(self) -> int:
        """Input plus output tokens of the paid calls."""
        return self.input_tokens + self.output_tokens


_amounts = attrgetter(*(one.name for one in fields(Usage)))


@dataclass(frozen=True, slots=True)
class Budget:
    """Ceilings of one optimization run; `math.inf` means no ceiling.

    `calls`, tokens and dollars bound the *distinct* requests of the run, counted the same whether the answer was
    bought or replayed from disk. So a run that was killed and started again stops at the very same point as an
    uninterrupted one, and what is really paid never exceeds the ceiling. (The ledger of a whole pytest run counts
    real payments only: see `copa_harness.lm.budget.ledger`.)

    Attributes:
        calls: Distinct requests.
        name: As the user wrote it, for messages.
        tokens: Input plus output tokens.
        input_tokens: Prompt tokens.
        output_tokens: Completion tokens.
        usd: Dollars.
        seconds: Seconds since the scope was opened; after them nothing more is bought.
        train_steps: Optimizer steps of LoRA training.
    """

    calls: float = math.inf
    name: str = "unlimited"
    tokens: float = math.inf
    input_tokens: float = math.inf
    output_tokens: float = math.inf
    usd: float = math.inf
    seconds: float = math.inf
    train_steps: float = math.inf

    @property
    def ceilings(self) -> dict[str, float]:
        """The finite ceilings by name, in the order of the attributes."""
        names = ("calls", "tokens", "input_tokens", "output_tokens", "usd", "seconds", "train_steps")
        return {name: value for name in names if math.isfinite(value := getattr(self, name))}


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided interval around a mean score."""

    low: float
    high: float
    level: float = 0.95
    method: str = "wilson"


Outcome = Literal["ok", "unparsed", "provider_error", "metric_error"]


@dataclass(frozen=True, slots=True)
class ExampleResult:
    """One example's score. `score` is None exactly when no score exists (provider or metric failure).

    `label_scores`: of constrained answers, by output field (of all predictors), every allowed value's log-probability.
    `answer`: what the model wrote where that could not be parsed, its first characters.
    `requests`: digest of everything that was asked for it, by program and metric: rendered requests, decoding settings
    and what answers them. Equal digests ask the same of the same weights.
    """

    example_id: str
    score: float | None
    outcome: Outcome = "ok"
    inputs: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, Any] = field(default_factory=dict)
    predicted: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    label_scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    answer: str = ""
    requests: str = ""
    calls: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """A program's scores on one split.

    `score` is the mean over examples that have a score (nan when none has); `n` counts all examples,
    `n_failed` those without a score, `n_unparsed` those whose answer could not be parsed (scored 0).
    """

    split: str
    lm: str
    results: tuple[ExampleResult, ...]
    interval: Interval
    usage: Usage = Usage()

    @property
    def scores(self) -> tuple[float, ...]:
        """Scores of the examples that have one, in the order of the split."""
        return tuple(r.score for r in self.results if r.score is not None)

    @property
    def score(self) -> float:
        """Mean score, 0..1; nan when no example has a score."""
        scores = self.scores
        return sum(scores) / len(scores) if scores else math.nan

    @property
    def n(self) -> int:
        """Examples in the split."""
        return len(self.results)

    @property
    def n_failed(self) -> int:
        """Examples without a score: the provider or the metric failed."""
        return sum(r.score is None for r in self.results)

    @property
    def n_unparsed(self) -> int:
        """Examples whose answer did not parse (scored 0)."""
        return sum(r.outcome == "unparsed" for r in self.results)

    @property
    def nothing_parses(self) -> bool:
        """Whether the model answered and not one answer could be parsed: then the score says nothing of the task."""
        n_unanswered = sum(r.outcome == "provider_error" for r in self.results)
        return 0 < self.n_unparsed == self.n - n_unanswered

    def worst(self, k: int = 3) -> tuple[ExampleResult, ...]:
        """The `k` worst examples: failures first, then the lowest scores, in a stable order."""
        below = [r for r in self.results if r.score is None or r.score < 1.0]
        return tuple(sorted(below, key=lambda r: -1.0 if r.score is None else r.score)[:k])


@dataclass(frozen=True, slots=True)
class PhaseRecord:
    """One phase of an optimization: what it spent and what it did to the validation score."""

    phase: str
    usage: Usage
    score_before: float | None = None
    score_after: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate's answer: the rule (`min_score=0.85`), the verdict, and a sentence a person can act on.

    `details` holds the numbers behind the sentence (p_value, difference, rows_needed, ...), JSON values only.
    """

    gate: str
    verdict: Verdict
    message: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SearchEnding:
    """Why an optimization ended, after how many candidates and distinct calls."""

    reason: str
    n_trials: int
    calls: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What speaks for the program found against the one that came in, paired on validation.

    Attributes:
        n: Rows both have a score for.
        unseen: Rows of them that were held back from the search; 0 when the rows that chose the result judge it.
        n_tried: Candidates with a full score on these rows, among which the result was chosen.
        difference: Mean gain, -1..1.
        low: Lower end of its 95 % interval.
        high: Upper end.
        gained: Rows that got better.
        lost: Rows that got worse.
        p_value: One-sided, of "no better", corrected for the candidates tried.
        level: What the p-value was held to.
        tested: Whether it was held to anything; otherwise whatever is no worse was kept.
        adopted: Whether the result was returned, not the program that came in.
        why: Why not; empty when it was.
    """

    n: int
    unseen: int
    n_tried: int
    difference: float
    low: float
    high: float
    gained: int
    lost: int
    p_value: float
    level: float
    tested: bool
    adopted: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontProgram:
    """A program on the front of validation score and cost, with what an answer of it costs; None where not known."""

    score: float
    objective: str
    prompt_tokens_per_answer: float | None
    output_tokens_per_answer: float | None
    usd_per_answer: float | None
    seconds_per_answer: float | None
    longest_prompt: int | None
    n_demos: int
    model: str
    returned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizationResult:
    """The record of one optimization; the optimized program carries it as `program.copa_result`.

    Attributes:
        strategy: As parsed, e.g. "p -> w -> p".
        model: Name of the model(s) the program ends on; a fine-tuned one contains its fingerprint.
        phases: What each step spent and did to the validation score.
        score_before: Mean validation score of the student, 0..1, None when the budget did not reach that far.
        score_after: The same for the returned program; never below `score_before`.
        n_validation: Validation examples behind both.
        stopped: Why it ended: "completed", "budget", "perfect score", "converged", "max_cycles", ...
        reason: The same in words: the budget's numbers, how the last study ended.
        exhausted: Whether the budget cut the search short.
        usage: Everything the run spent.
        seed: Of all random choices.
        budget_calls: The ceiling in distinct calls, `inf` for none.
        charged_calls: Distinct calls used, bought or replayed.
        n_trials: Candidates looked at.
        notes: Sentences worth telling: what was adopted or refused, and why.
        headlines: Those of them that nobody should have to look for: what `auto` chose, what limits and preferences
            did.
        front: The front of score and cost, cheapest first, when a preference asked for it: what each answer costs, and
            which entry was returned.
        credit: Which part of which stage earned the gain on validation; empty when nothing changed.
        evidence: What speaks for the program found; None when nothing was found, or there is nothing to compare with.
        learned: What every kind of proposal gained, one entry per arm.
        trials: What every trial used and gained, shortened.
        state: The program's settings as JSON (see `optimize.apply_state`); None when an optimizer changed the program
            itself.
    """

    strategy: str
    model: str
    phases: tuple[PhaseRecord, ...]
    score_before: float | None
    score_after: float | None
    n_validation: int
    stopped: str
    exhausted: bool
    usage: Usage
    seed: int
    budget_calls: float = math.inf
    charged_calls: int
    n_trials: int = 0
    notes: tuple[str, ...] = ()
    headlines: tuple[str, ...] = ()
    reason: str = ""
    front: tuple[FrontProgram, ...] = ()
    credit: Mapping[str, Any] = field(default_factory=dict, repr=False)
    evidence: Evidence | None = field(default=None, repr=False)
    learned: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    trials: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    state: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def ending(self) -> SearchEnding | None:
        """Why it ended; None when there was nothing to search."""
        return SearchEnding(self.reason or self.stopped, self.n_trials, self.charged_calls) if self.phases else None
