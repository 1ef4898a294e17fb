"""What a run remembers of its own trials, and what that says to its proposers.

Every option is remembered by its content with the arms it came from; every trial becomes an observation of the bandit,
a row of the regression on demonstrations, and a compact record for the result. The demonstrations that raised the score
are told to the instruction proposers (`helpful_demos`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dspy
import numpy as np

from copa_harness.evaluate.examples import plain
from copa_harness.optimize.search.bandit import (
    BETWEEN_SD,
    Observation,
    Posterior,
    ProposalBandit,
    normal_posterior,
    paired_gain,
)
from copa_harness.optimize.search.candidate import Candidate, model_name
from copa_harness.optimize.search.racing import mean_score
from copa_harness.optimize.search.space import DemoSet

DEMO_SD = 0.05
"""Prior size of what one demonstration adds to the score of a set."""

MAX_RECORDS = 400
"""Trials kept for the result; what is learned uses all of them."""


class SearchMemory:
    """The memory of one run.

    Args:
        seed: Of every draw made from it.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.bandit = ProposalBandit()
        self.seed = seed
        self.records: list[dict[str, Any]] = []
        self.n_trials = 0
        self._n_studies = 0
        self._n_draws = 0
        self._instructions: dict[tuple[str, str], tuple[str, ...]] = {}
        self._demos: dict[tuple[str, str], tuple[str, ...]] = {}
        self._proposed: dict[str, dict[str, Any]] = {}
        self._rows: list[dict[str, float]] = []
        self._gains: list[float] = []
        self._variances: list[float] = []

    # -- what is proposed

    def generator(self) -> np.random.Generator:
        """A fresh generator: the n-th one asked for is the same in every run of the same seed."""
        self._n_draws += 1
        return np.random.default_rng([self.seed, self._n_draws, 909])

    def note_instruction(self, predictor: str, text: str, *arms: str) -> None:
        """Remember that the arms (``family: arm``) proposed an instruction; the first to do so get the credit."""
        self._instructions.setdefault((predictor, text), arms)

    def note_demos(self, predictor: str, demos: DemoSet, *arms: str) -> None:
        """Remember that the arms proposed a demonstration set."""
        self._demos.setdefault((predictor, _set_key(demos.demos)), arms)
        self._proposed.setdefault(predictor, {}).update((demo_key(demo), demo) for demo in demos.demos)

    def demos_of(self, predictor: str) -> list[Any]:
        """Every demonstration proposed for a predictor so far, bootstrapped ones too, in the order they came."""
        return list(self._proposed.get(predictor, {}).values())

    # -- what is tried

    def note_study(
        self,
        name: str,
        reference: Candidate,
        trials: Iterable[tuple[Candidate, str]],
        scores: Mapping[str, Sequence[float | None]],
        *,
        values: Mapping[str, float | None] | None = None,
    ) -> None:
        """Learn from a study's trials.

        Args:
            name: The study's name, for the records.
            reference: The incumbent it began with, whom gains are measured against.
            trials: Candidates tried, in order, each with how it ended ("complete", "dropped", "failed").
            scores: Validation scores so far by candidate key, in one fixed order of examples.
            values: Mean over all examples by candidate key, estimated where a race left some out; without it the
                mean over those seen counts, which flatters candidates that saw their hardest examples only.
        """
        self._n_studies += 1
        level = mean_score(scores.get(reference.key, ()))
        for candidate, outcome in trials:
            self.n_trials += 1
            found = paired_gain(scores.get(candidate.key, ()), scores.get(reference.key, ()))
            value = (values or {}).get(candidate.key)
            if found is not None and value is not None:
                found = (value - level, *found[1:])
            features = self.features_of(candidate, reference)
            if len(self.records) < MAX_RECORDS:
                self.records.append(_record(name, features, found, outcome, level=level))
            if found is None or candidate.key == reference.key:
                continue
            gain, variance, n = found
            self.bandit.observe(Observation(self._n_studies, features, gain, variance, n))
            row = {name: float(count) for name, count in features.items()}
            for part in candidate.parts:
                for demo in part.demos:
                    row[f"{part.predictor}\n{demo_key(demo)}"] = 1.0
            self._rows.append(row)
            self._gains.append(gain)
            self._variances.append(variance + BETWEEN_SD**2)

    def features_of(self, candidate: Candidate, reference: Candidate) -> dict[str, int]:
        """How many predictors carry an option of each arm; what is as in the reference counts for none."""
        features: dict[str, int] = {}
        arms: list[str] = []
        for new, old in zip(candidate.parts, reference.parts, strict=True):
            if new.instruction != old.instruction:
                known = self._instructions.get((new.predictor, new.instruction), ("instruction: as before",))
                arms.extend(known)
            if new.demos != old.demos:
                arms.extend(self._demos.get((new.predictor, _set_key(new.demos)), ("demos: as before",)))
                arms.append(f"size: {len(new.demos)}")
            if model_name(new.lm) != model_name(old.lm):
                arms.append("weights: tuned" if "@" in model_name(new.lm) else "weights: base")
        for arm in arms:
            features[arm] = features.get(arm, 0) + 1
        return features

    # -- what demonstrations add

    def demo_posterior(self) -> Posterior:
        """What every demonstration tried so far adds to the score, all else in the trials being accounted for.

        A Bayesian ridge regression of the trials' paired gains on which demonstrations they showed, with the arms of
        instructions and weights beside them.
        """
        names = sorted({name for row in self._rows for name in row if not name.startswith(("demos: ", "size: "))})
        rows = [{**{name: row[name] for name in names if name in row}, "": 1.0} for row in self._rows]
        prior = {name: DEMO_SD if "\n" in name else 0.3 for name in names} | {"": 0.3}
        return normal_posterior(rows, self._gains, variances=self._variances, prior_sd=prior)

    def drawn_effects(
        self, predictor: str, demos: Sequence[dspy.Example], *, n_draws: int, generator: np.random.Generator
    ) -> list[list[float]]:
        """Draws of what each of the demonstrations adds to the score; none before one of them was tried.

        A demonstration never tried is drawn from the prior, so that new ones keep getting their chance.
        """
        names = [f"{predictor}\n{demo_key(demo)}" for demo in demos]
        posterior = self.demo_posterior() if self._rows else None
        if posterior is None or not set(names) & set(posterior.names):
            return []
        draws = []
        for _ in range(n_draws):
            drawn, fresh = posterior.draw(generator), generator.normal(0.0, DEMO_SD, len(names)).tolist()
            draws.append([drawn.get(name, new) for name, new in zip(names, fresh, strict=True)])
        return draws

    def demo_effects(self, predictor: str, demos: Sequence[dspy.Example]) -> list[tuple[float, float]]:
        """(posterior mean, standard deviation) of what each of the demonstrations adds; prior for those not tried."""
        if not self._rows:
            return [(0.0, DEMO_SD)] * len(demos)
        posterior = self.demo_posterior()
        pairs = zip(posterior.mean.tolist(), posterior.sd().tolist(), strict=True)
        known = dict(zip(posterior.names, pairs, strict=True))
        return [known.get(f"{predictor}\n{demo_key(demo)}", (0.0, DEMO_SD)) for demo in demos]

    def helpful_demos(self, predictor: str, demos: Sequence[dspy.Example], *, n: int = 3) -> list[dspy.Example]:
        """The demonstrations most probably helpful, best first: those whose weight is a standard deviation above 0."""
        weights = self.demo_effects(predictor, demos)
        order = sorted(range(len(demos)), key=lambda i: -weights[i][0])
        return [demos[i] for i in order[:n] if weights[i][0] > weights[i][1]]

    def row_weights(self, predictor: str, demos: Sequence[dspy.Example]) -> list[float] | None:
        """What each of the rows should count, 1 to 3, by what it adds to the score when shown; None when none does."""
        weights = [max(0.0, mean / sd) for mean, sd in self.demo_effects(predictor, demos)]
        most = max(weights, default=0.0)
        return [1.0 + 2.0 * weight / most for weight in weights] if most > 1.0 else None

    def report(self) -> list[dict[str, Any]]:
        """What was learned about the proposers, as `ProposalBandit.report`."""
        return self.bandit.report()


def demo_key(demo: Any) -> str:
    """A demonstration's content, shortened: equal exactly when all fields are."""
    content = {str(key): plain(value) for key, value in dict(demo).items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def _set_key(demos: Sequence[Any]) -> str:
    return "|".join(demo_key(demo) for demo in demos)


def _record(
    study: str, features: Mapping[str, int], found: tuple[float, float, int] | None, outcome: str, *, level: float
) -> dict[str, Any]:
    gain, variance, n = found if found is not None else (None, None, 0)
    return {
        "study": study,
        "outcome": outcome,
        "n": n,
        "score": None if gain is None else round(level + gain, 4),
        "gain": None if gain is None else round(gain, 4),
        "sd": None if variance is None else round(float(np.sqrt(variance)), 4),
        "arms": dict(features),
    }
