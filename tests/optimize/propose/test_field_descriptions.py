"""What the fields of a record hold, as lines of the instruction: counted in the rows, written by a prompt LM."""

import enum
import json
from types import SimpleNamespace

import dspy
import pytest
from pydantic import BaseModel, Field

from copa_harness import COPA
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize.propose.field_descriptions import (
    HEADING,
    counted,
    described_fields,
    descriptions_in,
    with_descriptions,
    without_descriptions,
)
from copa_harness.optimize.propose.instructions import rule_based
from copa_harness.optimize.propose.proposer import propose_instructions
from copa_harness.optimize.result import apply_state
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.trial_memory import SearchMemory
from copa_harness.optimize.step_budget import CallBudget
from copa_harness.tasks import order_emails
from tests.optimize.conftest import context_of


class Size(str, enum.Enum):
    SMALL = "small"
    LARGE = "large"


class Part(BaseModel):
    name: str = Field(description="as printed")
    colour: str | None = None


class Toy(BaseModel):
    title: str
    size: Size | None = None
    parts: list[Part] = Field(default_factory=list, description="what it consists of")
    twin: "Toy | None" = None


SIGNATURE = dspy.Signature("text -> toy", "Extract.").with_updated_fields("toy", Toy)


def example(title, *parts, size=None):
    toy = Toy(title=title, size=size, parts=[Part(name=name, colour=colour) for name, colour in parts])
    return dspy.Example(text=f"a {title}", toy=toy).with_inputs("text")


ROWS = [
    example("car", ("wheel", None), ("door", "red"), size=Size.SMALL),
    example("boat", ("sail", "white")),
    example("car", ("wheel", None), size=Size.LARGE),
]


def test_fields_of_nested_models_have_paths_and_a_model_in_itself_ends_them():
    assert described_fields(SIGNATURE) == {
        "title": "",
        "size": "",
        "parts": "what it consists of",
        "parts.name": "as printed",
        "parts.colour": "",
        "twin": "",
    }
    assert described_fields(dspy.Signature("text -> label")) == {}


def test_rows_tell_values_and_how_often_there_is_none():
    lines = counted(SIGNATURE, ROWS)
    assert lines["title"] == 'for example "car", "boat"'
    assert lines["size"] == 'for example "small", "large"; null where the text does not say (1 of 3)'
    assert lines["parts"] == "what it consists of"
    assert lines["parts.name"] == 'as printed; for example "wheel", "door", "sail"'
    assert lines["parts.colour"] == 'for example "red", "white"; null where the text does not say (2 of 4)'
    assert counted(SIGNATURE, [dspy.Example(text="x").with_inputs("text")]) == {}


def test_lines_replace_those_an_instruction_has():
    once = with_descriptions("Extract.", {"title": "its name", "size": ""})
    assert once == "Extract.\nWhat the fields hold:\n- title: its name"
    assert with_descriptions(once, {"size": "how big"}) == "Extract.\nWhat the fields hold:\n- size: how big"
    assert without_descriptions(once) == "Extract."
    assert with_descriptions("Extract.", {}) == "Extract."
    assert descriptions_in(once, ["title", "size"]) == {"title": "its name"}


@pytest.mark.parametrize("line", ["title: its name", "- title: its name", "* `title`: its name", "**title**: its name"])
def test_what_a_model_writes_is_read_by_known_fields(line):
    assert descriptions_in(f"Sure!\n{line}\nprice: 3", ["title", "size"]) == {"title": "its name"}


def test_they_are_an_instruction_among_the_others_of_a_step_that_answers_records_only():
    proposals = rule_based("self", SIGNATURE, "Extract.", trainset=ROWS, seed=0)
    assert [proposal.option.name for proposal in proposals] == ["plain", "fields"]
    assert "- parts.name: as printed" in proposals[1].option.text
    rows = [dspy.Example(text=f"t{i}", label="ab"[i % 2]).with_inputs("text") for i in range(6)]
    names = [p.option.name for p in rule_based("self", dspy.Signature("text -> label"), "Say.", trainset=rows, seed=0)]
    assert "fields" not in names


def test_a_prompt_lm_describes_the_fields_and_only_those_there_are():
    asked = []

    def answer(messages):
        asked.append(messages)
        if "[[ ## field_descriptions ## ]]" in messages[0]["content"]:
            return {"field_descriptions": f"title: version {len(asked)}\nprice: nothing"}
        return {"proposed_instruction": f"Extract {len(asked)}."}

    toy = SimpleNamespace(train=ROWS, val=ROWS, metric=lambda example, prediction, trace=None: 0.0)
    student = Candidate.of(dspy.Predict(SIGNATURE), lm=ScriptedLM("x"))
    with open_scope("test") as scope:
        context = context_of(toy, student, prompt_lm=ScriptedLM(answer), n_proposed=12, n_reflected=0)
        allowance = CallBudget(scope, 100)
        options = propose_instructions(context, student, allowance=allowance, memory=SearchMemory())["self"]
    written = [option.text for option in options if option.name.startswith("fields ")]
    assert written
    for text in written:
        assert text.startswith("Extract.\nWhat the fields hold:\n- title: version ")
        assert "price" not in text
    shown = next(m[-1]["content"] for m in asked if "[[ ## field_descriptions ## ]]" in m[0]["content"])
    assert 'parts.name: as printed; for example "wheel"' in shown


def test_a_search_chooses_them_where_they_help_and_the_result_can_be_stored():
    task = order_emails(n_train=8, n_val=8, n_test=8)
    rows = {e.text: e.record for split in (task.trainset, task.valset, task.testset) for e in split}

    def answer(messages):
        record = next(record for text, record in rows.items() if text in messages[-1]["content"])
        shown = "null where the text does not say" in messages[0]["content"]
        return {"record": (record if shown else record.model_copy(update={"customer": "?"})).model_dump_json()}

    lm = ScriptedLM(answer)
    copa = COPA(metric=task.metric, strategy="p", budget=150, lm=lm, max_demos=2, adoption_p=1.0)
    program = copa.compile(task.program, trainset=list(task.trainset), valset=list(task.valset))
    result = program.copa_result
    assert (result.score_before, result.score_after) == (0.75, 1.0)
    assert HEADING in program.predictors()[0].signature.instructions
    stored = json.loads(json.dumps(result.state))
    restored = apply_state(task.program, stored, lm=lm)
    assert restored(**task.testset[0].inputs()).record == task.testset[0].record
