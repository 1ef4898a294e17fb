"""The fast path to the gateway asks exactly what DSPy's own way asks, or leaves the call to DSPy.

With the switch in either position: on, requests are built here; off, DSPy builds them.
"""

import os
import warnings
from unittest import mock

import dspy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copa_harness.lm.dspy_internals import SWITCH, RequestBuilder, fast_path_enabled, is_plain_call
from copa_harness.lm.scripted import ScriptedLM

ROWS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text(max_size=8)}
    ),
    min_size=1,
    max_size=4,
)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([None, 0, 0.0, 0.7, 1, 1.0]),
        "max_tokens": st.sampled_from([None, 5]),
        "top_p": st.sampled_from([0.5, 1]),
        "stop": st.sampled_from(["x", ["x", "y"]]),
        "n": st.sampled_from([None, 1, 2]),
        "seed": st.integers(0, 3),
        "rollout_id": st.integers(1, 3),
        "cache": st.booleans(),
        "presence_penalty": st.sampled_from([0.5]),
        "response_format": st.sampled_from([{"type": "json_object"}]),
    },
)
SHARED = RequestBuilder()


def switched(position):
    """The fast path on or off, for a block."""
    return mock.patch.dict(os.environ, {SWITCH: position})


def asked(lm, messages, call_settings):
    """Calls an LM with nothing printed; the class of the error if there was one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # OpenAI-style messages, rollouts at temperature 0
        try:
            lm(messages=[dict(row) for row in messages], **call_settings)
        except Exception as error:  # noqa: BLE001 - whatever DSPy raises, both ways raise it
            return type(error)
    return None


def asked_of_dspy(messages, call_settings):
    """The request DSPy makes."""
    seen = []

    class Engine:
        def __deepcopy__(self, memo):
            return self

        def complete(self, request):
            seen.append(request)
            return dspy.lm15.Response(
                id=None,
                model="m",
                message=dspy.lm15.Message.assistant("a"),
                finish_reason="stop",
                usage=dspy.lm15.Usage(),
            )

    lm = dspy.LM("m", engine=Engine(), cache=False, num_retries=0)
    error = asked(lm, messages, {k: v for k, v in call_settings.items() if k not in ("cache", "rollout_id")})
    return seen[0] if error is None else error


@settings(max_examples=150)
@given(messages=ROWS, call_settings=SETTINGS)
def test_the_request_is_the_one_dspy_makes(messages, call_settings):
    ours = SHARED.request("m", messages, call_settings)
    if ours is not None:
        theirs = asked_of_dspy(messages, call_settings)
        assert ours == theirs
        assert repr(ours.config) == repr(theirs.config)  # 1 and 1.0 are equal, and different keys


@pytest.mark.parametrize("position", ["1", "0"])
@settings(max_examples=100, deadline=None)
@given(messages=ROWS, call_settings=SETTINGS)
def test_a_call_through_the_gateway_asks_what_dspy_would_in_both_positions_of_the_switch(
    position, messages, call_settings
):
    lm = ScriptedLM("a", model="m", temperature=None)
    with switched(position), dspy.context(disable_history=True):
        assert fast_path_enabled() is is_plain_call(lm) is (position == "1")
        error = asked(lm, messages, call_settings)
    ours = lm.requests[0].request if error is None else error
    theirs = asked_of_dspy(messages, call_settings)
    assert ours == theirs
    if error is None:
        assert repr(ours) == repr(theirs)


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        [{"role": "user", "content": "x", "name": "n"}],
        [{"role": "user", "content": "lone \ud800"}],
        [{"role": "system", "content": "x"}],
        ["x"],
    ],
)
def test_what_is_not_plain_text_is_left_to_dspy(messages):
    assert SHARED.request("m", messages, {}) is None


@pytest.mark.parametrize("extra", [{"n": 2}, {"n": True}, {"logprobs": True}, {"api_key": "k"}, {"tools": []}])
def test_what_is_more_than_one_plain_completion_is_left_to_dspy(extra):
    assert SHARED.request("m", [{"role": "user", "content": "x"}], extra) is None


def test_both_ways_share_one_answer_and_give_the_same():
    lm = ScriptedLM(["[[ ## answer ## ]]\n7"], temperature=0.0)
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    long_way = program(question="q").answer
    with dspy.context(disable_history=True):
        assert program(question="q").answer == long_way == "7"
    assert len(lm.requests) == 1


def test_a_history_is_kept_when_it_is_wanted():
    lm = ScriptedLM(["[[ ## answer ## ]]\n7"])
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    program(question="q")
    assert len(lm.history) == 1
