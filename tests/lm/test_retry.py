"""The pace and patience: what holds calls back, for how long, and when everybody gives up."""

import contextlib
import time

import pytest

from copa_harness.lm.provider_errors import RateLimited, ServerFailed
from copa_harness.lm.retry import Pace, Patience, RetryPolicy


def refuse(pace, *, retry_after=None):
    with contextlib.suppress(RateLimited), pace.turn():
        raise RateLimited("slow down", retry_after=retry_after)


def test_a_pause_the_provider_asks_for_holds_everybody_back():
    pace = Pace()
    refuse(pace, retry_after=0.2)
    started = time.monotonic()
    with pace.turn():
        assert time.monotonic() - started > 0.15


def test_a_pause_longer_than_anybody_bears_holds_nobody_back():
    pace = Pace(longest_wait_s=1.0)
    refuse(pace, retry_after=3600)
    started = time.monotonic()
    with pace.turn():
        assert time.monotonic() - started < 1.0


@pytest.mark.parametrize(("error", "goes_on"), [(RateLimited("slow"), False), (ServerFailed("boom"), True)])
def test_once_all_calls_have_been_refused_for_too_long_none_is_put_off_again(error, goes_on):
    pace = Pace()
    asked = {"n_failed": 1, "n_slowed": 1, "waited_s": 0.0}
    refuse(pace)
    assert 0 < pace.refused_s < 0.05
    time.sleep(0.06)
    patience = Patience(RetryPolicy(3, patience_s=0.05, first_pause_s=0.001), pace)
    assert (patience.pause_s(error, **asked) is not None) is goes_on


def test_an_answer_ends_the_time_of_refusals():
    pace = Pace()
    refuse(pace)
    with pace.turn():
        pass
    assert pace.refused_s == 0.0
