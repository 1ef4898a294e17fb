"""Provider failures in a shape both sides understand: our error tree (`copa_harness.errors`) and DSPy's.

DSPy turns any foreign exception an engine raises into an anonymous `LMUnexpectedError`, but passes its own error
classes on untouched, retries the transient ones and shortens histories on context overflow. So every class here is a
`ProviderError` of ours *and* the DSPy error that makes DSPy do the right thing. `MAPPING` has the two trees side by
side, and is all there is to say about which is which.
"""

from __future__ import annotations

import socket
from typing import Any

from dspy.lm15 import LM15Error
from dspy.utils.exceptions import (
    ContextWindowExceededError,
    LMAuthError,
    LMBillingError,
    LMError,
    LMLockTimeoutError,
    LMProviderError,
    LMRateLimitError,
    LMServerError,
    LMTimeoutError,
    LMTransportError,
    LMUnexpectedError,
)

from copa_harness.errors import (
    AuthenticationError,
    BillingError,
    ConnectionFailedError,
    ContextOverflowError,
    CopaError,
    MalformedAnswerError,
    ProviderError,
    ProviderTimeoutError,
    RateLimitError,
    RefusalError,
    ServerFailureError,
)
from copa_harness.lm.dspy_internals import wrap_error


class _Failure(ProviderError):
    """Takes DSPy's error details (`model`, `status`, `retry_after`, ...)."""

    def __init__(self, message: str = "", **details: Any) -> None:
        LMError.__init__(self, message, **details)


class EngineError(_Failure, LMProviderError):
    """The model gave no answer, for good: DSPy does not retry it."""


class UnexpectedEngineError(_Failure, LMUnexpectedError):
    """The engine failed in a way it did not foresee (a bug, a CUDA error); the cause is attached. Not retried."""


class ContextOverflow(ContextWindowExceededError, ContextOverflowError):
    """The prompt plus the tokens asked for do not fit. DSPy's ReAct and RLM react to it; not retried."""

    def __init__(self, message: str = "", *, model: str | None = None) -> None:
        ContextWindowExceededError.__init__(self, model=model, message=message)


class RateLimited(_Failure, RateLimitError, LMRateLimitError):
    """The provider asked to slow down; worth another try after `retry_after` seconds."""


class TimedOut(_Failure, ProviderTimeoutError, LMTimeoutError):
    """No answer in time; worth another try, and possibly billed."""


class ServerFailed(_Failure, ServerFailureError, LMServerError):
    """The provider failed (5xx); worth another try."""


class Disconnected(_Failure, ConnectionFailedError, LMTransportError):
    """The connection failed; worth another try. Billed or not is unknown once the request was sent."""


class AuthFailed(_Failure, AuthenticationError, LMAuthError):
    """The provider does not accept the credentials; trying again is useless."""


class BillingFailed(_Failure, BillingError, LMBillingError):
    """No credit or quota is left; trying again is useless."""


def lets_nobody_in(error: Exception) -> bool:
    """Whether a failure tells of the key or the account, and so of every other call as well.

    HTTP 403 does not: some providers refuse single prompts with it.
    """
    return isinstance(error, BillingFailed) or (isinstance(error, AuthFailed) and error.status != 403)


class Malformed(_Failure, MalformedAnswerError, LMProviderError):
    """What came is no answer; worth another try, and possibly billed."""


class Refused(_Failure, RefusalError, LMProviderError):
    """The model refused. It would again: the refusal is stored like an answer and never paid for twice."""


class LockTimedOut(_Failure, LMLockTimeoutError):
    """A local credential lock was busy; worth another try."""

    transient = True


MAPPING: tuple[tuple[type[ProviderError] | None, Any, Any], ...] = (
    (AuthenticationError, LMAuthError, AuthFailed),
    (BillingError, LMBillingError, BillingFailed),
    (RateLimitError, LMRateLimitError, RateLimited),
    (ProviderTimeoutError, LMTimeoutError, TimedOut),
    (ServerFailureError, LMServerError, ServerFailed),
    (ConnectionFailedError, LMTransportError, Disconnected),
    (MalformedAnswerError, None, Malformed),
    (RefusalError, None, Refused),
    (None, LMLockTimeoutError, LockTimedOut),
    (ProviderError, LMProviderError, EngineError),
)
"""(Ours, DSPy's, what is both); specific before general, as isinstance decides. None where one side has no such."""


def engine_failure(error: Exception, *, model: str) -> Exception:
    """The exception to raise in place of `error`, which an engine raised.

    `MemoryError`, missing dependencies, warnings made errors, and errors of ours that are not about the provider
    (a missing adapter, a wrong setting) come back unchanged.

    Args:
        error: What the engine raised.
        model: Name of the model that was asked.
    """
    if isinstance(error, LMError) and isinstance(error, ProviderError):
        return error
    if isinstance(error, ContextOverflowError):
        return ContextOverflow(str(error), model=model)
    if isinstance(error, ProviderError):
        return _of_ours(error, model=model)
    if isinstance(error, (MemoryError, ImportError, Warning, CopaError)):
        return error
    if isinstance(error, LM15Error):
        wrapped = wrap_error(error, model=model)
        wrapped.__cause__ = error  # what lies behind it tells whether anything was sent
        return engine_failure(wrapped, model=model)
    if isinstance(error, ContextWindowExceededError):
        return ContextOverflow(error.message, model=error.model or model)
    for _, theirs, both in MAPPING:
        if theirs is not None and isinstance(error, theirs):
            return _of_dspys(error, both, model=model)
    if isinstance(error, LMUnexpectedError):
        return UnexpectedEngineError(error.message, model=error.model or model)
    if isinstance(error, LMError):
        about_the_call: Exception = error  # configuration, unsupported features: not the provider's fault
        return about_the_call
    return UnexpectedEngineError(f"{type(error).__name__}: {error}", model=model)


def _of_dspys(error: Any, both: Any, *, model: str) -> Exception:
    """An error of DSPy's tree as ours as well."""
    if both is EngineError and error.status is not None and 200 <= error.status < 300:
        both = Malformed  # a success without an answer in it
    failure: Exception = both(
        error.message,
        model=error.model or model,
        provider=error.provider,
        provider_code=error.provider_code,
        status=error.status,
        request_id=error.request_id,
        retry_after=error.retry_after,
    )
    if isinstance(failure, Disconnected) and not _never_sent(error):
        failure.billed = None
    return failure


def _of_ours(error: ProviderError, *, model: str) -> Exception:
    """An error of our tree as DSPy's as well; its kind, and who pays for it, stay as they are."""
    both = next(both for ours, _, both in MAPPING if ours is not None and isinstance(error, ours))
    details = {name: getattr(error, name, None) for name in ("status", "retry_after", "provider")}
    failure: Any = both(str(error), model=model, **details)
    failure.kind, failure.billed = error.kind, error.billed
    checked: Exception = failure
    return checked


_NO_CONNECTION = frozenset({"ConnectError", "ConnectTimeout", "ClientConnectorError", "NewConnectionError"})
"""Exceptions of lm15, httpx, aiohttp and urllib3 that say that no connection came about."""


def _never_sent(error: BaseException) -> bool:
    """Whether an error or one behind it says that no connection came about, so nothing can be billed."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, (ConnectionRefusedError, socket.gaierror)) or type(link).__name__ in _NO_CONNECTION:
            return True
        if "connection refused" in str(link).lower():
            return True
        link = link.__cause__ or link.__context__
    return False


def passed_through_dspy(error: LMUnexpectedError) -> BaseException | None:
    """The exception DSPy hid inside an `LMUnexpectedError` although it must reach the caller as it is, or None."""
    cause = error.__cause__
    return cause if isinstance(cause, (MemoryError, CopaError)) else None
