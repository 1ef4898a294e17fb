"""The agent task: its rows, its tools, its metric, and that the wording of a tool is searched and exported."""

import json
import re

import dspy
import pytest

from copa_harness import COPA
from copa_harness.errors import TaskError
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.session.optimizations import program_fingerprint
from copa_harness.tasks import agent
from copa_harness.tasks.agent import PRICES, calculator, price_of

OLD = "The price of one piece of an article in dollars."
NEW = "Always ask this first: what ONE piece of an article costs."


def inputs(examples):
    return {example.question for example in examples}


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_have_the_promised_sizes_and_share_no_question(seed):
    task = agent(seed)
    train, val, test = map(inputs, (task.trainset, task.valset, task.testset))
    assert (len(train), len(val), len(test)) == (24, 16, 32)
    assert len(train | val | test) == 72


def test_a_seed_gives_the_same_rows_and_test_rows_stay_when_others_change():
    assert [row.toDict() for row in agent(3).testset] == [row.toDict() for row in agent(3, n_train=5).testset]
    assert inputs(agent(3).testset) != inputs(agent(4).testset)


def test_the_answers_are_what_the_tools_come_to():
    for row in agent().testset:
        wanted = re.findall(r"(\d+) (\w+)s\b", row.question)
        expression = " + ".join(f"{count} * {price_of(kind)}" for count, kind in wanted)
        assert calculator(expression) == row.answer


def test_more_rows_than_questions_are_refused():
    with pytest.raises(TaskError, match="at most"):
        agent(n_train=10_000)


@pytest.mark.parametrize(
    ("text", "value"), [("4 * 3", "12"), ("(1 + 2) * 7 - 1", "20"), ("7 / 2", "3.5"), ("-3", "-3")]
)
def test_the_calculator_reckons(text, value):
    assert calculator(text) == value


@pytest.mark.parametrize("text", ["__import__('os')", "2 ** 9", "pen + cup", "99999999 * 99999999", "1 / 0", "", "1 +"])
def test_the_calculator_takes_nothing_else_and_tells_the_model_so_in_a_line(text):
    assert calculator(text).startswith("cannot work out")
    assert "\n" not in calculator(text)


def test_the_price_list_takes_plurals_and_says_what_there_is():
    assert price_of(" Pens") == price_of("pen") == str(PRICES["pen"])
    assert "there are pen, cup" in price_of("zeppelin")


@pytest.mark.parametrize(
    ("said", "score"), [("12", 1.0), ("$12.00", 1.0), ("12 dollars", 1.0), ("4 pens cost 12", 0.0), ("none", 0.0)]
)
def test_the_metric_takes_one_number(said, score):
    row = dspy.Example(question="q", answer="12")
    assert agent().metric(row, dspy.Prediction(answer=said)) == score


def shopkeeper(messages):
    """Reckons with its tools if the price list is said to come first, and guesses otherwise."""
    asked, system = messages[-1]["content"], messages[0]["content"]
    wanted = re.findall(r"(\d+) (\w+)s\b", re.search(r"question ## \]\]\n(.*)", asked).group(1))
    seen = re.findall(r"observation_\d+ ## \]\]\n(\d+)", asked)
    if "next_tool_name" not in system:
        return {"reasoning": "as the tools say", "answer": seen[-1] if seen else "100"}
    if NEW not in system or len(seen) > len(wanted):
        return {"next_thought": "done", "next_tool_name": "finish", "next_tool_args": {}}
    if len(seen) < len(wanted):
        arguments = {"article": wanted[len(seen)][1]}
        return {"next_thought": "price", "next_tool_name": "price_of", "next_tool_args": arguments}
    total = " + ".join(f"{count} * {price}" for (count, _), price in zip(wanted, seen, strict=True))
    return {"next_thought": "sum", "next_tool_name": "calculator", "next_tool_args": {"expression": total}}


def test_a_reworded_description_of_a_tool_is_searched_adopted_exported_and_the_tool_still_works(tmp_path):
    task = agent(n_train=12, n_val=12, n_test=4)
    written = task.program.react.signature.instructions
    assert OLD in written

    def write(messages):
        asked = messages[-1]["content"]
        return {"program_description": "a shop", "proposed_instruction": written.replace(OLD, NEW)} | (
            {} if OLD in asked else {"proposed_instruction": "Say what it costs."}
        )

    lm = ScriptedLM(shopkeeper)
    optimizer = COPA(
        metric=task.metric, strategy="p", budget="calls=1200", lm=lm, prompt_lm=ScriptedLM(write), n_reflected=0
    )
    program = optimizer.compile(task.program, trainset=list(task.trainset), valset=list(task.valset))
    assert program.copa_result.score_before == 0.0
    assert program.copa_result.score_after == 1.0
    assert NEW in program.react.signature.instructions

    program.set_lm(None)
    program.save(tmp_path / "program.json")
    assert NEW in json.dumps(json.loads((tmp_path / "program.json").read_text()))
    loaded = agent().program
    loaded.load(tmp_path / "program.json")
    row = task.testset[0]
    with dspy.context(lm=lm):
        answer = loaded(question=row.question)
    assert task.metric(row, answer) == 1.0
    assert answer.trajectory["observation_0"].isdigit()


def test_a_program_is_another_one_when_the_code_of_a_tool_changes():
    def react(tool):
        return dspy.ReAct("question -> answer", tools=[dspy.Tool(tool, name="find", desc="finds")])

    def one(text: str) -> str:
        return text

    def other(text: str) -> str:
        return text + "!"

    assert program_fingerprint(react(one)) == program_fingerprint(react(one))
    assert program_fingerprint(react(one)) != program_fingerprint(react(other))
