"""The error tree: every way this package refuses, with what was got, what was expected and what to do.

`BudgetExhausted` is the one class outside `Exception`: DSPy's optimizers swallow ordinary exceptions and would score a
spent budget as wrong answers.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from copa_harness.formatting import visible


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`. Did you mean 'near'?` for a word nobody knows, or nothing where none of the known ones is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f". Did you mean {near[0]!r}?" if near else ""


class CopaError(Exception):
    """Base of every ordinary error raised by copa_harness. Its text may quote strangers and obeys none of them."""

    def __str__(self) -> str:
        return visible(super().__str__())


class ConfigurationError(CopaError):
    """A setting, option or marker argument cannot be used; the pytest plugin turns it into a usage error."""


class TaskError(ConfigurationError):
    """A task is malformed: an empty split, a missing field, overlapping splits, a program without predictors."""


class OutOfMemoryError(CopaError):
    """This machine's memory does not suffice for a local model, a prompt or a training.

    No provider's failure: it says nothing of the program, and what fits elsewhere must not count as a failed answer
    here. So it ends the run, which can be started again and goes on where it was.
    """


class ProviderError(CopaError):
    """The model gave no answer (network, server). Never counted as a wrong answer.

    Attributes:
        kind: Under which name failures of this class are counted.
        billed: Whether the provider charges for the call: None when nobody can know. What is not certainly free is
            booked at the worst case that was reserved for it.
        transient: Whether another try may mend it.
    """

    kind = "provider"
    billed: bool | None = False
    transient = False


class ContextOverflowError(ProviderError):
    """The prompt plus the tokens asked for do not fit the model's context window."""

    kind = "context overflow"


class RateLimitError(ProviderError):
    """The provider asked to slow down (HTTP 429)."""

    kind = "rate limit"
    transient = True


class ProviderTimeoutError(ProviderError):
    """No answer in time. The provider may be working on it still, and bill it."""

    kind = "timeout"
    transient = True
    billed = None


class ServerFailureError(ProviderError):
    """The provider failed (HTTP 5xx)."""

    kind = "server error"
    transient = True


class ConnectionFailedError(ProviderError):
    """The connection could not be made, or broke."""

    kind = "connection"
    transient = True


class AuthenticationError(ProviderError):
    """The provider does not accept the credentials (HTTP 401, 403)."""

    kind = "authentication"


class BillingError(ProviderError):
    """The account has no credit or quota left (HTTP 402, `insufficient_quota`)."""

    kind = "billing"


class MalformedAnswerError(ProviderError):
    """The provider sent something, and it is no answer: broken JSON, missing fields."""

    kind = "malformed answer"
    transient = True
    billed = None


class RefusalError(ProviderError):
    """The model or the provider's content filter refused to answer."""

    kind = "refusal"
    billed = True


class MetricError(CopaError):
    """The metric raised, or returned something that is not a number in 0..1."""


class CacheError(CopaError):
    """The response cache cannot be used at all (damaged entries alone are misses with a warning)."""


class TrainingError(CopaError):
    """Fine-tuning cannot start or did not finish: no rows, over-long rows, diverging loss."""


class NoTrainingRowsError(TrainingError):
    """There is nothing to train on: no answer passed, every row is too long, or making rows is not affordable."""


class TrainingDivergedError(TrainingError):
    """The loss became infinite or far larger than it was; the message names a setting to try."""


class TrainingMemoryError(TrainingError, OutOfMemoryError):
    """A training step needs more memory than there is.

    What was trained up to the last epoch is kept; the same training goes on there.
    """


class ArtifactError(CopaError):
    """A stored artifact or LoRA adapter is missing, incomplete, or does not match its manifest."""


class BudgetExhausted(BaseException):
    """The budget refuses another model call.

    A `BaseException` on purpose: DSPy's optimizers catch `Exception` and would go on, scoring refused
    calls as zero. Whoever opened the scope catches it and keeps the best program found so far.
    """
