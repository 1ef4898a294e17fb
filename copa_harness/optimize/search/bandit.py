"""The bandit over proposals: what every kind of proposal gained in the trials so far, and which kinds come next.

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
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


class ProposalBandit:
    """What a run has learned about its proposers; one per run, kept over all its phases and cycles."""

    def __init__(self) -> None:
        self.observations: list[Observation] = []
        self.offered: Counter[str] = Counter()

    def observe(self, observation: Observation) -> None:
        """Take a trial into account; one that used no arm teaches nothing."""
        if observation.features:
            self.observations.append(observation)

    def posterior(self, arms: Sequence[str] = ()) -> Posterior:
        """The posterior of every arm seen so far and of the given ones, and of their families.

        Args:
            arms: Arms to include, seen or not.
        """
        names = {*arms, *(name for one in self.observations for name in one.features)}
        latest = max((one.phase for one in self.observations), default=0)
        rows: list[dict[str, float]] = []
        for one in self.observations:
            row = {name: float(count) for name, count in one.features.items()}
            for name, count in one.features.items():
                if _family(name) in FAMILIES:
                    row[_family(name)] = row.get(_family(name), 0.0) + count
            rows.append(row)
        return normal_posterior(
            rows,
            [one.gain for one in self.observations],
            variances=[(one.variance + BETWEEN_SD**2) / FADING ** (latest - one.phase) for one in self.observations],
            prior_sd=dict.fromkeys(FAMILIES & set(map(_family, names)), FAMILY_SD) | dict.fromkeys(names, PRIOR_SD),
        )

    def knows(self, family: str) -> bool:
        """Whether any trial used an arm of the family."""
        return any(name.startswith(f"{family}: ") for one in self.observations for name in one.features)

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

    def report(self) -> list[dict[str, Any]]:
        """What was learned, best first within each family: plain JSON types.

        ``gain`` is the posterior mean of what an option of the arm adds when it replaces the incumbent's setting: it
        decides what is proposed next, and is no estimate with a known error. ``mean_gain`` is the plain mean gain of
        the trials that used the arm, whatever else those changed.
        """
        posterior = self.posterior()
        rows: list[dict[str, Any]] = []
        for name in sorted({name for one in self.observations for name in one.features}):
            used = [one for one in self.observations if name in one.features]
            arm = [place for place, known in enumerate(posterior.names) if known in (name, _family(name))]
            rows.append(
                {
                    "family": _family(name),
                    "arm": name.removeprefix(f"{_family(name)}: "),
                    "offered": self.offered[name],
                    "tries": len(used),
                    "mean_gain": float(np.average([one.gain for one in used], weights=[one.n for one in used])),
                    "gain": float(posterior.mean[arm].sum()),
                }
            )
        return sorted(rows, key=lambda row: (row["family"], -row["gain"], row["arm"]))


def _family(feature: str) -> str:
    return feature.split(": ", 1)[0]


@dataclass(frozen=True, slots=True)
class Observation:
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
