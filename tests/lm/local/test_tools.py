"""Tools on a local model: DSPy writes them into the prompt and reads the call from the answer's text.

The model is a random one, so what it would generate is given here; everything before and behind it is real.
"""

import dspy
import pytest

from copa_harness.errors import ConfigurationError
from copa_harness.evaluate.runner import default_adapter, evaluate, run_examples
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.factory import build_lm
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.local.engine import TransformersEngine
from copa_harness.lm.local.executor import Answer
from copa_harness.lm.scripted import chat_fields
from copa_harness.tasks import agent
from copa_harness.testing.tiny_models import write_tiny_model

PENS = dspy.Example(question="What do 4 pens cost?", answer="12").with_inputs("question")
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tools") / "tiny", chat_template=None, seed=3)


@pytest.fixture
def local(folder, tmp_path, monkeypatch):
    """A local model that generates the texts given, and the prompts it was asked."""

    def make(*texts, **settings):
        gateway, prompts = Gateway(cache=ResponseCache(tmp_path / "cache")), []
        template = tmp_path / "plain.jinja"
        template.write_text(TEMPLATE)
        lm = build_lm(f"hf:{folder}", gateway=gateway, cache_dir=tmp_path, chat_template=template, **settings)

        def submit(engine, tokens, rules, lora, choices=()):
            prompts.append(engine.chat.decode(tokens.ids))
            return texts[len(prompts) - 1]

        monkeypatch.setattr(TransformersEngine, "_submit", submit)
        monkeypatch.setattr(TransformersEngine, "_wait", lambda engine, text: Answer((1,), text, "stop"))
        monkeypatch.setattr("copa_harness.lm.local.engine.check_room", lambda *args, **kwargs: None)
        return lm, prompts

    return make


def step(thought, tool, **arguments):
    return chat_fields({"next_thought": thought, "next_tool_name": tool, "next_tool_args": arguments})


def test_react_uses_its_tools(local):
    lm, prompts = local(
        step("What is a pen?", "price_of", article="pen"),
        step("Four of them.", "calculator", expression="4 * 3"),
        step("I know it.", "finish"),
        chat_fields({"reasoning": "4 pens at 3 dollars", "answer": "12"}),
    )
    task = agent()
    (run,) = run_examples(task.program, [PENS], metric=task.metric, split="test", lm=lm)
    assert (run.result.outcome, run.result.score) == ("ok", 1.0)
    assert run.prediction.trajectory["observation_0"] == "3"
    assert run.prediction.trajectory["observation_1"] == "12"
    assert "The price of one piece of an article in dollars." in prompts[0]


def test_a_step_that_does_not_parse_is_an_unusable_answer_and_no_failure_of_the_provider(local):
    lm, _ = local("I would look at the price list.")
    task = agent()
    (run,) = run_examples(task.program, [PENS], metric=task.metric, split="test", lm=lm)
    assert (run.result.outcome, run.result.score) == ("unparsed", 0.0)


def test_what_a_tool_cannot_do_is_told_to_the_model(local):
    lm, prompts = local(
        step("Reckon.", "calculator", expression="a lot"),
        step("Done.", "finish"),
        chat_fields({"reasoning": "none", "answer": "12"}),
    )
    task = agent()
    (run,) = run_examples(task.program, [PENS], metric=task.metric, split="test", lm=lm)
    assert run.result.score == 1.0
    assert "cannot work out 'a lot'" in prompts[1]


class Choose(dspy.Signature):
    """Which tools are needed."""

    question: str = dspy.InputField()
    tools: list[dspy.Tool] = dspy.InputField()
    calls: dspy.ToolCalls = dspy.OutputField()


CALL = '{"tool_calls": [{"name": "price_of", "args": {"article": "pen"}}]}'


@pytest.mark.parametrize("native", [None, False, True])
def test_tool_fields_travel_as_text_whatever_the_prompt_adapter_would_like(local, native):
    lm, prompts = local(chat_fields({"calls": CALL}))
    tools = list(agent().program.tools.values())[:2]
    adapter = default_adapter() if native is None else dspy.ChatAdapter(use_native_function_calling=native)
    with dspy.context(lm=lm, adapter=adapter):
        calls = dspy.Predict(Choose)(question="What is a pen?", tools=tools).calls
    assert [(call.name, call.execute(tools)) for call in calls.tool_calls] == [("price_of", "3")]
    assert "The price of one piece of an article in dollars." in prompts[0]


def test_reactv2_uses_its_tools_over_several_turns(local):
    finished = '{"tool_calls": [{"name": "submit", "args": {"answer": "12"}}]}'
    lm, prompts = local(
        chat_fields({"next_thought": "the price first", "tool_calls": CALL}),
        chat_fields({"next_thought": "that is it", "tool_calls": finished}),
    )
    program = dspy.ReActV2("question -> answer", tools=[agent().program.tools["price_of"]])
    (run,) = run_examples(program, [PENS], metric=agent().metric, split="test", lm=lm)
    assert (run.result.outcome, run.result.score, run.prediction.termination_reason) == ("ok", 1.0, "submit")
    assert "tool_call_results" in prompts[1]


def test_constrained_react_names_a_tool_that_there_is(folder, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text("{{ messages[-1]['content'][-200:] }}")
    lm = build_lm(
        f"hf:{folder}",
        gateway=Gateway(cache=ResponseCache(tmp_path / "cache")),
        cache_dir=tmp_path,
        chat_template=template,
        constrain=True,
        max_tokens=12,
    )
    signature = agent().program.react.signature.delete("next_tool_args")
    with dspy.context(lm=lm, adapter=default_adapter()):
        answer = dspy.Predict(signature)(question="What do 4 pens cost?", trajectory="")
    assert answer.next_tool_name in ("price_of", "calculator", "finish")


def test_native_tools_end_an_evaluation_with_one_error_that_says_what_to_do(local):
    lm, prompts = local()
    tool = agent().program.tools["price_of"].format_as_litellm_function_call()

    class Native(dspy.Module):
        def __init__(self):
            super().__init__()
            self.predict = dspy.Predict("question -> answer")

        def forward(self, question):
            return lm(question, tools=[tool])

    with pytest.raises(ConfigurationError, match=r"native tools= .*use_native_function_calling") as raised:
        evaluate(Native(), [PENS], metric=lambda *_: 1.0, split="test", lm=lm)
    assert not prompts
    assert str(raised.value).count("native tools=") == 1
