"""The racing rule: when a running trial is hopeless against the incumbent, example by example.

Symbols: a_i, b_i = scores of the incumbent and of the trial on example i, i in the examples seen so far; n = all
validation examples. A trial is dropped when either

* even full marks on everything unseen leave it below the incumbent: ``sum(b_seen) + (n - seen) < sum(a)`` (exact), or
  merely level with it where a tie does not win, which is soon known of a good incumbent with few examples to gain, or
* the pairs speak against it: an exact sign-flip test of the mean difference, one-sided. For right/wrong scores this is
  the sign test (McNemar's, exact); for graded scores all 2^k sign patterns of the k pairs that differ, and beyond 12
  of them the normal approximation of the same sum.

Optuna's own `WilcoxonPruner` was tried and is not used: with ties, which right/wrong scores are made of, scipy's test
takes up to three seconds a look, and its guard compares the incumbent's mean over all examples with the trial's mean
over those seen, which lets hopeless trials live whenever the first examples are the easy ones.

What is guaranteed. The examples come in a random order (stratified, fixed beforehand), so those seen are drawn
without replacement from a finite set, and "worse" means: a lower mean on that whole set, which is what would decide had
nobody raced. A trial that would end at least as good as the incumbent is dropped with probability at most `level` over
that order, however many looks are taken. Each look is tested at ``level * min(1, 4 / looks)``: drawing without
replacement makes the sign test conservative (a difference of zero over all examples pulls early leads back), and
simulation over sizes, looks and numbers of differing pairs finds at most 0.06 for level 0.1 with right/wrong scores
(`tests/optimize/test_racing.py` repeats it). The order is one draw, so this is a rate over trials, not a promise for
one; and a wrongly dropped trial costs an opportunity, never a wrong result, since only fully scored trials can become
the incumbent.

A study shows a trial the incumbent's mistakes first (see `sheets`). For right/wrong scores all gains are then seen
before any loss, so the exact rule decides everything and nothing is dropped wrongly; for graded scores the order
favours the trial, which makes the test drop less than its level allows.

The rule is an Optuna pruner over reports ``trial.report(score, step=example index)``; knows nothing of
programs or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial
from scipy.stats import binom, norm

MAX_ENUMERATED = 12
"""Up to so many differing pairs all 2^k sign patterns are counted: 4,096 sums."""


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
    signs = 1 - 2 * ((np.arange(2**k)[:, None] >> np.arange(k)) & 1)
    return float(np.mean(signs @ sizes <= differences.sum() + 1e-12))


def cannot_catch_up(before: Sequence[float], after_seen: Sequence[float], *, ties_lose: bool = False) -> bool:
    """Whether full marks (1.0) on every example not seen yet would still leave `after` strictly below `before`.

    With `ties_lose`, also when they would leave it level.
    """
    best_possible = sum(after_seen) + (len(before) - len(after_seen))
    return best_possible < sum(before) + (1e-9 if ties_lose else -1e-9)


def look_level(level: float, n_looks: int) -> float:
    """The level of each of `n_looks` looks so that a whole race keeps `level`; see the top of this module."""
    return level * min(1.0, 4.0 / max(1, n_looks))


class RacingPruner(optuna.pruners.BasePruner):
    """Drops a trial that is hopeless against the incumbent, pairing their reports step by step.

    Args:
        p_threshold: Level of the whole race, 0..1; 0 turns the statistical part off.
        n_startup_steps: Examples seen before the statistical rule may drop a trial.
        n_looks: How often a trial may be looked at before it is complete.

    Attributes:
        incumbent: The incumbent's scores by step; while None, the study's best trial is taken for it.
        ties_lose: Whether a trial level with the incumbent would not replace it.
    """

    def __init__(self, *, p_threshold: float = 0.1, n_startup_steps: int = 4, n_looks: int = 1) -> None:
        self.p_threshold = look_level(p_threshold, n_looks)
        self.n_startup_steps = n_startup_steps
        self.incumbent: Mapping[int, float] | None = None
        self.ties_lose = False

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether `trial` is hopeless. Steps that only one of the two reported are left out of the test."""
        incumbent = self.incumbent
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
        if cannot_catch_up(before, after, ties_lose=self.ties_lose):
            return True
        if len(steps) < self.n_startup_steps:
            return False
        return worse_p_value(before[: len(steps)], after) < self.p_threshold
