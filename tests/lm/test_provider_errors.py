"""Engine failures: an error of ours that is also the DSPy error DSPy acts upon."""

import dspy
import pytest
from dspy import lm15
from dspy.utils.exceptions import LMLockTimeoutError, LMProviderError, LMTransportError, is_retryable_lm_error

from copa_harness.errors import (
    ArtifactError,
    AuthenticationError,
    BillingError,
    ConnectionFailedError,
    ContextOverflowError,
    MalformedAnswerError,
    ProviderError,
    ProviderTimeoutError,
    RateLimitError,
    RefusalError,
    ServerFailureError,
)
from copa_harness.lm.provider_errors import engine_failure


@pytest.mark.parametrize(
    ("error", "dspys", "is_retried"),
    [
        (lm15.RateLimitError("x"), dspy.LMRateLimitError, True),
        (lm15.TimeoutError("x"), dspy.LMTimeoutError, True),
        (lm15.ServerError("x"), dspy.LMServerError, True),
        (lm15.TransportError("x"), LMTransportError, True),
        (LMLockTimeoutError("x"), LMLockTimeoutError, True),
        (lm15.AuthError("x"), LMProviderError, False),
        (lm15.InvalidRequestError("x"), LMProviderError, False),
        (ProviderError("x"), LMProviderError, False),
        (ValueError("x"), dspy.LMUnexpectedError, False),
        (lm15.LM15Error("x"), dspy.LMUnexpectedError, False),
        (lm15.ContextLengthError("x"), dspy.ContextWindowExceededError, False),
        (ContextOverflowError("x"), dspy.ContextWindowExceededError, False),
    ],
)
def test_every_failure_of_a_provider_is_both_kinds_of_error(error, dspys, is_retried):
    failure = engine_failure(error, model="m")
    assert isinstance(failure, ProviderError)
    assert isinstance(failure, dspys)
    assert is_retryable_lm_error(failure) == is_retried
    assert isinstance(failure, ContextOverflowError) == isinstance(failure, dspy.ContextWindowExceededError)
    assert "[m]" in str(failure)
    assert "x" in str(failure)
    assert engine_failure(failure, model="m") is failure


class MyTimeout(ProviderTimeoutError):
    kind = "my timeout"


@pytest.mark.parametrize(
    ("error", "dspys", "billed"),
    [
        (RateLimitError("x"), dspy.LMRateLimitError, False),
        (ProviderTimeoutError("x"), dspy.LMTimeoutError, None),
        (MyTimeout("x"), dspy.LMTimeoutError, None),
        (ServerFailureError("x"), dspy.LMServerError, False),
        (ConnectionFailedError("x"), LMTransportError, False),
        (AuthenticationError("x"), dspy.LMAuthError, False),
        (BillingError("x"), LMProviderError, False),
        (MalformedAnswerError("x"), LMProviderError, None),
        (RefusalError("x"), LMProviderError, True),
    ],
)
def test_an_error_of_ours_that_an_engine_raised_keeps_its_kind_and_who_pays(error, dspys, billed):
    failure = engine_failure(error, model="m")
    assert isinstance(failure, dspys)
    assert isinstance(failure, next(base for base in type(error).__mro__ if base.__module__ == "copa_harness.errors"))
    assert (failure.kind, failure.billed) == (error.kind, billed)


def test_details_of_the_provider_are_kept():
    error = lm15.RateLimitError("slow", status=429, retry_after=7.0, request_id="r1", provider="openai")
    failure = engine_failure(error, model="m")
    assert (failure.status, failure.retry_after, failure.request_id, failure.provider) == (429, 7.0, "r1", "openai")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), ArtifactError("gone"), ImportError("x"), UserWarning("x"), dspy.LMConfigurationError("no key")],
)
def test_what_is_not_the_providers_fault_stays_as_it_is(error):
    assert engine_failure(error, model="m") is error
