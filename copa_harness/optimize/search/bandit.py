"""Learning to propose: what every kind of proposal gained in the trials so far, and which kinds to propose next.

Symbols: trial t gained y_t over the incumbent its study began with (a mean paired difference over the examples both
were scored on, -1..1; its variance is v_t), and used the features x_t: how many predictors carried an option of each
arm (a demonstration set drawn at random, a rule, an instruction written with a certain tip, other weights, ...). What
keeps the incumbent's setting has no feature, so

    y_t = x_t . b + e_t,    b ~ N(0, diag(prior)),    e_t ~ N(0, v_t + BETWEEN_SD^2)

which is a Bayesian linear bandit: the arms of one trial share its gain instead of each taking all of it. The effect of
an arm is that of its family (any demonstrations at all, ...) plus its own, so an arm never tried is expected to be as
good as its family. What is proposed next is drawn by Thompson sampling (Thompson 1933; Agrawal and Goyal 2013, arXiv
1209.3352): one draw of b from its posterior per proposal, and the best arm of the draw wins. Evidence from earlier
phases fades, because the incumbent it was measured against is gone.

What a run knows from its own trials, and what that says to its proposers: the memory between phases.

Every option is remembered by its content with the arms it came from; every trial becomes evidence for the learner, a
row of the regression on demonstrations, and a compact record for the result. Transfer goes both ways: the
demonstrations that carried weight are told to the instruction proposers (`weighty_demos`), and what an instruction
settles by itself frees places in demonstration sets (`settled`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy
import numpy as np
from numpy.typing import NDArray

from copa_harness.evaluate.examples import plain
from copa_harness.optimize.search.candidate import Candidate, model_name
from copa_harness.optimize.search.racing import mean_score
from copa_harness.optimize.search.space import DemoSet

FAMILY_SD = 0.3
"""Prior size of what a family adds: demonstrations or a rule can make a task, or change nothing."""

PRIOR_SD = 0.1
"""Prior size of what an arm adds to its family."""

BETWEEN_SD = 0.05
"""How much two options of one arm differ."""

FAMILIES = frozenset({"demos", "instruction", "weights"})
"""Families with an effect of their own. Arms of the others (a size, a tip, a temperature) only come along with one of
these, so what they share is already told by it."""

FADING = 0.5
"""Weight of the evidence of one phase earlier."""

_PSEUDO_N, _PSEUDO_VARIANCE = 2, 0.25
"""Shrinks the variance of a difference towards that of a coin flip's: three equal differences are no certainty."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One trial, as far as learning goes.

    Attributes:
        phase: Number of the study it belongs to; later is larger.
        features: Predictors carrying an option of each arm, by ``family: arm``.
        gain: Mean paired difference to the incumbent the study began with, -1..1.
        variance: Of that mean.
        n: Examples behind it.
    """

    phase: int
    features: Mapping[str, int]
    gain: float
    variance: float
    n: int


def paired_gain(scores: Sequence[float | None], reference: Sequence[float | None]) -> tuple[float, float, int] | None:
    """(mean difference, variance of that mean, examples) over the examples both have a score for; None without any."""
    differences = np.array(
        [new - old for new, old in zip(scores, reference, strict=False) if new is not None and old is not None]
    )
    n = len(differences)
    if n == 0:
        return None
    variance = (float(((differences - differences.mean()) ** 2).sum()) + _PSEUDO_N * _PSEUDO_VARIANCE) / (n + _PSEUDO_N)
    return float(differences.mean()), variance / n, n


@dataclass(frozen=True)
class Posterior:
    """Normal posterior of the effects of named features."""

    names: tuple[str, ...]
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64] = field(repr=False)

    def sd(self) -> NDArray[np.float64]:
        """Standard deviation of each effect."""
        return np.asarray(np.sqrt(np.diag(self.covariance)))

    def draw(self, generator: np.random.Generator) -> dict[str, float]:
        """One draw of all effects."""
        if not self.names:
            return {}
        root = np.linalg.cholesky(self.covariance + 1e-12 * np.eye(len(self.names)))
        values = self.mean + root @ generator.standard_normal(len(self.names))
        return dict(zip(self.names, values.tolist(), strict=True))


def normal_posterior(
    rows: Sequence[Mapping[str, float]],
    gains: Sequence[float],
    *,
    variances: Sequence[float],
    prior_sd: Mapping[str, float],
) -> Posterior:
    """The posterior of a linear model with known noise (Bayesian ridge regression in closed form).

    Args:
        rows: Features of every observation; those missing are 0.
        gains: What was observed.
        variances: Noise variance of every observation, above 0.
        prior_sd: Prior standard deviation of every feature's effect around 0; names all features there are.
    """
    names = tuple(sorted(prior_sd))
    design = np.array([[row.get(name, 0.0) for name in names] for row in rows], dtype=float)
    design = design.reshape(len(rows), len(names))
    weights = 1.0 / np.asarray(variances, dtype=float)
    precision = np.diag([1.0 / prior_sd[name] ** 2 for name in names]) + (design * weights[:, None]).T @ design
    covariance = np.linalg.inv(precision) if names else np.zeros((0, 0))
    covariance = (covariance + covariance.T) / 2
    return Posterior(names, covariance @ (design.T @ (weights * np.asarray(gains, dtype=float))), covariance)


class Learner:
    """What a run has learned about its proposers; one per run, kept over all its phases and cycles."""

    def __init__(self) -> None:
        self.evidence: list[Evidence] = []
        self.offered: Counter[str] = Counter()

    def observe(self, evidence: Evidence) -> None:
        """Take a trial into account; one that used no arm teaches nothing."""
        if evidence.features:
            self.evidence.append(evidence)

    def posterior(self, arms: Sequence[str] = (), *, fading: float = FADING) -> Posterior:
        """The posterior of every arm seen so far and of the given ones, and of their families.

        Args:
            arms: Arms to include, seen or not.
            fading: Weight of the evidence of one phase earlier, above 0; 1 weighs all phases alike.
        """
        names = {*arms, *(name for one in self.evidence for name in one.features)}
        latest = max((one.phase for one in self.evidence), default=0)
        rows: list[dict[str, float]] = []
        for one in self.evidence:
            row = {name: float(count) for name, count in one.features.items()}
            for name, count in one.features.items():
                if _family(name) in FAMILIES:
                    row[_family(name)] = row.get(_family(name), 0.0) + count
            rows.append(row)
        return normal_posterior(
            rows,
            [one.gain for one in self.evidence],
            variances=[(one.variance + BETWEEN_SD**2) / fading ** (latest - one.phase) for one in self.evidence],
            prior_sd=dict.fromkeys(FAMILIES & set(map(_family, names)), FAMILY_SD) | dict.fromkeys(names, PRIOR_SD),
        )

    def knows(self, family: str) -> bool:
        """Whether any trial used an arm of the family."""
        return any(name.startswith(f"{family}: ") for one in self.evidence for name in one.features)

    def choose(self, family: str, arms: Sequence[str], *, n: int, generator: np.random.Generator) -> list[str]:
        """The arms of the next `n` proposals, by Thompson sampling.

        Without any evidence on the family the arms are taken in turn: chance would only leave some untried.

        Args:
            family: What the arms are alternatives of ("demos", "writer", "tip", ...).
            arms: Their names, in the order they are taken without evidence.
            n: Proposals.
            generator: Source of randomness.
        """
        if not arms:
            return []
        if not self.knows(family):
            chosen = [arms[i % len(arms)] for i in range(n)]
        else:
            posterior = self.posterior([f"{family}: {arm}" for arm in arms])
            chosen = []
            for _ in range(n):
                draw = posterior.draw(generator)
                chosen.append(max(arms, key=lambda arm: draw[f"{family}: {arm}"]))
        self.offered.update(f"{family}: {arm}" for arm in chosen)
        return chosen

    def effect(self, arms: Sequence[str]) -> tuple[float, float, int] | None:
        """(mean, standard deviation, trials) of what these arms add together; None when one of them was never tried.

        All phases count alike here: this is about what was, and not about what to do next.
        """
        tries = [sum(arm in one.features for one in self.evidence) for arm in arms]
        if not arms or not all(tries):
            return None
        mean, sd = self._combined(self.posterior(fading=1.0), arms)
        return mean, sd, min(tries)

    @staticmethod
    def _combined(posterior: Posterior, arms: Sequence[str]) -> tuple[float, float]:
        """Mean and standard deviation of the sum of arms, families included."""
        chosen = np.zeros(len(posterior.names))
        for arm in arms:
            chosen[posterior.names.index(arm)] += 1
            if _family(arm) in posterior.names:
                chosen[posterior.names.index(_family(arm))] += 1
        return float(chosen @ posterior.mean), float(np.sqrt(chosen @ posterior.covariance @ chosen))

    def report(self) -> list[dict[str, Any]]:
        """What was learned, best first within each family: plain JSON types.

        ``gain`` is the posterior mean of what an option of the arm adds when it replaces the incumbent's setting,
        ``low`` and ``high`` its 95 % credible interval; ``mean_gain`` the plain mean gain of the trials that used it,
        whatever else those changed.
        """
        posterior = self.posterior()
        rows: list[dict[str, Any]] = []
        for name in sorted({name for one in self.evidence for name in one.features}):
            used = [one for one in self.evidence if name in one.features]
            mean, sd = self._combined(posterior, [name])
            rows.append(
                {
                    "family": _family(name),
                    "arm": name.removeprefix(f"{_family(name)}: "),
                    "offered": self.offered[name],
                    "tries": len(used),
                    "mean_gain": float(np.average([one.gain for one in used], weights=[one.n for one in used])),
                    "gain": mean,
                    "low": mean - 1.96 * sd,
                    "high": mean + 1.96 * sd,
                }
            )
        return sorted(rows, key=lambda row: (row["family"], -row["gain"], row["arm"]))


def _family(feature: str) -> str:
    return feature.split(": ", 1)[0]


DEMO_SD = 0.05
"""Prior size of what one demonstration adds to the score of a set."""

MAX_RECORDS = 400
"""Trials kept for the result; what is learned uses all of them."""


def demo_key(demo: Any) -> str:
    """A demonstration's content, shortened: equal exactly when all fields are."""
    content = {str(key): plain(value) for key, value in dict(demo).items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def input_key(example: Any, input_fields: Sequence[str]) -> str:
    """An example's inputs, shortened: what tells whether two demonstrations ask the same."""
    return demo_key({name: example[name] for name in input_fields})


class Knowledge:
    """The memory of one run.

    Args:
        seed: Of every draw made from it.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.learner = Learner()
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
        self._settled: dict[str, dict[str, bool]] = {}

    # -- what is proposed

    def generator(self) -> np.random.Generator:
        """A fresh generator: the n-th one asked for is the same in every run of the same seed."""
        self._n_draws += 1
        return np.random.default_rng([self.seed, self._n_draws, 909])

    def note_instruction(self, predictor: str, text: str, *arms: str) -> None:
        """Remember that the arms (``family: arm``) proposed an instruction; the first to do so get the credit."""
        self._instructions.setdefault((predictor, text), arms)

    def is_written(self, predictor: str, text: str) -> bool:
        """Whether a prompt LM wrote an instruction in this run."""
        arms = self._instructions.get((predictor, text), ())
        return "instruction: written" in arms or "instruction: reflected" in arms

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
                self.records.append(_record(name, features, found, outcome))
            if found is None or candidate.key == reference.key:
                continue
            gain, variance, n = found
            self.learner.observe(Evidence(self._n_studies, features, gain, variance, n))
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

    # -- which demonstrations carried weight

    def demo_posterior(self) -> Posterior:
        """What every demonstration tried so far adds to the score, all else in the trials being accounted for.

        A Bayesian ridge regression of the trials' paired gains on which demonstrations they showed, with the arms of
        instructions and weights beside them.
        """
        names = sorted({name for row in self._rows for name in row if not name.startswith(("demos: ", "size: "))})
        rows = [{**{name: row[name] for name in names if name in row}, "": 1.0} for row in self._rows]
        prior = {name: DEMO_SD if "\n" in name else 0.3 for name in names} | {"": 0.3}
        return normal_posterior(rows, self._gains, variances=self._variances, prior_sd=prior)

    def weights_of(
        self, predictor: str, pool: Sequence[dspy.Example], *, n_draws: int, generator: np.random.Generator
    ) -> list[list[float]]:
        """Draws of what each demonstration of a pool adds to the score; none before one of them was tried.

        A demonstration never tried is drawn from the prior, so that new ones keep getting their chance.
        """
        names = [f"{predictor}\n{demo_key(demo)}" for demo in pool]
        posterior = self.demo_posterior() if self._rows else None
        if posterior is None or not set(names) & set(posterior.names):
            return []
        draws = []
        for _ in range(n_draws):
            drawn, fresh = posterior.draw(generator), generator.normal(0.0, DEMO_SD, len(names)).tolist()
            draws.append([drawn.get(name, new) for name, new in zip(names, fresh, strict=True)])
        return draws

    def mean_weights(self, predictor: str, pool: Sequence[dspy.Example]) -> list[tuple[float, float]]:
        """(posterior mean, standard deviation) of what each demonstration of a pool adds; prior for those not tried."""
        if not self._rows:
            return [(0.0, DEMO_SD)] * len(pool)
        posterior = self.demo_posterior()
        pairs = zip(posterior.mean.tolist(), posterior.sd().tolist(), strict=True)
        known = dict(zip(posterior.names, pairs, strict=True))
        return [known.get(f"{predictor}\n{demo_key(demo)}", (0.0, DEMO_SD)) for demo in pool]

    def weighty_demos(self, predictor: str, pool: Sequence[dspy.Example], *, n: int = 3) -> list[dspy.Example]:
        """The demonstrations most probably helpful, best first: those whose weight is a standard deviation above 0."""
        weights = self.mean_weights(predictor, pool)
        order = sorted(range(len(pool)), key=lambda i: -weights[i][0])
        return [pool[i] for i in order[:n] if weights[i][0] > weights[i][1]]

    def stress_of(self, predictor: str, pool: Sequence[dspy.Example]) -> list[float] | None:
        """How much each row of a pool is to be stressed, 1 to 3, by the weight it carried; None when none did."""
        weights = [max(0.0, mean / sd) for mean, sd in self.mean_weights(predictor, pool)]
        most = max(weights, default=0.0)
        return [1.0 + 2.0 * weight / most for weight in weights] if most > 1.0 else None

    # -- what instructions settle

    def note_settled(self, instruction: str, answered: Mapping[str, bool]) -> None:
        """Remember which examples (by `demo_key` of their inputs) a bare instruction answers rightly."""
        self._settled.setdefault(instruction, {}).update(answered)

    def settled_by(self, instruction: str) -> Mapping[str, bool]:
        """Whether examples are answered rightly by a bare instruction, as far as that was found out."""
        return self._settled.get(instruction, {})

    def report(self) -> list[dict[str, Any]]:
        """What was learned about the proposers, as `Learner.report`."""
        return self.learner.report()


def _set_key(demos: Sequence[Any]) -> str:
    return "|".join(demo_key(demo) for demo in demos)


def _record(
    study: str, features: Mapping[str, int], found: tuple[float, float, int] | None, outcome: str
) -> dict[str, Any]:
    gain, variance, n = found if found is not None else (None, None, 0)
    return {
        "study": study,
        "outcome": outcome,
        "n": n,
        "gain": None if gain is None else round(gain, 4),
        "sd": None if variance is None else round(float(np.sqrt(variance)), 4),
        "arms": dict(features),
    }
