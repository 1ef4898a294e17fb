"""DSPy's optimizers by name, metered and budgeted like everything else."""

import logging
import sys

import dspy
import pytest
from dspy import teleprompt

from copa_harness.errors import ConfigurationError, CopaError, TrainingError
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize import COPA
from copa_harness.strategy import OPTIMIZER_NAMES

PROMPT_ONLY = [name for name in OPTIMIZER_NAMES if name not in ("bootstrap_finetune", "better_together")]


def writer():
    """A prompt LM that answers whatever field it is asked for."""

    def answers(messages):
        text = messages[-1]["content"]
        if "```" in text:
            return "```\nTell big from small by size.\n```"
        asked = [part.split(" ## ]]")[0] for part in text.split("Respond with")[-1].split("`[[ ## ")[1:]]
        return {name: "Tell big from small by size." for name in asked if name != "completed"}

    return ScriptedLM(answers, model="scripted/writer")


def optimized(toy, strategy, *, lm=None, budget=200, **settings):
    optimizer = COPA(metric=toy.metric, strategy=strategy, budget=budget, lm=lm or toy.lm(), threads=8, **settings)
    return optimizer.compile(toy.program(), trainset=toy.train, valset=toy.val)


@pytest.mark.parametrize("name", PROMPT_ONLY)
def test_every_optimizer_runs_within_the_budget_and_makes_nothing_worse(toy, name, capfd):
    lm, prompt_lm = toy.lm(), writer()
    program = optimized(toy, name, lm=lm, prompt_lm=prompt_lm)
    result = program.copa_result
    assert lm.calls + prompt_lm.calls == result.usage.paid_calls <= result.charged_calls <= 200
    assert result.score_after >= result.score_before
    assert result.model == lm.model
    assert program.lm.model == lm.model
    assert not program._compiled
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


@pytest.mark.parametrize("name", ["bootstrap_fewshot_random_search", "miprov2", "labeled_fewshot", "knn_fewshot"])
def test_optimizers_that_show_demonstrations_improve_the_toy(toy, name):
    result = optimized(toy, name).copa_result
    assert result.score_after > result.score_before + 0.1


@pytest.mark.parametrize("name", ["miprov2", "copro", "infer_rules"])
def test_a_task_model_that_cannot_write_instructions_does_no_harm(toy, name):
    result = optimized(toy, name).copa_result
    assert result.score_after >= result.score_before
    assert any("instruction proposals were unusable" in note for note in result.notes)


def test_gepa_without_a_prompt_lm_says_what_is_missing(toy):
    with pytest.raises(ConfigurationError, match="prompt_lm"):
        optimized(toy, "gepa")


@pytest.mark.parametrize("name", ["bootstrap_fewshot_random_search", "miprov2", "bootstrap_fewshot_optuna"])
def test_a_budget_that_ends_an_optimizer_leaves_its_best_program(toy, name, monkeypatch):
    # Sized far beyond its share, it is stopped in the middle.
    kwargs = {
        "miprov2": {"num_trials": 30, "num_candidates": 8},
        "bootstrap_fewshot_random_search": {"num_candidate_programs": 30},
        "bootstrap_fewshot_optuna": {"num_candidate_programs": 30},
    }
    lm = toy.lm()
    result = optimized(toy, name, lm=lm, budget=130, optimizer_kwargs={name: kwargs[name]}).copa_result
    assert lm.calls <= 130
    assert any("its share of the budget ended it after" in note for note in result.notes)
    assert result.score_after >= result.score_before


def test_two_runs_with_a_budget_that_ends_them_are_the_same(toy):
    states = [
        optimized(
            toy,
            "bootstrap_fewshot_random_search",
            budget=130,
            optimizer_kwargs={"bootstrap_fewshot_random_search": {"num_candidate_programs": 30}},
        ).copa_result.state
        for _ in range(2)
    ]
    assert states[0] == states[1]


def test_gepa_is_told_the_metrics_own_feedback(toy):
    prompt_lm = writer()
    toy.metric = lambda gold, pred, trace=None, pred_name=None, pred_trace=None: dspy.Prediction(
        score=float(gold.kind == pred.kind), feedback="It is all about the size."
    )
    optimized(toy, "gepa", prompt_lm=prompt_lm)
    assert any("It is all about the size." in request.prompt for request in prompt_lm.requests)


def test_gepa_is_told_the_right_answer_when_the_metric_says_nothing(toy):
    prompt_lm = writer()
    optimized(toy, "gepa", prompt_lm=prompt_lm)
    assert any("The right answer: kind = big." in request.prompt for request in prompt_lm.requests)


def test_a_budget_too_small_for_an_optimizer_is_said(toy):
    result = optimized(toy, "miprov2", budget=20).copa_result
    assert result.stopped == "budget"
    assert result.score_after == result.score_before


def test_an_optimizer_after_weights_works_on_the_tuned_model(toy):
    lm = toy.lm(provider=toy.provider)
    program = optimized(toy, "w -> bootstrap_fewshot_random_search", lm=lm, budget=400)
    tuned = sum("@" in request.model for request in lm.requests)
    assert tuned > len(toy.val) * 4
    assert "@" in program.lm.model


def test_optimizers_follow_one_another(toy):
    result = optimized(toy, "labeled_fewshot -> bootstrap_fewshot -> p", budget=300).copa_result
    names = [phase.phase for phase in result.phases]
    assert names[:4] == ["baseline", "1: labeled_fewshot", "2: bootstrap_fewshot", "3: p"]
    assert result.score_after > result.score_before


def test_the_students_signature_is_not_written_into(toy):
    student = toy.program()
    before = student.signature.instructions
    COPA(metric=toy.metric, strategy="infer_rules", budget=200, lm=toy.lm(), prompt_lm=writer()).compile(
        student, trainset=toy.train, valset=toy.val
    )
    assert student.signature.instructions == before


def test_a_program_that_chooses_demonstrations_per_input_is_marked_as_not_storable(toy):
    lm = toy.lm()
    program = optimized(toy, "knn_fewshot", lm=lm)
    assert program.copa_result.state is None
    with dspy.context(lm=None):
        assert program(size="9.0", weight="1.0").kind == "big"
    assert len(lm.requests[-1].messages) > 3


def test_own_arguments_reach_the_optimizer(toy):
    result = optimized(toy, "labeled_fewshot", optimizer_kwargs={"labeled_fewshot": {"k": 2}}).copa_result
    assert len(result.state["predictors"]["self"]["demos"]) == 2


@pytest.mark.parametrize("name", ["miprov2", "knn_fewshot", "infer_rules", "better_together"])
def test_arguments_an_optimizer_does_not_know_are_refused_by_name(toy, name):
    with pytest.raises(ConfigurationError, match="nonsense"):
        optimized(toy, name, lm=toy.lm(provider=toy.provider), optimizer_kwargs={name: {"nonsense": 1}})


def test_an_optimizer_that_fails_says_which_and_why(toy, monkeypatch):
    def broken(self, *args, **kwargs):
        raise RuntimeError("out of ideas")

    monkeypatch.setattr(teleprompt.LabeledFewShot, "compile", broken)
    with pytest.raises(CopaError, match="labeled_fewshot failed with RuntimeError: out of ideas"):
        optimized(toy, "labeled_fewshot")


def test_what_optimizers_print_is_in_the_log_at_level_debug(toy, caplog):
    streams = sys.stdout, sys.stderr
    with caplog.at_level(logging.DEBUG, logger="copa_harness"):
        optimized(toy, "bootstrap_fewshot_random_search")
    assert any("Will attempt to bootstrap" in message for message in caplog.messages)
    assert (sys.stdout, sys.stderr) == streams
    assert logging.getLogger("dspy").handlers != []


# -- weights


def test_bootstrap_finetune_trains_on_what_the_program_gets_right(toy):
    lm = toy.lm(provider=toy.provider)
    program = optimized(toy, "bootstrap_finetune", lm=lm)
    (rows,) = toy.provider.trained
    assert len(rows) == sum(example.kind == "small" for example in toy.train)
    assert program.lm.model == f"scripted/model@{len(rows)}"
    assert program.copa_result.score_after > program.copa_result.score_before


def test_bootstrap_finetune_survives_answers_that_do_not_parse(toy):
    good = toy.lm().engine

    def answers(messages, model):
        return (
            "nonsense"
            if "@" not in model and "[[ ## weight ## ]]\n1" in messages[-1]["content"]
            else good._answers(messages, model)
        )

    lm = ScriptedLM(answers, fingerprint=lambda model: f"toy:{model}", provider=toy.provider)
    assert "@" in optimized(toy, "bootstrap_finetune", lm=lm).lm.model


def test_bootstrap_finetune_with_nothing_right_is_one_clear_error(toy):
    lm = ScriptedLM({"size": {"kind": "neither"}}, provider=toy.provider)
    with pytest.raises(TrainingError, match="none of 24 training examples right"):
        optimized(toy, "bootstrap_finetune", lm=lm)


def test_better_together_runs_its_second_prompt_step_on_the_tuned_model(toy):
    lm = toy.lm(provider=toy.provider)
    program = optimized(toy, "better_together", lm=lm, budget=500)
    result = program.copa_result
    assert len(toy.provider.trained) == 1
    assert result.score_after > result.score_before
    tuned = [request for request in lm.requests if "@" in request.model]
    assert len(tuned) > 2 * len(toy.val)
    assert result.charged_calls <= 500


def test_better_together_cut_short_keeps_its_best_program_on_the_model_it_was_scored_with(toy):
    lm = toy.lm(provider=toy.provider)
    kwargs = {"better_together": {"strategy": "w -> p"}}
    program = optimized(toy, "better_together", lm=lm, budget=90, optimizer_kwargs=kwargs)
    result = program.copa_result
    assert any("ended it" in note for note in result.notes)
    assert result.score_after > result.score_before
    assert "@" in program.lm.model


def test_a_step_of_better_together_that_fails_is_not_swallowed(toy):
    with pytest.raises(CopaError):
        optimized(toy, "better_together", budget=500)
