"""The racing rule: when a running trial is hopeless against the incumbent, example by example.

Symbols: a_i, b_i = scores of the incumbent and of the trial on example i, i in the examples seen so far; n = all
validation examples. A trial is dropped when either

* even full marks on everything unseen leave it below the incumbent: ``sum(b_seen) + (n - seen) < sum(a)`` (exact), or
* the pairs speak against it: an exact sign-flip test of the mean difference, one-sided. For right/wrong scores this is
  the sign test (McNemar's, exact); for graded scores all 2^k sign patterns of the k pairs that differ, and beyond 12
  of them the normal approximation of the same sum.

Optuna's own `WilcoxonPruner` was tried and is not used: with ties, which right/wrong scores are made of, scipy's test
takes up to three seconds a look, and its guard compares the incumbent's mean over all examples with the trial's mean
over those seen, which lets hopeless trials live whenever the first examples are the easy ones.

The test is applied after every block, so its level bounds one look and not the whole race; a wrongly dropped trial
costs an opportunity, never a wrong result, since only fully scored trials can become the incumbent. The rule is an
Optuna pruner over reports ``trial.report(score, step=example index)``; knows nothing of programs or models.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def cannot_catch_up(before: Sequence[float], after_seen: Sequence[float]) -> bool:
    """Whether full marks (1.0) on every example not seen yet would still leave `after` strictly below `before`."""
    best_possible = sum(after_seen) + (len(before) - len(after_seen))
    return best_possible < sum(before) - 1e-9


class RacingPruner(optuna.pruners.BasePruner):
    """Drops a trial that is hopeless against the study's best trial, pairing their reports step by step.

    Args:
        p_threshold: Level of one look, 0..1.
        n_startup_steps: Examples seen before the statistical rule may drop a trial.
    """

    def __init__(self, *, p_threshold: float = 0.1, n_startup_steps: int = 4) -> None:
        self.p_threshold = p_threshold
        self.n_startup_steps = n_startup_steps

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether `trial` is hopeless. Steps that only one of the two trials reported are left out of the test."""
        try:
            best = study.best_trial
        except ValueError:
            return False
        incumbent, running = best.intermediate_values, trial.intermediate_values
        steps = sorted(set(incumbent) & set(running))
        if not steps:
            return False
        unseen = sorted(set(incumbent) - set(running))
        before = [incumbent[step] for step in [*steps, *unseen]]
        after = [running[step] for step in steps]
        if cannot_catch_up(before, after):
            return True
        if len(steps) < self.n_startup_steps:
            return False
        return worse_p_value(before[: len(steps)], after) < self.p_threshold
