"""Programs under DSPy's optimizers keep the models of their predictors, and teachers are as metered as students."""

import inspect

import dspy
import pytest

from copa_harness.errors import ConfigurationError
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize.dspy_optimizers.student import models_in, ready
from copa_harness.optimize.result import apply_state

DROPPING = [
    "bootstrap_fewshot",
    "bootstrap_fewshot_random_search",
    "bootstrap_fewshot_optuna",
    "knn_fewshot",
    "miprov2",
    "simba",
    "infer_rules",
    "better_together",
]
"""Optimizers that drop or replace predictors' models on their own."""


@pytest.mark.parametrize("name", DROPPING)
def test_every_stage_is_run_on_its_own_model_all_the_time(stages, name):
    program = stages.compiled(name)
    assert stages.strays() == []
    assert [one.lm.model.split("@")[0] for one in program.predictors()] == ["scripted/look", "scripted/tell"]
    assert program.copa_result.score_after > program.copa_result.score_before
    assert program.copa_result.charged_calls <= 150


def test_a_student_made_ready_still_shows_its_own_source(stages):
    program = ready(stages.program())
    assert "class TwoStages" in inspect.getsource(type(program))
    assert type(program.look).__name__ == "Predict"


def test_a_reset_keeps_the_model_and_nothing_else(stages):
    program = ready(stages.program())
    program.tell.demos = [dspy.Example(hint="large", size="9", kind="big")]
    fresh = program.reset_copy()
    assert fresh.tell.demos == []
    assert fresh.tell.lm.model == "scripted/tell"


def test_models_are_found_wherever_arguments_hold_them(stages):
    found = list(models_in({"teacher_settings": {"lm": stages.look_lm}, "list": [stages.tell_lm, 3], "k": 2}))
    assert found == [stages.look_lm, stages.tell_lm]
    assert list(models_in(stages.program())) == [stages.look_lm, stages.tell_lm]


def a_teacher(model="scripted/teacher"):
    def answers(messages):
        text = messages[-1]["content"]
        return {"hint": "told by the teacher"} if "`[[ ## hint ## ]]`" in text else {"kind": "big"}

    return ScriptedLM(answers, model=model)


@pytest.mark.parametrize("name", ["bootstrap_fewshot", "knn_fewshot", "bootstrap_finetune"])
def test_the_teacher_given_to_compile_is_the_one_bootstrapped_from(stages, name):
    lm = a_teacher()
    teacher = stages.program()
    teacher.set_lm(lm)
    result = stages.compiled(name, teacher=teacher).copa_result
    assert lm.calls > 0
    assert result.charged_calls >= lm.calls + stages.look_lm.calls
    trained = [row for lm in (stages.look_lm, stages.tell_lm) for rows in lm.provider.trained for row in rows]
    if name == "bootstrap_finetune":
        assert "told by the teacher" in str(trained)
    elif name == "bootstrap_fewshot":
        assert any("told by the teacher" in str(request.messages) for request in stages.tell_lm.requests)


def test_the_model_of_teacher_settings_teaches_although_predictors_have_models_of_their_own(stages):
    lm = a_teacher()
    stages.compiled("bootstrap_fewshot", optimizer_kwargs={"bootstrap_fewshot": {"teacher_settings": {"lm": lm}}})
    assert lm.calls > 0


@pytest.mark.parametrize("way", ["teacher", "teacher_settings", "prompt_model"])
def test_a_model_whose_calls_are_not_counted_is_refused_wherever_it_comes_in(stages, way):
    wild = dspy.LM("openai/gpt-4o-mini", api_key="none")
    teacher = stages.program()
    teacher.set_lm(wild)
    kwargs = {
        "teacher": {"teacher": teacher},
        "teacher_settings": {"optimizer_kwargs": {"bootstrap_fewshot": {"teacher_settings": {"lm": wild}}}},
        "prompt_model": {"strategy": "miprov2", "optimizer_kwargs": {"miprov2": {"prompt_model": wild}}},
    }[way]
    with pytest.raises(ConfigurationError, match="cannot be bounded or cached"):
        stages.compiled(**{"strategy": "bootstrap_fewshot", **kwargs})


def test_a_stored_program_of_several_models_gets_them_back(stages):
    made = stages.compiled("bootstrap_finetune")
    stored = apply_state(stages.program(), made.copa_result.state, lm=stages.look_lm)
    assert [one.lm.model for one in stored.predictors()] == [one.lm.model for one in made.predictors()]
    assert stored.tell.lm.engine is stages.tell_lm.engine
