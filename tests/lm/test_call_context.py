"""One context per call: it reaches the threads DSPy starts, ends with its block, and calls inside calls have theirs."""

import asyncio
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest

from copa_harness.lm.budget.scope import Scope
from copa_harness.lm.call_context import (
    CallContext,
    NotCachedError,
    booked_as,
    current_call,
    current_context,
    dry_run,
    in_context,
    observing,
    open_scope,
    repeated,
    time_left_s,
)
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.results import Budget, Phase


def in_dspys_threads(action, n=2):
    """What `action` gives in worker threads of DSPy."""
    return dspy.Parallel(num_threads=n, disable_progress_bar=True)([(lambda x: action(), {"x": i}) for i in range(n)])


def test_it_is_one_frozen_record():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CallContext().repeat = 1


def test_all_of_it_reaches_the_threads_dspy_starts():
    scope = Scope("t")
    with in_context(scope=scope, phase=Phase.METRIC, repeat=3, label_scores=True), observing() as observer:
        expected = CallContext(scope=scope, phase=Phase.METRIC, repeat=3, label_scores=True, observer=observer)
        assert in_dspys_threads(current_context) == [expected] * 2
    assert current_context() == CallContext()


def test_a_thread_of_ones_own_is_handed_the_context():
    scope = Scope("t")
    with in_context(scope=scope) as context, ThreadPoolExecutor(1) as pool:

        def handed():
            with in_context(scope=context.scope):
                return current_context().scope

        assert pool.submit(handed).result() is scope
        assert pool.submit(current_context).result() == CallContext()


def test_calls_of_a_metric_that_asks_in_dspys_threads_are_booked_as_the_metrics():
    lm = ScriptedLM("x")
    with open_scope("t") as scope, booked_as(Phase.METRIC):
        in_dspys_threads(lambda: lm("judge this"))
    assert list(scope.phase_usages()) == ["metric"]


def test_a_dry_run_and_a_repeat_hold_in_dspys_threads():
    lm = ScriptedLM(lambda messages, seed: str(seed))
    with repeated(2):
        assert len({tuple(answer) for answer in in_dspys_threads(lambda: lm("a"))}) == 1

    def asked():
        with pytest.raises(NotCachedError):
            lm("b")
        return lm("a")

    with repeated(2), dry_run() as run:
        in_dspys_threads(asked)
    assert (run.usage.paid_calls, run.usage.cached_calls) == (1, 1)
    assert lm.calls == 1


def test_the_call_under_way_knows_its_rollout_and_its_time_and_nobody_else_does():
    seen = []
    lm = ScriptedLM(lambda messages: seen.append((current_call(), time_left_s())) or "x")
    with open_scope("t", budget=Budget(seconds=30)) as scope, repeated(1):
        lm("a", rollout_id=7, temperature=1.0)
    (call, left_s), *_ = seen
    assert (call.scope, call.repeat, call.rollout_id) == (scope, 1, {"repeat": 1, "rollout": 7})
    assert 29 < left_s <= 30
    assert current_call() is None


def test_a_call_made_inside_a_call_pays_for_itself():
    inner = ScriptedLM("inner")

    def answer(messages):
        with open_scope("inner") as scope:
            inner("b")
        assert scope.usage().paid_calls == 1
        assert current_call().scope is outer
        return "outer"

    with open_scope("outer") as outer:
        assert ScriptedLM(answer)("a") == ["outer"]
    assert outer.usage().paid_calls == 1


def test_candidates_of_one_call_are_told_apart_and_kept_in_async_calls_too():
    lm = ScriptedLM(lambda messages, seed: str(seed), temperature=1.0)
    answers = lm("a", n=3)
    assert len(set(answers)) == 3
    assert asyncio.run(lm.acall("a", n=3)) == answers
    assert lm.calls == 3
