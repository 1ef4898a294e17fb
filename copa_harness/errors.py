"""The error tree: every way this package refuses, with what was got, what was expected and what to do.

Knows nothing of pytest, DSPy or torch. `BudgetExhausted` is the one class outside `Exception`: DSPy's
optimizers swallow ordinary exceptions and would score a spent budget as wrong answers.
"""

from __future__ import annotations


class CopaError(Exception):
    """Base of every ordinary error raised by copa_harness."""


class ConfigurationError(CopaError):
    """A setting, option or marker argument cannot be used; the pytest plugin turns it into a usage error."""


class TaskError(ConfigurationError):
    """A task is malformed: an empty split, a missing field, overlapping splits, a program without predictors."""


class ProviderError(CopaError):
    """The model gave no answer (network, server, out of memory). Never counted as a wrong answer."""


class ContextOverflowError(ProviderError):
    """The prompt plus the tokens asked for do not fit the model's context window."""


class MetricError(CopaError):
    """The metric raised, or returned something that is not a number in 0..1."""


class CacheError(CopaError):
    """The response cache cannot be used at all (damaged entries alone are misses with a warning)."""


class TrainingError(CopaError):
    """Fine-tuning cannot start or did not finish: no rows, over-long rows, diverging loss."""


class ArtifactError(CopaError):
    """A stored artifact or LoRA adapter is missing, incomplete, or does not match its manifest."""


class BudgetExhausted(BaseException):
    """The budget refuses another model call.

    A `BaseException` on purpose: DSPy's optimizers catch `Exception` and would go on, scoring refused
    calls as zero. Whoever opened the scope catches it and keeps the best program found so far.
    """
