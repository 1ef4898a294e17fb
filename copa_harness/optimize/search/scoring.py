"""Scores of candidates on validation examples, block by block, remembered by content; and what the answers cost.

The examples have one fixed order. A candidate raced against another sees first the examples on which that other has
something to gain on (`racing.next_rows`), then the rest in the fixed order. One that was scored before costs nothing
again. Before a block is started the allowance is asked whether it can be finished.

Costs are measured while the examples are scored, from what was stored with every answer when it was bought; a replayed
run sees the same numbers. An answer may take several calls (stages, retries); all of them count. Seconds are those of
the calls one after another, as they were when bought.

In a robust search a row's score is the worst of the row itself and its changed forms (`robustness.perturbations`).
Forms of a row that cannot get worse are not asked. A form without an answer leaves the row without a score: a failure
of the provider is no weakness of a candidate.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import dspy
import numpy as np

from copa_harness.errors import ProviderError
from copa_harness.evaluate.examples import example_ids
from copa_harness.evaluate.metrics import Metric
from copa_harness.evaluate.runner import ExampleRun, default_adapter, raise_if_nothing_worked, run_examples
from copa_harness.judge.explanations import unparsed_text
from copa_harness.judge.paired_tests import PairedDifference, PairedScores, paired_difference
from copa_harness.lm.call_context import Observed, observing
from copa_harness.optimize.propose.schema import strata_of, stratified_order
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.racing import FULL, estimated_difference, mean_score, next_rows, paired_differences
from copa_harness.optimize.step_budget import CallBudget, OutOfCalls
from copa_harness.results import ExampleResult, Phase
from copa_harness.robustness.perturbations import Forms

logger = logging.getLogger("copa_harness")

MAX_DEAD_CANDIDATES = 3
"""So many candidates in a row without a single answer mean the provider is down, not that the candidates are bad."""

MIN_DEAD_ROWS = 5
"""So many examples they must have tried: blocks can be as small as one."""


class Validation:
    """The validation examples in their fixed order, and what every candidate scored on them so far.

    Args:
        examples: The validation split.
        metric: DSPy metric.
        threads: Examples in flight at once.
        seed: Of the order; the order is stratified, so every block has about the whole's mix of labels.
        block_size: Examples per block; default a quarter of the split, at least 5 and at most 32.
        observe: Measure what answers cost (see `cost`); a little slower.
        forms: Changed forms of every row, of which the worst counts; None scores rows as they are.
    """

    def __init__(
        self,
        examples: Sequence[dspy.Example],
        *,
        metric: Metric,
        threads: int,
        seed: int,
        block_size: int | None = None,
        observe: bool = False,
        forms: Forms | None = None,
    ) -> None:
        self.forms = forms
        self._seed, self._given_block_size = seed, block_size
        order = stratified_order(strata_of(examples), np.random.default_rng([seed, 202]))
        ids = example_ids(examples)
        self.examples = [examples[i] for i in order]
        self.ids = tuple(ids[i] for i in order)
        self.metric = metric
        self.threads = threads
        self.block_size = block_size or min(32, max(5, math.ceil(len(examples) / 4)))
        self._table: dict[str, dict[int, float | None]] = {}
        self._candidates: dict[str, Candidate] = {}
        self._costs: dict[str, AnswerCost] = {}
        self._observe = observe
        self._calls_per_example = 0
        self._n_dead = self._n_dead_rows = 0
        self._unparsed: dict[str, int] = {}  # answers of candidates of whom none could be parsed so far
        self._parses: set[str] = set()
        self._first_unparsed: ExampleResult | None = None

    def part(self, rows: Sequence[int]) -> Validation:
        """Some of the examples by themselves, with no scores yet; what answers cost is known to all parts."""
        part = self.over([self.examples[row] for row in rows])
        part._costs = self._costs
        return part

    def over(self, examples: Sequence[dspy.Example]) -> Validation:
        """Other examples, scored in the same way."""
        return Validation(
            examples,
            metric=self.metric,
            threads=self.threads,
            seed=self._seed,
            block_size=self._given_block_size,
            observe=self._observe,
            forms=self.forms,
        )

    @property
    def n(self) -> int:
        """Validation examples."""
        return len(self.examples)

    def calls_per_example(self, candidate: Candidate) -> int:
        """An estimate from above: the most calls an example took so far, judges in the metric included.

        At least one per predictor, and two while DSPy's ChatAdapter may ask a second time in JSON; once more for every
        changed form.
        """
        retries = 2 if getattr(default_adapter(), "use_json_adapter_fallback", False) else 1
        return max(len(candidate.parts) * retries * self._asked_per_row, self._calls_per_example)

    @property
    def _asked_per_row(self) -> int:
        """How often a row is asked at most: once, and once more in every form."""
        return 1 + (0 if self.forms is None else len(self.forms.names))

    def scores(self, candidate: Candidate) -> tuple[float | None, ...]:
        """The candidate's score on every example in the fixed order; None where it has none (yet)."""
        row_scores = self._table.get(candidate.key, {})
        return tuple(row_scores.get(row) for row in range(self.n))

    def n_seen(self, candidate: Candidate) -> int:
        """On how many examples the candidate has been run."""
        return len(self._table.get(candidate.key, ()))

    def mistakes(self, candidate: Candidate) -> list[dspy.Example]:
        """The examples scored so far that the candidate did not get fully right."""
        scored = zip(self.examples, self.scores(candidate), strict=True)
        return [example for example, score in scored if score is not None and score < FULL]

    def n_unparsed(self, candidate: Candidate) -> int:
        """Answers of a candidate of whom not one could be parsed; 0 as soon as one could, and before it answered."""
        return 0 if candidate.key in self._parses else self._unparsed.get(candidate.key, 0)

    @property
    def nothing_parses(self) -> bool:
        """Whether there were answers, and none of any candidate could be parsed."""
        return bool(self._unparsed) and not self._parses

    @property
    def n_programs_unparsed(self) -> int:
        """Candidates with an answer that could not be parsed."""
        return len(self._unparsed)

    @property
    def unparsed_text(self) -> str:
        """What the first answer that could not be parsed looks like."""
        return unparsed_text([] if self._first_unparsed is None else [self._first_unparsed])

    def is_complete(self, candidate: Candidate) -> bool:
        """Whether the candidate has been run on every validation example."""
        return self.n_seen(candidate) == self.n

    def completed(self) -> tuple[Candidate, ...]:
        """All fully scored candidates, in the order in which they were first scored."""
        return tuple(candidate for candidate in self._candidates.values() if self.is_complete(candidate))

    def cost(self, candidate: Candidate) -> AnswerCost:
        """What the candidate's answers cost on the examples scored so far; nothing unless `observe` is on."""
        return self._costs.get(candidate.key, AnswerCost())

    def mean(self, candidate: Candidate) -> float:
        """Mean score so far, nan when there is none."""
        return mean_score(self.scores(candidate))

    def cost_to_complete(self, candidate: Candidate) -> int:
        """Upper estimate of the calls a full score still needs."""
        return (self.n - self.n_seen(candidate)) * self.calls_per_example(candidate)

    def advance(
        self,
        candidate: Candidate,
        *,
        allowance: CallBudget,
        phase: Phase,
        against: Candidate | None = None,
    ) -> tuple[float | None, ...]:
        """Score the next block.

        Args:
            candidate: Who is scored.
            allowance: What pays for it.
            phase: Stamped on the calls.
            against: A fully scored candidate this one has to beat: the examples on which it can be beaten come first.

        Returns:
            The candidate's scores so far, see `scores`.

        Raises:
            OutOfCalls: The allowance does not suffice for the block; nothing was run.
            BudgetExhausted: The estimate was too low and the budget ended within the block, which is then forgotten.
            ProviderError: Several candidates in a row got no answer at all.
        """
        self._run(candidate, self._next_block(candidate, against), allowance=allowance, phase=phase)
        return self.scores(candidate)

    def _run(self, candidate: Candidate, rows: Sequence[int], *, allowance: CallBudget, phase: Phase) -> None:
        """Run the candidate on some of the examples; see `advance`."""
        row_scores = self._table.setdefault(candidate.key, {})
        self._candidates.setdefault(candidate.key, candidate)
        if not rows:
            return
        if not allowance.can_afford(len(rows) * self.calls_per_example(candidate)):
            raise OutOfCalls
        charged = allowance.scope.charged_calls
        program, examples = candidate.program(), {row: self.examples[row] for row in rows}
        with observing() if self._observe else nullcontext() as observer:
            runs = self._asked(program, examples, phase=phase)
            worst = {row: run.result.score for row, run in zip(rows, runs, strict=True)}
            in_all = [*runs, *self._asked_in_forms(program, worst, phase=phase)]
        if self._calls_per_example == 0:  # the student failing throughout is a broken task, a candidate a bad candidate
            raise_if_nothing_worked(runs, split="validation")
        if observer is not None:
            self._costs[candidate.key] = self.cost(candidate).plus(observer.seen, n_answers=len(in_all))
        mean_charged = math.ceil((allowance.scope.charged_calls - charged) / len(runs))
        most = self._asked_per_row * max(len(run.trace) for run in in_all)
        self._calls_per_example = max(1, self._calls_per_example, mean_charged, most)
        # A prompt too long for the model is the candidate's fault; any other failure of a whole block the provider's.
        dead = all(run.result.outcome == "provider_error" and not run.too_long for run in runs)
        self._n_dead = self._n_dead + math.ceil(len(rows) / self.block_size) if dead else 0
        self._n_dead_rows = self._n_dead_rows + len(rows) if dead else 0
        if self._n_dead >= MAX_DEAD_CANDIDATES and self._n_dead_rows >= MIN_DEAD_ROWS:
            raise ProviderError(
                f"no answer from the model for {self._n_dead} candidates in a row; the last error: "
                f"{runs[0].result.error}"
            )
        self._note_unparsed(candidate, [run.result for run in in_all])
        row_scores.update(worst)

    def _asked(
        self, program: dspy.Module, examples: Mapping[int, dspy.Example], *, phase: Phase
    ) -> tuple[ExampleRun, ...]:
        return run_examples(
            program,
            list(examples.values()),
            metric=self.metric,
            split="validation",
            phase=phase,
            threads=self.threads,
            ids=tuple(self.ids[row] for row in examples),
        )

    def _asked_in_forms(
        self, program: dspy.Module, worst: dict[int, float | None], *, phase: Phase
    ) -> list[ExampleRun]:
        """Ask rows that could still get worse in every form, and keep each row's worst score in `worst`."""
        if self.forms is None:
            return []
        found: list[ExampleRun] = []
        rows = [row for row, score in worst.items() if score]
        for form in self.forms.of(program, [self.examples[row] for row in rows]):
            changed = {rows[i]: example for i, example in form.rows.items() if worst[rows[i]]}
            if changed:
                runs = self._asked(form.program, changed, phase=phase)
                for row, run in zip(changed, runs, strict=True):
                    score, before = run.result.score, worst[row]
                    worst[row] = None if score is None or before is None else min(score, before)
                found += runs
        return found

    def _note_unparsed(self, candidate: Candidate, results: Sequence[ExampleResult]) -> None:
        unparsed = [result for result in results if result.outcome == "unparsed"]
        if any(result.outcome in ("ok", "metric_error") for result in results):
            self._parses.add(candidate.key)
        if unparsed:
            self._unparsed[candidate.key] = self._unparsed.get(candidate.key, 0) + len(unparsed)
            self._first_unparsed = self._first_unparsed or unparsed[0]

    def _next_block(self, candidate: Candidate, against: Candidate | None) -> list[int]:
        incumbent = (None,) * self.n if against is None else self.scores(against)
        seen = self._table.get(candidate.key, {})
        return next_rows(incumbent, seen=seen, size=self.block_size)

    def complete(self, candidate: Candidate, *, allowance: CallBudget, phase: Phase) -> float:
        """Score what is missing, in one piece, since nothing is decided in between; the mean score.

        Raises:
            OutOfCalls: The allowance does not suffice for all of it; nothing was run.
            BudgetExhausted, ProviderError: As `advance`.
        """
        if not allowance.can_afford(self.cost_to_complete(candidate)):
            raise OutOfCalls
        seen = self._table.get(candidate.key, {})
        missing = [row for row in range(self.n) if row not in seen]
        self._run(candidate, missing, allowance=allowance, phase=phase)
        return self.mean(candidate)

    def is_better(self, candidate: Candidate, incumbent: Candidate) -> bool:
        """Whether a fully scored candidate replaces the incumbent: a higher mean, or the same mean and simpler.

        Compared on the examples both have a score for.
        """
        difference = self.difference(candidate, incumbent)
        if math.isnan(difference):
            return False
        if abs(difference) > 1e-9:
            return difference > 0
        return candidate.size < incumbent.size

    def standard_error(self, candidate: Candidate, other: Candidate) -> float:
        """Standard error of the mean paired difference of two fully scored candidates; 0 when they differ nowhere."""
        differences = paired_differences(self.scores(candidate), self.scores(other))
        return float(np.std(differences, ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else 0.0

    def difference(self, candidate: Candidate, incumbent: Candidate) -> float:
        """Mean paired difference over the examples both have scores for; nan when there are none."""
        differences = paired_differences(self.scores(candidate), self.scores(incumbent))
        return sum(differences) / len(differences) if differences else math.nan

    def compared(self, before: Candidate, after: Candidate) -> PairedDifference:
        """Two candidates by the paired test and interval of the gates, on the examples both have scores for."""
        pairs = [pair for pair in zip(self.scores(before), self.scores(after), strict=True) if None not in pair]
        old, new = [[score for score in column if score is not None] for column in zip(*pairs, strict=True)] or ([], [])
        return paired_difference(PairedScores([str(i) for i in range(len(pairs))], old, new))

    def estimate(self, candidate: Candidate, incumbent: Candidate) -> float:
        """What the paired difference over all examples will be, estimated from those seen; nan when there are none."""
        if self.is_complete(candidate):
            return self.difference(candidate, incumbent)
        return estimated_difference(self.scores(candidate), self.scores(incumbent))


@dataclass(frozen=True, slots=True)
class AnswerCost:
    """The cost of so many answers.

    Attributes:
        n_answers: Examples answered.
        longest_prompt: Tokens of the longest prompt of any call; None when a call's are unknown.
        prompt_tokens: Prompt tokens of all calls, None when unknown.
        output_tokens: Answer tokens of all calls, None when unknown.
        usd: Dollars of all calls, None when a price is unknown.
        seconds: Seconds of all calls, None when unknown.
    """

    n_answers: int = 0
    longest_prompt: int | None = 0
    prompt_tokens: int | None = 0
    output_tokens: int | None = 0
    usd: float | None = 0.0
    seconds: float | None = 0.0

    def plus(self, calls: Sequence[Observed], *, n_answers: int) -> AnswerCost:
        """With the calls of further answers."""
        inputs = [call.input_tokens for call in calls]
        longest = None if self.longest_prompt is None or None in inputs else self.longest_prompt
        if longest is not None:
            longest = max([longest, *(one for one in inputs if one is not None)])
        return AnswerCost(
            n_answers=self.n_answers + n_answers,
            longest_prompt=longest,
            prompt_tokens=_whole(_sum(self.prompt_tokens, inputs)),
            output_tokens=_whole(_sum(self.output_tokens, [call.output_tokens for call in calls])),
            usd=_sum(self.usd, [call.usd for call in calls]),
            seconds=_sum(self.seconds, [call.seconds for call in calls]),
        )

    def per_answer(self, what: str) -> float | None:
        """Mean per answer of "prompt_tokens", "output_tokens", "tokens" (both), "usd" or "seconds"; None if unknown."""
        if what == "tokens":
            inputs, outputs = self.per_answer("prompt_tokens"), self.per_answer("output_tokens")
            return None if inputs is None or outputs is None else inputs + outputs
        total = getattr(self, what)
        return None if total is None or self.n_answers == 0 else total / self.n_answers


def _sum(start: float | None, values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    # Rounded once: the calls of a block come in any order.
    return None if start is None or len(known) < len(values) else start + math.fsum(known)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
