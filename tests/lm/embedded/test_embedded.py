from __future__ import annotations

import json
import subprocess
import sys

import dspy
import pytest

from copa_harness.lm.embedded import embedded_model_path
from copa_harness.lm.embedded.pretrain.development_tasks import development_tasks, own_name_tasks
from copa_harness.lm.embedded.pretrain.measure import LoraSettings, best_demos, load_model, with_lora

LABELS = ("lumora", "saltern", "verdigris")


@pytest.fixture(scope="module")
def model():
    return load_model(embedded_model_path())


@pytest.fixture(scope="module")
def task():
    return development_tasks(0)[0]


def test_the_files_are_there_and_under_twelve_megabytes():
    folder = embedded_model_path()
    names = {path.name for path in folder.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
    } <= names
    assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) < 12e6


def test_finding_the_model_imports_no_torch():
    code = "import sys, copa_harness.lm.embedded as e; e.embedded_model_path(); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_it_is_a_plain_llama(model):
    assert type(model.model).__name__ == "LlamaForCausalLM"
    assert json.loads((embedded_model_path() / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("form", ["float_fields", "str_fields", "single"])
def test_zero_shot_answers_parse(model, form):
    task = development_tasks(0, form)[0]
    answers = model.answers(task.program, [], task.test)
    assert sum(answer is not None for answer in answers) >= 0.95 * len(answers)


def test_demonstrations_move_its_answers(model, task):
    zero_shot, _ = model.accuracy(task.program, [], task.test)
    with_demos, _ = model.accuracy(task.program, task.train[:12], task.test)
    assert with_demos > zero_shot + 0.1


def test_a_prompt_of_fifteen_hundred_tokens_still_parses(model, task):
    program, rows = task.program, task.train
    demos = rows[:1]
    while len(model.prompt_ids(program, rows[: len(demos) + 1], rows[-1])) <= 1500:
        demos = rows[: len(demos) + 1]
    answers = model.answers(program, demos, rows[-20:])
    assert sum(answer in LABELS for answer in answers) >= 19


def test_a_literal_output_and_a_chain_of_thought_parse(model):
    from typing import Literal

    single = development_tasks(0, "single")[0]
    rows = single.test[:20]
    literal = single.program.with_updated_fields("answer", type_=Literal[LABELS])
    answers = model.answers(literal, [], rows)
    assert sum(answer in LABELS for answer in answers) >= 19
    thoughtful = dspy.ChainOfThought(single.program).predict.signature
    assert sum(answer is not None for answer in model.answers(thoughtful, [], rows)) >= 19


OWN_NAMES = [task.name for task in own_name_tasks(0)]


@pytest.mark.parametrize("index", range(len(OWN_NAMES)), ids=OWN_NAMES)
def test_fields_that_nobody_foresaw_parse(model, index):
    task = own_name_tasks(0)[index]
    shown = task.train[:6]
    for demos in ([], shown):
        found = model.outputs(task.program, demos, task.test)
        assert sum(values is not None for values in found) >= 0.99 * len(found)


_NAME_WITH_NUMBER = pytest.mark.xfail(strict=True, reason="a limit of the model: most names with numbers are cut short")


@pytest.mark.parametrize(
    "name",
    [
        "queue",
        "Kategorie",
        "is_it_fraud",
        "x",
        "sentimentOfReview",
        "who_handles_it",
        "y_true",
        "level5",
        pytest.param("icd10_code", marks=_NAME_WITH_NUMBER),
    ],
)
def test_an_output_of_any_name_is_called_by_its_name(model, name):
    program = dspy.Signature(
        {"ticket": (str, dspy.InputField()), name: (str, dspy.OutputField(desc="red, green, or blue"))}
    )
    rows = [{"ticket": text} for text in ("my parcel is late", "The invoice is wrong.", "cannot log in", "thanks")]
    assert all(values is not None for values in model.outputs(program, [], rows))


def test_demonstrations_and_lora_both_learn_a_task_of_own_names(model):
    task = own_name_tasks(0)[OWN_NAMES.index("beans")]
    train, test = task.train, task.test
    demos = best_demos(model, task.program, train[:50], train[50:], n_demos=9, n_sets=3, seed=0)
    assert model.accuracy(task.program, demos, test)[0] >= 0.7
    tuned = with_lora(model, task.program, train, LoraSettings(20, 3e-3, 16, 0), seed=0)
    assert tuned.accuracy(task.program, [], test)[0] >= 0.8
