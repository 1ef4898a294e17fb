"""The cache key: equal requests share it, anything that could change the answer changes it."""

import copy
import json
from dataclasses import replace

import pytest
from dspy.lm15 import Config, FunctionTool, Message, Request, Response, TextPart, Usage
from hypothesis import assume, given
from hypothesis import strategies as st

from copa_harness.lm.cache.keys import replayed_response, request_key, response_record
from copa_harness.lm.engine import seed_of

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)
configs = st.builds(
    Config,
    max_tokens=st.none() | st.integers(1, 4096),
    temperature=st.none() | st.floats(0, 2),
    top_p=st.none() | st.floats(0.01, 1),
    stop=st.lists(texts, max_size=2).map(tuple),
    seed=st.none() | st.integers(0, 2**31),
)
messages = st.builds(lambda role, text: getattr(Message, role)(text), st.sampled_from(["user", "assistant"]), texts)
requests = st.builds(
    Request,
    model=st.sampled_from(["embedded", "embedded@0123", "openai/gpt-4o-mini"]),
    messages=st.lists(messages, min_size=1, max_size=4).map(tuple),
    system=st.none() | texts,
    config=configs,
)
identities = st.tuples(st.none() | st.integers(0, 5), st.integers(0, 5), texts)


def key(request, identity=(None, 0, "weights")):
    rollout_id, candidate, fingerprint = identity
    return request_key(request, rollout_id=rollout_id, candidate=candidate, fingerprint=fingerprint)


@given(requests, identities)
def test_equal_requests_have_equal_keys(request_, identity):
    twin = copy.deepcopy(request_)
    assert twin == request_
    assert key(twin, identity) == key(request_, identity)


@given(requests, requests)
def test_different_requests_have_different_keys(one, other):
    assume(one != other)
    assert key(one) != key(other)


@given(requests, identities, identities)
def test_another_rollout_candidate_or_fingerprint_has_another_key(request_, one, other):
    assume(one != other)
    assert key(request_, one) != key(request_, other)


@given(st.lists(texts, min_size=2, max_size=4), texts)
def test_text_moved_across_a_message_border_changes_the_key(parts, tail):
    split = Request(model="m", messages=tuple(Message.user(part) for part in [*parts, tail]))
    joined = Request(model="m", messages=tuple(Message.user(part) for part in [*parts[:-1], parts[-1] + tail]))
    assert key(split) != key(joined)


def test_the_order_of_properties_in_a_tool_is_part_of_the_key_because_templates_print_it():
    def ask(*names):
        parameters = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
        tool = FunctionTool(name="f", description="d", parameters=parameters)
        return Request(model="m", messages=(Message.user("x"),), tools=(tool,))

    assert key(ask("a", "b")) != key(ask("b", "a"))


def test_a_key_is_the_same_in_every_process_and_release_of_this_format():
    request_ = Request(model="embedded", messages=(Message.user("3 + 4"),), config=Config(temperature=0, max_tokens=64))
    assert key(request_) == "e07c9f16824f844c09c5857948dd7981c7395a4ec98429ae6c28f4df72cb22dd"


def test_a_whole_number_temperature_is_the_same_setting_as_the_float():
    ask = Request(model="m", messages=(Message.user("x"),), config=Config(temperature=1))
    assert key(ask) == key(replace(ask, config=Config(temperature=1.0)))


def test_a_value_that_is_not_json_is_refused_rather_than_guessed():
    request_ = Request(model="m", messages=(Message.user("x"),))
    with pytest.raises(TypeError, match="got a object inside a model request"):
        key(request_, (object(), 0, "weights"))


def test_an_answer_survives_the_way_to_json_and_back_but_for_its_usage():
    answer = Response(
        id="r1",
        model="m",
        message=Message.assistant(TextPart("grüße")),
        finish_reason="stop",
        usage=Usage(input_tokens=3, output_tokens=2),
        provider_data={"headers": {"set-cookie": "secret"}},
    )
    record = json.loads(json.dumps(response_record(answer)))
    assert "secret" not in json.dumps(record)
    assert replayed_response(record) == replace(answer, usage=Usage(), provider_data=None)


@given(st.none() | st.integers(), st.integers(0, 20))
def test_the_seed_of_a_repeat_is_stable_and_zero_only_for_the_plain_request(rollout_id, candidate):
    seed = seed_of(rollout_id, candidate)
    assert seed == seed_of(rollout_id, candidate)
    assert (seed == 0) == (rollout_id is None and candidate == 0)
    assert 0 <= seed < 2**31
