"""Retries and concurrency: what holds calls back, for how long, and when everybody gives up."""

import contextlib
import threading
from types import SimpleNamespace

import pytest

from copa_harness.lm import retry
from copa_harness.lm.provider_errors import RateLimited, ServerFailed
from copa_harness.lm.retry import AdaptiveConcurrency, RetryPolicy


class Clock:
    """Time that passes only while somebody waits, or by `now += ...`."""

    def __init__(self):
        self.now, self.waits = 100.0, []

    def wait(self, timeout):
        self.waits.append(timeout)
        self.now += timeout


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=lambda: clock.now))

    class Condition(threading.Condition):
        def wait(self, timeout=None):
            clock.wait(timeout)

    monkeypatch.setattr(retry, "threading", SimpleNamespace(Condition=Condition))
    return clock


def refuse(concurrency, *, retry_after=None):
    with contextlib.suppress(RateLimited), concurrency.turn():
        raise RateLimited("slow down", retry_after=retry_after)


def test_a_pause_the_provider_asks_for_holds_everybody_back(clock):
    concurrency = AdaptiveConcurrency()
    refuse(concurrency, retry_after=20)
    with concurrency.turn():
        assert clock.waits == [20]


def test_a_pause_longer_than_anybody_bears_holds_nobody_back(clock):
    concurrency = AdaptiveConcurrency(longest_wait_s=60)
    refuse(concurrency, retry_after=3600)
    with concurrency.turn():
        assert clock.waits == []


@pytest.mark.parametrize(("error", "goes_on"), [(RateLimited("slow"), False), (ServerFailed("boom"), True)])
def test_once_all_calls_have_been_refused_for_too_long_none_is_put_off_again(error, goes_on, clock):
    concurrency = AdaptiveConcurrency()
    asked = {"n_failed": 1, "n_slowed": 1, "waited_s": 0.0}
    refuse(concurrency)
    policy = RetryPolicy(3, give_up_after_s=60)
    clock.now += 60
    assert concurrency.refused_s == 60
    assert not policy.gives_up(error, refused_s=concurrency.refused_s)
    clock.now += 1
    assert policy.pause_s(error, **asked) is not None
    assert policy.gives_up(error, refused_s=concurrency.refused_s) is not goes_on


def test_an_answer_ends_the_time_of_refusals(clock):
    concurrency = AdaptiveConcurrency()
    refuse(concurrency)
    clock.now += 1
    assert concurrency.refused_s == 1
    with concurrency.turn():
        pass
    assert concurrency.refused_s == 0.0
