"""Scores of candidates on validation examples, block by block in one fixed order, remembered by content.

A candidate that was scored before costs nothing again. Before a block is started the allowance is asked whether it can
be finished. Knows programs, metrics and budgets; knows nothing of samplers or proposals.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import dspy
import numpy as np

from copa_harness.errors import ProviderError
from copa_harness.evaluate.examples import example_ids
from copa_harness.evaluate.metrics import Metric
from copa_harness.evaluate.runner import default_adapter, run_examples
from copa_harness.lm.observing import observing
from copa_harness.optimize.allowance import Allowance, OutOfCalls
from copa_harness.optimize.candidate import Candidate
from copa_harness.optimize.costs import AnswerCost
from copa_harness.optimize.schema import strata_of, stratified_order
from copa_harness.results import Phase

logger = logging.getLogger("copa_harness")

MAX_DEAD_CANDIDATES = 3
"""So many candidates in a row without a single answer mean the provider is down, not that the candidates are bad."""


def mean_score(scores: Sequence[float | None]) -> float:
    """Mean over the examples that have a score; nan when none has."""
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else math.nan


class Validation:
    """The validation examples in their fixed order, and what every candidate scored on them so far.

    Args:
        examples: The validation split.
        metric: DSPy metric.
        threads: Examples in flight at once.
        seed: Of the order; the order is stratified, so every block has about the whole's mix of labels.
        block_size: Examples per block; default a quarter of the split, at least 5 and at most 32.
        observe: Measure what answers cost (see `cost`); a little slower.
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
    ) -> None:
        order = stratified_order(strata_of(examples), np.random.default_rng([seed, 202]))
        ids = example_ids(examples)
        self.examples = [examples[i] for i in order]
        self.ids = tuple(ids[i] for i in order)
        self.metric = metric
        self.threads = threads
        self.block_size = block_size or min(32, max(5, math.ceil(len(examples) / 4)))
        self._sheets: dict[str, list[float | None]] = {}
        self._candidates: dict[str, Candidate] = {}
        self._costs: dict[str, AnswerCost] = {}
        self._observe = observe
        self._calls_per_example = 0
        self._n_dead = 0

    @property
    def n(self) -> int:
        """Validation examples."""
        return len(self.examples)

    def calls_per_example(self, candidate: Candidate) -> int:
        """An estimate from above: the most calls an example took so far, judges in the metric included.

        At least one per predictor, and two while DSPy's ChatAdapter may ask a second time in JSON.
        """
        retries = 2 if getattr(default_adapter(), "use_json_adapter_fallback", False) else 1
        return max(len(candidate.parts) * retries, self._calls_per_example)

    def scores(self, candidate: Candidate) -> tuple[float | None, ...]:
        """The candidate's scores so far, a prefix of the fixed order."""
        return tuple(self._sheets.get(candidate.key, ()))

    def mistakes(self, candidate: Candidate) -> list[dspy.Example]:
        """The examples scored so far that the candidate did not get fully right."""
        scored = zip(self.examples, self.scores(candidate), strict=False)
        return [example for example, score in scored if score is not None and score < 1.0 - 1e-9]

    def is_complete(self, candidate: Candidate) -> bool:
        """Whether every validation example has been scored."""
        return len(self._sheets.get(candidate.key, ())) == self.n

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
        return (self.n - len(self.scores(candidate))) * self.calls_per_example(candidate)

    def advance(self, candidate: Candidate, *, allowance: Allowance, phase: Phase) -> tuple[float | None, ...]:
        """Score the next block.

        Returns:
            The candidate's scores so far.

        Raises:
            OutOfCalls: The allowance does not suffice for the block; nothing was run.
            BudgetExhausted: The estimate was too low and the budget ended within the block, which is then forgotten.
            ProviderError: Several candidates in a row got no answer at all.
        """
        sheet = self._sheets.setdefault(candidate.key, [])
        self._candidates.setdefault(candidate.key, candidate)
        start, stop = len(sheet), min(self.n, len(sheet) + self.block_size)
        if start == stop:
            return tuple(sheet)
        if not allowance.can_afford((stop - start) * self.calls_per_example(candidate)):
            raise OutOfCalls
        charged = allowance.scope.charged_calls
        with observing() if self._observe else nullcontext() as observer:
            runs = run_examples(
                candidate.program(),
                self.examples[start:stop],
                metric=self.metric,
                split="validation",
                phase=phase,
                threads=self.threads,
                ids=self.ids[start:stop],
                # The student failing throughout is a broken task; a candidate doing so is a bad candidate.
                raise_if_nothing_works=self._calls_per_example == 0,
            )
        if observer is not None:
            self._costs[candidate.key] = self.cost(candidate).plus(observer.seen, n_answers=len(runs))
        mean_charged = math.ceil((allowance.scope.charged_calls - charged) / len(runs))
        self._calls_per_example = max(1, self._calls_per_example, mean_charged, *(len(run.trace) for run in runs))
        # A prompt too long for the model is the candidate's fault; any other failure of a whole block the provider's.
        dead = all(run.result.outcome == "provider_error" and not run.too_long for run in runs)
        self._n_dead = self._n_dead + 1 if dead else 0
        if self._n_dead >= MAX_DEAD_CANDIDATES:
            raise ProviderError(
                f"no answer from the model for {self._n_dead} candidates in a row; the last error: "
                f"{runs[0].result.error}"
            )
        sheet.extend(run.result.score for run in runs)
        return tuple(sheet)

    def complete(self, candidate: Candidate, *, allowance: Allowance, phase: Phase) -> float:
        """Score what is missing; the mean score.

        Raises:
            OutOfCalls: The allowance does not suffice for all of it; nothing was run.
            BudgetExhausted, ProviderError: As `advance`.
        """
        if not allowance.can_afford(self.cost_to_complete(candidate)):
            raise OutOfCalls
        while not self.is_complete(candidate):
            self.advance(candidate, allowance=allowance, phase=phase)
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
        pairs = zip(self.scores(candidate), self.scores(other), strict=False)
        differences = [new - old for new, old in pairs if new is not None and old is not None]
        return float(np.std(differences, ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else 0.0

    def difference(self, candidate: Candidate, incumbent: Candidate) -> float:
        """Mean paired difference over the examples both have scores for; nan when there are none."""
        pairs: list[tuple[Any, Any]] = [
            (new, old)
            for new, old in zip(self.scores(candidate), self.scores(incumbent), strict=False)
            if new is not None and old is not None
        ]
        return sum(new - old for new, old in pairs) / len(pairs) if pairs else math.nan
