"""Optuna's samplers by name. Nothing is sampled by hand here.

* ``random``: Monte Carlo, every point equally likely.
* ``tpe``: tree-structured Parzen estimator over all dimensions jointly (MIPRO's surrogate).
* ``gp``: Gaussian process with expected improvement.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.samplers import BaseSampler

from copa_harness.optimize.options import SAMPLERS, check_sampler

__all__ = ["SAMPLERS", "build_sampler", "quiet_optuna"]


def build_sampler(name: str, *, seed: int, n_startup_trials: int = 10) -> BaseSampler:
    """A seeded Optuna sampler.

    Args:
        name: One of `SAMPLERS`.
        seed: Of its random numbers.
        n_startup_trials: Trials before the surrogate is asked.

    Raises:
        ConfigurationError: Unknown name.
    """
    check_sampler(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=n_startup_trials)
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=n_startup_trials, deterministic_objective=True)


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna logs to stderr through its own handler; its warnings about experimental parts are known here."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
