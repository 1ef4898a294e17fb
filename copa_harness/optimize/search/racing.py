"""Racing: which examples a trial sees next, when it is hopeless against the incumbent, and what it showed until then.

Symbols: a_i, b_i = scores of the incumbent and of the trial on validation example i = 1..n. The examples fall into two
strata: H, on which the incumbent can be beaten (a_i < 1), and E, on which it can only be lost to (a_i = 1).

**Stratified blocks** (`next_rows`). A trial that is to replace the incumbent must win something on H, however good it
is elsewhere. So H comes first: of a good incumbent few examples are wrong, and a trial that wins none of them can at
best tie and is over. What happens on E afterwards can only take away, so as soon as the losses reach the gains it is
over as well. For right/wrong scores this drops exactly the trials that would not end better, with no statistics and no
risk; it is the cheapest order in which this can be found out, since no example of E says anything before H has shown a
gain.

**The racing rule** (`RacingPruner`, an Optuna pruner over reports ``trial.report(score, step=example index)``). A trial
is dropped when either

* even full marks on everything unseen leave it below the incumbent: ``sum(b_seen) + (n - seen) < sum(a)`` (exact), or
  merely level with it where a tie does not win, which is soon known of a good incumbent with few examples to gain, or
* the pairs speak against it: an exact sign-flip test of the mean difference, one-sided. For right/wrong scores this is
  the sign test (McNemar's, exact); for graded scores all 2^k sign patterns of the k pairs that differ, and beyond 12
  of them the normal approximation of the same sum.

Optuna's own `WilcoxonPruner` was tried and is not used: with ties, which right/wrong scores are made of, scipy's test
takes up to three seconds a look, and its guard compares the incumbent's mean over all examples with the trial's mean
over those seen, which lets hopeless trials live whenever the first examples are the easy ones.

**What is guaranteed.** In a random order of the examples (stratified by label, fixed beforehand) those seen are drawn
without replacement from a finite set, and "worse" means: a lower mean on that whole set, which is what would decide had
nobody raced. A trial that would end at least as good as the incumbent is dropped with probability at most `level` over
that order, however many looks are taken. Each look is tested at ``level * min(1, 4 / looks)``: drawing without
replacement makes the sign test conservative (a difference of zero over all examples pulls early leads back), and
simulation over sizes, looks and numbers of differing pairs finds at most 0.06 for level 0.1 with right/wrong scores
(`tests/optimize/search/test_racing_guarantee.py` repeats it). The order is one draw, so this is a rate over trials, not
a promise for one; and a wrongly dropped trial costs an opportunity, never a wrong result, since only fully scored
trials can become the incumbent. With H first all gains of right/wrong scores are seen before any loss, so the exact
rule decides everything and nothing is dropped wrongly; for graded scores that order favours the trial, which makes the
test drop less than its level allows.

**What a dropped trial is worth** (`estimated_difference`). The scores seen when H came first are no random sample: they
flatter. The estimate therefore weighs the strata by their sizes and supposes a moderate loss where nothing was seen.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence

import numpy as np
import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial
from scipy.stats import binom, norm

from copa_harness.judge.paired_tests import sign_flip_sums

Scores = Sequence[float | None]
"""One per validation example, in their fixed order; None where there is none."""

FULL = 1.0 - 1e-9
"""A score from here on cannot be beaten."""

MAX_ENUMERATED = 12
"""Up to so many differing pairs all 2^k sign patterns are counted: 4,096 sums."""

PRIOR_LOSS = 0.2
"""Supposed loss per example of E before any was seen: what a configuration drawn at random loses to a good one."""

PRIOR_EXAMPLES = 2.0
"""The supposed loss weighs as much as so many examples."""


class RacingPruner(optuna.pruners.BasePruner):
    """Drops a trial that is hopeless against the incumbent, pairing their reports step by step.

    Args:
        p_threshold: Level of the whole race, 0..1; 0 turns the statistical part off.
        n_startup_steps: Examples seen before the statistical rule may drop a trial.
        n_looks: How often a trial may be looked at before it is complete.
    """

    def __init__(self, *, p_threshold: float = 0.1, n_startup_steps: int = 4, n_looks: int = 1) -> None:
        self.p_threshold = look_level(p_threshold, n_looks)
        self.n_startup_steps = n_startup_steps
        self._incumbent: Mapping[int, float] | None = None
        self._ties_lose = False

    def race_against(self, incumbent: Mapping[int, float] | None, *, ties_lose: bool) -> None:
        """Set whom the next trials are paired with.

        Args:
            incumbent: Scores by step; None takes the study's best trial.
            ties_lose: Whether a trial level with the incumbent would not replace it.
        """
        self._incumbent, self._ties_lose = incumbent, ties_lose

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether `trial` is hopeless. Steps that only one of the two reported are left out of the test."""
        incumbent = self._incumbent
        if incumbent is None:
            try:
                incumbent = study.best_trial.intermediate_values
            except ValueError:
                return False
        running = trial.intermediate_values
        steps = sorted(set(incumbent) & set(running))
        if not steps:
            return False
        unseen = sorted(set(incumbent) - set(running))
        before = [incumbent[step] for step in [*steps, *unseen]]
        after = [running[step] for step in steps]
        if cannot_catch_up(before, after, ties_lose=self._ties_lose):
            return True
        if len(steps) < self.n_startup_steps:
            return False
        return worse_p_value(before[: len(steps)], after) < self.p_threshold


def cannot_catch_up(before: Sequence[float], after_seen: Sequence[float], *, ties_lose: bool = False) -> bool:
    """Whether full marks (1.0) on every example not seen yet would still leave `after` strictly below `before`.

    With `ties_lose`, also when they would leave it level.
    """
    best_possible = sum(after_seen) + (len(before) - len(after_seen))
    return best_possible < sum(before) + (1e-9 if ties_lose else -1e-9)


def look_level(level: float, n_looks: int) -> float:
    """The level of each of `n_looks` looks so that a whole race keeps `level`; see the top of this module."""
    return level * min(1.0, 4.0 / max(1, n_looks))


def worse_p_value(before: Sequence[float], after: Sequence[float]) -> float:
    """One-sided p-value for "after is worse than before on average", from the pairs that differ; 1.0 when none does.

    Under the null hypothesis the sign of every difference is a fair coin.
    """
    differences = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    differences = differences[np.abs(differences) > 1e-12]
    k = len(differences)
    if k == 0:
        return 1.0
    sizes = np.abs(differences)
    if np.allclose(sizes, sizes[0]):
        return float(binom.cdf(int((differences > 0).sum()), k, 0.5))
    if k > MAX_ENUMERATED:
        return float(norm.cdf(differences.sum() / np.sqrt((differences**2).sum())))
    return float(np.mean(sign_flip_sums(sizes) <= differences.sum() + 1e-12))


def next_rows(incumbent: Scores, *, seen: Container[int], size: int) -> list[int]:
    """The examples a candidate sees next: those of H, worst first, as long as there are any; then the others in order.

    Args:
        incumbent: Scores of the candidate to beat; an example without one counts as one of the others.
        seen: Examples the candidate has seen.
        size: Examples at most.
    """
    hard = [i for i, score in enumerate(incumbent) if score is not None and score < FULL]
    hard.sort(key=lambda i: incumbent[i] or 0.0)  # stable: the fixed order among equals
    first = [i for i in hard if i not in seen]
    if first:
        return first[:size]
    known = set(hard)
    return [i for i in range(len(incumbent)) if i not in seen and i not in known][:size]


def mean_score(scores: Scores) -> float:
    """Mean over the examples that have a score; nan when none has."""
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else math.nan


def paired_differences(new: Scores, old: Scores) -> list[float]:
    """``new - old`` on the examples both have a score for."""
    return [b - a for b, a in zip(new, old, strict=False) if b is not None and a is not None]


def estimated_difference(new: Scores, old: Scores) -> float:
    """Estimate of the mean of ``new - old`` over all examples `old` has a score for; nan when `new` has seen none.

    Stratified: the mean seen on H stands for all of H, the mean seen on E, drawn towards `PRIOR_LOSS`, for all of E.
    """
    total = 0.0
    n = n_seen = 0
    for is_hard in (True, False):
        rows = [i for i, score in enumerate(old) if score is not None and (score < FULL) == is_hard]
        seen = paired_differences([new[i] for i in rows], [old[i] for i in rows])
        weight = 0.0 if is_hard else PRIOR_EXAMPLES
        n, n_seen = n + len(rows), n_seen + len(seen)
        if rows and len(seen) + weight:
            unseen_mean = (sum(seen) - weight * PRIOR_LOSS) / (len(seen) + weight)
            total += sum(seen) + (len(rows) - len(seen)) * unseen_mean
    return total / n if n_seen else math.nan
