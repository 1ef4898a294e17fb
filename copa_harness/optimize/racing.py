"""The racing rule: when a running trial is hopeless against the incumbent, example by example.

Symbols: a_i, b_i = scores of the incumbent and of the trial on example i, i in the examples seen so far; n = all
validation examples. A trial is dropped when either

* even full marks on everything unseen leave it below the incumbent: ``sum(b_seen) + (n - seen) < sum(a)`` (exact), or
* the pairs that differ speak against it: for 0/1 scores the exact one-sided sign test (McNemar) on wins and losses,
  otherwise Optuna's `WilcoxonPruner`, whose ranks mean little when all differences have the same size.

The test is applied after every block, so its level bounds one look and not the whole race; a wrongly dropped trial
costs an opportunity, never a wrong result, since only fully scored trials can become the incumbent. The rule is an
Optuna pruner over reports ``trial.report(score, step=example index)``; knows nothing of programs or models.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial
from scipy.stats import binom


def sign_test(before: Sequence[float], after: Sequence[float]) -> float:
    """One-sided exact p-value for "after is worse than before", from the pairs that differ; 1.0 when none does."""
    losses = sum(b < a for a, b in zip(before, after, strict=True))
    wins = sum(b > a for a, b in zip(before, after, strict=True))
    return float(binom.cdf(wins, wins + losses, 0.5)) if wins + losses else 1.0


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._graded = optuna.pruners.WilcoxonPruner(p_threshold=p_threshold, n_startup_steps=n_startup_steps)

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
        if set(before) | set(after) <= {0.0, 1.0}:
            return sign_test(before[: len(steps)], after) < self.p_threshold
        return bool(self._graded.prune(study, trial))
