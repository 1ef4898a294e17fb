"""Retries and concurrency: what holds calls back, for how long, and when everybody gives up."""

import contextlib
import time

import pytest

from copa_harness.lm.provider_errors import RateLimited, ServerFailed
from copa_harness.lm.retry import AdaptiveConcurrency, RetryPolicy


def refuse(concurrency, *, retry_after=None):
    with contextlib.suppress(RateLimited), concurrency.turn():
        raise RateLimited("slow down", retry_after=retry_after)


def test_a_pause_the_provider_asks_for_holds_everybody_back():
    concurrency = AdaptiveConcurrency()
    refuse(concurrency, retry_after=0.2)
    started = time.monotonic()
    with concurrency.turn():
        assert time.monotonic() - started > 0.15


def test_a_pause_longer_than_anybody_bears_holds_nobody_back():
    concurrency = AdaptiveConcurrency(longest_wait_s=1.0)
    refuse(concurrency, retry_after=3600)
    started = time.monotonic()
    with concurrency.turn():
        assert time.monotonic() - started < 1.0


@pytest.mark.parametrize(("error", "goes_on"), [(RateLimited("slow"), False), (ServerFailed("boom"), True)])
def test_once_all_calls_have_been_refused_for_too_long_none_is_put_off_again(error, goes_on):
    concurrency = AdaptiveConcurrency()
    asked = {"n_failed": 1, "n_slowed": 1, "waited_s": 0.0}
    refuse(concurrency)
    assert 0 < concurrency.refused_s < 0.05
    time.sleep(0.06)
    policy = RetryPolicy(3, give_up_after_s=0.05, first_pause_s=0.001)
    assert policy.pause_s(error, **asked) is not None
    assert policy.gives_up(error, refused_s=concurrency.refused_s) is not goes_on


def test_an_answer_ends_the_time_of_refusals():
    concurrency = AdaptiveConcurrency()
    refuse(concurrency)
    with concurrency.turn():
        pass
    assert concurrency.refused_s == 0.0
