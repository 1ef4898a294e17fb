"""The provider: lm.finetune, BootstrapFinetune and BetterTogether work; no way to hang."""

from __future__ import annotations

import copy

import dspy
import pytest

from copa_harness.errors import BudgetExhausted, ConfigurationError, TrainingError
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.tune import LoraSettings, RowDemos, attach_provider, finetune, render_rows

QUICK = LoraSettings(rank=4, epochs=1, batch_size=4)


@pytest.fixture
def tunable(lm, engine):
    return attach_provider(lm, directory=engine.lora_dir, settings=QUICK)


@pytest.fixture
def chat_rows(program, examples):
    rows = render_rows(program, examples, demos=RowDemos("none", seed=0))["self"]
    return [{"messages": list(row.messages)} for row in rows]


def test_lm_finetune_gives_an_lm_named_by_its_weights(tunable, engine, chat_rows):
    with open_scope("run") as scope:
        tuned = tunable.finetune(chat_rows, "chat", {"epochs": 2}).result(timeout=60)
    assert tuned.model.startswith("hf:tiny@")
    assert engine.fingerprint(tuned.model).startswith(tuned.model.split("@")[1])
    assert scope.usage().train_steps == 6
    assert isinstance(tuned("hello")[0], str)


def test_finetune_takes_rows_or_chat_dictionaries(lm, engine, program, examples, chat_rows):
    options = {"directory": engine.lora_dir, "settings": QUICK, "served_with": "none"}
    by_row = finetune(lm, render_rows(program, examples, demos=RowDemos("none", seed=0))["self"], **options)
    by_dict = finetune(lm, chat_rows, **options)
    assert by_row.model == by_dict.model != lm.model
    assert by_row.engine is lm.engine
    assert by_row.fingerprint != lm.fingerprint


def test_an_lm_that_is_tuned_already_is_tuned_anew_from_the_base(tunable, chat_rows):
    tuned = tunable.finetune(chat_rows, "chat").result(timeout=60)
    assert tuned.finetune(chat_rows, "chat").result(timeout=60).model == tuned.model


@pytest.mark.parametrize(
    ("rows", "kind", "settings", "error"),
    [
        ([], "chat", {}, TrainingError),
        (None, "chat", {"learnign_rate": 1}, ConfigurationError),
        (None, "completion", {}, TrainingError),
        ([{"text": "x"}], "chat", {}, TrainingError),
    ],
)
def test_what_cannot_be_trained_is_returned_as_an_error_as_dspy_has_it(rows, kind, settings, error, tunable, chat_rows):
    result = tunable.finetune(chat_rows if rows is None else rows, kind, settings).result(timeout=60)
    assert isinstance(result, error)


def test_an_exception_outside_exception_reaches_the_caller_instead_of_hanging(tunable, chat_rows, monkeypatch):
    def refuse(*args, **kwargs):
        raise BudgetExhausted("spent")

    monkeypatch.setattr(tunable.provider.trainer, "train", refuse)
    with pytest.raises(BudgetExhausted, match="spent"):
        tunable.finetune(chat_rows, "chat").result(timeout=60)


def test_a_provider_is_shared_by_deep_copies_of_a_program(tunable, program):
    program.set_lm(tunable)
    assert copy.deepcopy(program).lm.provider is tunable.provider
    tunable.launch()
    tunable.kill()


def test_only_local_models_can_be_tuned_here(tmp_path):
    with pytest.raises(ConfigurationError, match="expected a local one"):
        attach_provider(ScriptedLM(["x"]), directory=tmp_path)


def teacher_of(program):
    """The same program on a scripted model that knows the answers."""
    teacher = program.deepcopy()
    teacher.set_lm(
        ScriptedLM(
            lambda messages: {"colour": next(c for c in ("red", "green", "blue") if f"n{c}" in messages[-1]["content"])}
        )
    )
    return teacher


def right(example, prediction, trace=None):
    return float(prediction.colour == example.colour)


def test_dspys_bootstrap_finetune_works(tunable, program, examples):
    program.set_lm(tunable)
    tuned = dspy.BootstrapFinetune(metric=right, num_threads=2).compile(
        program, trainset=examples, teacher=teacher_of(program)
    )
    assert tuned.lm.model.startswith("hf:tiny@")


def test_dspys_better_together_works(tunable, program, examples):
    program.set_lm(tunable)
    teacher = teacher_of(program)
    with dspy.context(lm=tunable, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        optimizer = dspy.BetterTogether(
            metric=right, p=dspy.LabeledFewShot(k=2), w=dspy.BootstrapFinetune(metric=right, num_threads=2)
        )
        compiled = optimizer.compile(
            program,
            trainset=examples[:6],
            valset=examples[6:],
            strategy="p -> w",
            num_threads=2,
            optimizer_compile_args={"w": {"teacher": teacher}},
        )
    assert not compiled.flag_compilation_error_occurred
    assert any("@" in (step["program"].lm.model if step["program"].lm else "") for step in compiled.candidate_programs)
