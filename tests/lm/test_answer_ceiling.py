"""The ceiling on answers: derived from the output fields, sent with the request; the user's own goes before."""

import contextlib
import enum
from typing import Any, Literal

import dspy
import pytest
from dspy.lm15 import Config, Message, Request

from copa_harness.errors import ContextOverflowError
from copa_harness.lm.answer_ceiling import FREE_TEXT_TOKENS, STOP, ceiling_of, value_tokens
from copa_harness.lm.call_context import CallContext, calling, ceiling_gives_way, open_scope
from copa_harness.lm.dspy_internals import prompt_adapter
from copa_harness.lm.factory import build_lm, meter_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local.engine import rules_of
from copa_harness.lm.metered import MeteredLM
from copa_harness.lm.scripted import ScriptedEngine, ScriptedLM, chat_fields
from copa_harness.results import Budget

ADAPTER = prompt_adapter(use_json_adapter_fallback=False)


class Hue(enum.Enum):
    RED = "red"
    TURQUOISE = "turquoise"


class Route(dspy.Signature):
    """Send it to a queue."""

    text: str = dspy.InputField()
    queue: Literal["billing", "technical support"] = dspy.OutputField()
    urgent: bool = dspy.OutputField()
    score: int = dspy.OutputField()


@pytest.mark.parametrize(
    ("annotation", "tokens"),
    [
        (Literal["a", "long one"], 8),
        (Literal["grün"], 5),
        (Hue, 9),
        (bool, 5),
        (int, 24),
        (float, 24),
        (int | None, 24),
        (str, FREE_TEXT_TOKENS),
        (str | None, FREE_TEXT_TOKENS),
        (list[int], FREE_TEXT_TOKENS),
        (Any, FREE_TEXT_TOKENS),
    ],
)
def test_a_value_needs_the_bytes_of_the_longest_that_is_allowed_and_free_text_512(annotation, tokens):
    assert value_tokens(annotation) == tokens


def test_every_well_formed_answer_has_fewer_bytes_than_the_ceiling_so_no_tokenizer_can_need_more():
    answers = [
        {"queue": queue, "urgent": urgent, "score": score}
        for queue in ("billing", "technical support")
        for urgent in ("True", "False")
        for score in ("7", "-123456789012345678")
    ]
    assert max(len(chat_fields(answer).encode()) for answer in answers) < ceiling_of(Route) < 200


def test_reasoning_and_answer_have_room_each():
    thinking = dspy.ChainOfThought("question -> answer").predict.signature
    assert 2 * FREE_TEXT_TOKENS < ceiling_of(thinking) < 2 * FREE_TEXT_TOKENS + 200


def asked(program, lm, *, adapter=ADAPTER, **inputs):
    """The settings of the request that reached the script."""
    with dspy.context(lm=lm, adapter=adapter, disable_history=True):
        program(**inputs)
    return lm.requests[-1].request.config


def routed(**kwargs):
    answer = {"queue": "billing", "urgent": "True", "score": "3"}
    return ScriptedLM(lambda messages: answer, **{"answer_tokens": "derived", **kwargs})


@pytest.mark.parametrize("fast", ["0", "1"])
def test_a_call_without_a_ceiling_gets_one_and_stops_at_the_last_marker(monkeypatch, fast):
    monkeypatch.setenv("COPA_FAST_PATH", fast)
    config = asked(dspy.Predict(Route), routed(), text="x")
    assert config.max_tokens == ceiling_of(Route)
    assert config.stop == (STOP,)


def test_the_users_own_ceiling_goes_before_on_the_model_and_in_the_call():
    assert asked(dspy.Predict(Route), routed(max_tokens=7), text="x").max_tokens == 7
    config = asked(dspy.Predict(Route, max_tokens=9), routed(), text="x")
    assert (config.max_tokens, config.stop) == (9, ())


def test_a_given_number_is_the_ceiling_and_none_adds_nothing():
    assert asked(dspy.Predict(Route), routed(answer_tokens=50), text="x").max_tokens == 50
    config = asked(dspy.Predict(Route), routed(answer_tokens=None), text="x")
    assert (config.max_tokens, config.stop) == (None, ())


def test_the_users_own_stop_strings_are_left_alone():
    config = asked(dspy.Predict(Route), routed(stop=["END"]), text="x")
    assert config.stop == ("END",)
    assert config.max_tokens == ceiling_of(Route)


def test_in_another_layout_every_field_counts_as_free_text_and_nothing_stops():
    lm = ScriptedLM('{"queue": "billing", "urgent": true, "score": 3}', answer_tokens="derived")
    config = asked(dspy.Predict(Route), lm, adapter=dspy.JSONAdapter(), text="x")
    assert config.max_tokens == 4 * FREE_TEXT_TOKENS
    assert config.stop == ()


def test_a_call_of_no_predictor_is_left_alone():
    class Asks(dspy.Module):
        def forward(self, text):
            return dspy.Prediction(answer=dspy.settings.lm(text)[0])

    lm = ScriptedLM("so", answer_tokens="derived")
    assert asked(Asks(), lm, text="x").max_tokens is None


def test_a_budget_of_tokens_can_be_kept_without_max_tokens():
    lm = routed()
    with open_scope("test", budget=Budget(tokens=10_000)) as scope:
        asked(dspy.Predict(Route), lm, text="x")
    assert scope.usage().paid_calls == 1


@pytest.mark.parametrize(
    "text",
    [
        "[[ ## queue ## ]]\nbilling\n\n[[ ## completed ## ]]\nand so on [[ ## queue ## ]]\ntechnical support",
        "Sure, I end with `[[ ## completed ## ]]`:\n[[ ## queue ## ]]\nbilling\n[[ ## completed ## ]]",
        "[[ ## queue ## ]]\nbilling\n\n[[ ## completed ## ]]\n\n[[ ## queue ## ]]\ntechnical support",
        "[[ ## queue ## ]] billing",
        "well",
    ],
)
def test_what_is_cut_at_the_stop_was_not_parsed_before(text):
    signature = dspy.Signature({"text": (str, dspy.InputField()), "queue": (str, dspy.OutputField())}, "Route it.")

    def parsed(answer):
        try:
            return ADAPTER.parse(signature, answer)
        except dspy.utils.exceptions.AdapterParseError:
            return None

    before, stop, _ = text.partition(STOP)
    assert parsed(before) == parsed(text) or (stop and "completed" in parsed(text)["queue"])


# -- models by name


@pytest.fixture
def build(no_gateways, tmp_path):
    return lambda spec, **settings: build_lm(spec, gateway=Gateway(cache=None), cache_dir=tmp_path, **settings)


def test_the_embedded_model_is_asked_as_it_always_was(build):
    lm = build("embedded")
    assert lm.kwargs["max_tokens"] == 64
    assert build("embedded", answer_tokens=20).kwargs["max_tokens"] == 20


def test_zero_sets_no_ceiling(build):
    assert build("openai/gpt-4o-mini", answer_tokens=0).answer_tokens is None
    assert build("openai/gpt-4o-mini").answer_tokens == "derived"


def sent(stub, lm, signature=Route):
    unparsed = contextlib.suppress(dspy.utils.exceptions.AdapterParseError)
    with dspy.context(lm=lm, adapter=ADAPTER, disable_history=True), unparsed:
        dspy.Predict(signature)(text="x")
    return stub.bodies[-1]


def test_a_server_of_ones_own_is_sent_the_ceiling_and_the_stop(build, stub):
    # The second is how DSPy spells it for the provider openai.
    for name, key in (("hosted_vllm/local", "max_tokens"), ("openai/local", "max_completion_tokens")):
        body = sent(stub, build(name, api_base=stub.url, api_key="k"))
        assert body[key] == max(256, ceiling_of(Route))
        assert body["stop"] == [STOP]


def test_an_endpoint_elsewhere_is_sent_the_ceiling_alone(build, stub, monkeypatch):
    monkeypatch.setattr("copa_harness.lm.endpoint.engine.is_own_network", lambda url: False)
    body = sent(stub, build("openai/gpt-4o-mini", api_base=stub.url, api_key="k"))
    assert body["max_completion_tokens"] == 256
    assert "stop" not in body


def test_a_model_that_thinks_before_it_answers_is_sent_no_ceiling(build, stub):
    body = sent(stub, build("openai/gpt-5-mini", api_base=stub.url, api_key="k"))
    assert not {"max_tokens", "max_completion_tokens"} & set(body)


def test_an_lm_of_the_users_keeps_its_own_ceiling(no_gateways, stub):
    plain = dspy.LM("openai/local", api_base=stub.url, api_key="k", max_tokens=33, cache=False)
    assert sent(stub, meter_lm(plain, gateway=Gateway(cache=None)))["max_completion_tokens"] == 33


@pytest.mark.parametrize(
    ("url", "own"),
    [
        ("http://localhost:8080/v1", True),
        ("http://127.0.0.1:8080", True),
        ("http://[::1]:8080/v1", True),
        ("http://192.168.3.4/v1", True),
        ("http://gpu.local/v1", True),
        ("https://api.openai.com/v1", False),
        ("https://8.8.8.8/v1", False),
        ("https://localhost.example.com/v1", False),
    ],
)
def test_which_servers_are_ones_own(url, own):
    from copa_harness.lm.endpoint.engine import is_own_network

    assert is_own_network(url) is own


def test_a_ceiling_of_ours_gives_way_to_the_room_that_the_context_leaves_and_the_users_does_not():
    request = Request(model="hf:tiny", messages=(Message.user("x"),), config=Config(max_tokens=90))

    def rules():
        return rules_of(request, 0, prompt=range(60), context=100)

    with calling(CallContext(gives_way=True)):
        assert rules().max_tokens == 40
    with pytest.raises(ContextOverflowError):
        rules()


def test_only_ceilings_of_ours_give_way():
    seen = []

    class Engine(ScriptedEngine):
        def complete(self, request, *, seed):
            seen.append(ceiling_gives_way())
            return super().complete(request, seed=seed)

    answers = {"queue": "billing", "urgent": "True", "score": "3"}
    for own in (None, 50):
        engine, gateway = Engine(lambda messages: answers), Gateway(cache=None)
        lm = MeteredLM("scripted/x", engine=engine, gateway=gateway, answer_tokens="derived", max_tokens=own)
        with dspy.context(lm=lm, adapter=ADAPTER):
            dspy.Predict(Route)(text="x")
    assert seen == [True, False]


def test_an_engine_of_the_users_takes_stops_unless_it_says_otherwise():
    assert ScriptedEngine("x").takes_stop("scripted/x")
