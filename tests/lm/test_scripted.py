"""ScriptedLM: the public test double."""

from typing import Literal

import dspy
import pytest
from dspy.lm15 import Message, Request

from copa_harness.errors import ConfigurationError, ProviderError
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.scripted import ScriptedLM


def test_a_list_is_answered_in_order_and_its_end_is_an_error():
    lm = ScriptedLM(["one", "two"])
    assert [lm("a"), lm("b")] == [["one"], ["two"]]
    with pytest.raises(ProviderError, match="has 2 answers and was asked for number 3"):
        lm("c")


def test_a_dict_answers_by_what_the_last_message_contains():
    lm = ScriptedLM({"red": "stop", "green": "go"})
    assert lm("the light is green") == ["go"]
    with pytest.raises(ProviderError, match=r"contain one of \['red', 'green'\], got: blue"):
        lm("blue")


def test_a_callable_sees_the_messages_and_what_else_it_asks_for():
    lm = ScriptedLM(lambda messages, model, seed: f"{messages[-1]['content']} {model} {seed > 0}")
    assert lm("hi") == ["hi scripted/model False"]
    assert lm.copy(model="tuned")("hi", rollout_id=1, temperature=1.0) == ["hi tuned True"]


def test_a_text_is_the_answer_to_everything():
    assert ScriptedLM("yes")("anything") == ["yes"]


def test_output_fields_are_rendered_so_that_dspy_parses_them():
    class Sort(dspy.Signature):
        """Sort."""

        item: str = dspy.InputField()
        label: Literal["a", "b"] = dspy.OutputField()
        scores: list[float] = dspy.OutputField()
        sure: bool = dspy.OutputField()

    program = dspy.Predict(Sort)
    program.set_lm(ScriptedLM(lambda messages: {"label": "b", "scores": [0.5, 1], "sure": True}))
    answer = program(item="x")
    assert (answer.label, answer.scores, answer.sure) == ("b", [0.5, 1.0], True)


def test_requests_that_reached_the_script_are_recorded_with_those_of_copies():
    lm = ScriptedLM("yes")
    lm(Request(model=lm.model, system="be brief", messages=(Message.user("hi"),)))
    lm.copy(model="tuned")("hi")
    lm.copy(model="tuned")("hi")
    assert lm.calls == 2
    first, second = lm.requests
    assert first.messages == ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"})
    assert (first.prompt, second.model) == ("hi", "tuned")


def test_two_scripts_never_share_answers_unless_told_to(tmp_path):
    gateway = Gateway(cache=ResponseCache(tmp_path))
    one, other = (ScriptedLM(lambda messages, word=word: word, gateway=gateway) for word in ("one", "other"))
    assert (one("q"), other("q")) == (["one"], ["other"])
    same = [ScriptedLM(lambda messages, word=word: word, gateway=gateway, fingerprint="v1") for word in ("old", "new")]
    assert [lm("q") for lm in same] == [["old"], ["old"]]
    retrained = ScriptedLM(lambda messages: "new", gateway=gateway, fingerprint="v2")
    assert retrained("q") == ["new"]


def test_the_fingerprint_of_a_list_is_its_content_so_a_later_run_finds_the_answers(tmp_path):
    gateway = Gateway(cache=ResponseCache(tmp_path))
    assert ScriptedLM(["a"], gateway=gateway)("q") == ["a"]
    later = ScriptedLM(["a"], gateway=gateway)
    assert later("q") == ["a"]
    assert later.calls == 0
    assert ScriptedLM(["b"], gateway=gateway)("q") == ["b"]


def test_a_fingerprint_may_depend_on_the_model_name():
    lm = ScriptedLM("x", fingerprint=lambda model: f"weights of {model}")
    assert lm.copy(model="tuned").fingerprint == "weights of tuned"


def test_an_error_in_the_script_is_raised_and_the_next_answer_follows():
    lm = ScriptedLM([ProviderError("down"), "up"])
    with pytest.raises(ProviderError, match="down"):
        lm("q")
    assert lm("q") == ["up"]


def test_answers_of_an_unusable_type_are_refused():
    with pytest.raises(ConfigurationError, match="got answers of type int, expected a list"):
        ScriptedLM(3)
    with pytest.raises(ConfigurationError, match="a scripted answer is a int, expected text"):
        ScriptedLM([3])("q")
