"""COPA as a whole, on the toy task."""

import json

import dspy
import pytest

from copa_harness.documents import from_json, to_json
from copa_harness.errors import ConfigurationError, MetricError, ProviderError, TaskError, TrainingError
from copa_harness.evaluate import evaluate
from copa_harness.lm.cache.store import ResponseCache
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.gateway import Gateway
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize import COPA, apply_state, to_state
from copa_harness.results import OptimizationResult


def optimized(toy, strategy="p", *, lm=None, program=None, valset="val", **settings):
    optimizer = COPA(**{"metric": toy.metric, "strategy": strategy, "budget": 150, "lm": lm or toy.lm(), **settings})
    return optimizer.compile(
        program or toy.program(), trainset=toy.train, valset=toy.val if valset == "val" else valset
    )


def tunable(toy, **kwargs):
    return toy.lm(provider=toy.provider, **kwargs)


def settings_of(program):
    state = to_state(program)
    return json.dumps(state, sort_keys=True)


def test_prompts_are_improved_within_the_budget(toy):
    lm = toy.lm()
    result = optimized(toy, lm=lm).copa_result
    assert result.score_after > result.score_before + 0.2
    assert lm.calls == result.charged_calls == result.usage.paid_calls <= 150
    assert [phase.phase for phase in result.phases] == ["baseline", "p"]
    assert result.phases[1].score_before == result.score_before
    assert result.phases[1].score_after == result.score_after


def test_the_score_it_reports_is_the_score_the_program_has(toy):
    program = optimized(toy)
    again = evaluate(program, toy.val, metric=toy.metric, split="validation", lm=toy.lm())
    assert again.score == pytest.approx(program.copa_result.score_after)


def test_the_student_is_not_changed(toy):
    student = toy.program()
    before = student.dump_state()
    optimized(toy, program=student)
    assert student.dump_state() == before
    assert student.lm is None
    assert not hasattr(student, "copa_result")


def test_the_result_has_its_model_attached(toy):
    lm = toy.lm()
    program = optimized(toy, lm=lm)
    assert program.lm is not None
    assert program.lm.model == lm.model
    with dspy.context(lm=None):
        assert program(size="9.0", weight="1").kind in ("big", "small")


def test_same_seed_same_program_whatever_the_threads(toy):
    found = {
        (settings_of(program), program.copa_result.charged_calls)
        for program in (optimized(toy, threads=threads, seed=3) for threads in (1, 16))
    }
    assert len(found) == 1


def test_another_seed_tries_other_things(toy):
    first, second = optimized(toy, seed=1).copa_result, optimized(toy, seed=2).copa_result
    assert first.state != second.state or first.trials != second.trials


@pytest.mark.parametrize("calls", [1, 15, 16, 17, 30, 47, 64])
def test_whatever_the_budget_the_result_is_no_worse_and_the_budget_holds(toy, calls):
    lm = toy.lm()
    result = optimized(toy, budget=calls, lm=lm).copa_result
    assert lm.calls <= calls
    if calls < len(toy.val):
        assert result.score_before is None
        assert result.stopped == "budget"
        assert result.exhausted
        assert "does not pay for scoring the program as written" in result.notes[0]
        assert result.headlines == result.notes[:1]
    else:
        assert result.score_after >= result.score_before


def test_a_run_that_was_killed_goes_on_where_it_was_and_ends_the_same(toy, tmp_path):
    whole = optimized(toy)

    class Killed(BaseException):
        pass

    calls = 0
    good = toy.lm().engine

    def answers(messages, model):
        nonlocal calls
        calls += 1
        if calls > 60:
            raise Killed
        return good._answers(messages, model)

    def lm(script):
        gateway = Gateway(cache=ResponseCache(tmp_path / "answers"))
        return ScriptedLM(script, fingerprint=lambda model: f"toy:{model}", gateway=gateway)

    with pytest.raises(Killed):
        optimized(toy, lm=lm(answers), threads=1)
    rest = lm(good._answers)
    again = optimized(toy, lm=rest)
    assert settings_of(again) == settings_of(whole)
    assert again.copa_result.charged_calls == whole.copa_result.charged_calls
    assert rest.calls == whole.copa_result.charged_calls - 60


def test_none_returns_the_program_as_written_and_costs_nothing(toy):
    lm = toy.lm()
    program = optimized(toy, "none", lm=lm)
    assert lm.calls == 0
    assert program.copa_result.stopped == "completed"
    assert program.signature.instructions == toy.program().signature.instructions
    assert program.lm.model == lm.model


def test_the_callers_scope_is_left_alone(toy):
    with open_scope("outside") as scope:
        optimized(toy)
        assert scope.charged_calls == 0


def test_without_a_valset_a_part_of_the_trainset_decides(toy):
    result = optimized(toy, valset=None).copa_result
    assert result.n_validation == 8


def test_a_perfect_program_is_left_alone(toy):
    toy.metric = lambda example, prediction, trace=None: 1.0
    result = optimized(toy, "p -> p").copa_result
    assert result.stopped == "perfect score"
    assert result.charged_calls == len(toy.val)


# -- weights


def test_weights_are_tuned_on_labels_and_adopted_when_not_worse(toy):
    program = optimized(toy, "w", lm=tunable(toy))
    assert program.lm.model == "scripted/model@24"
    assert program.copa_result.model == "scripted/model@24"
    (rows,) = toy.provider.trained
    assert len(rows) == 24
    assert all(len(row["messages"]) == 3 for row in rows)
    for example, row in zip(toy.train, rows, strict=True):
        assert f"[[ ## kind ## ]]\n{example.kind}" in row["messages"][-1]["content"]


def test_weights_that_make_it_worse_are_not_adopted(toy):
    def answers(messages, model):
        return {"kind": "neither" if "@" in model else "small"}

    lm = ScriptedLM(answers, fingerprint=lambda model: model, provider=toy.provider)
    program = optimized(toy, "w", lm=lm)
    assert program.lm.model == "scripted/model"
    assert any("not adopted" in note for note in program.copa_result.notes)


def test_weights_are_trained_bare_and_behind_the_demonstrations_found(toy):
    result = optimized(toy, "labeled_fewshot -> w", lm=tunable(toy), budget=300).copa_result
    bare, behind = toy.provider.trained
    assert {len(row["messages"]) for row in bare} == {3}
    assert {len(row["messages"]) for row in behind} > {3}
    assert any("served with resample:" in note and "none:0.2" in note for note in result.notes)
    assert [phase.phase for phase in result.phases][:3] == ["baseline", "1: labeled_fewshot", "2: w"]


def test_prompts_after_weights_are_searched_on_the_tuned_model(toy):
    lm = tunable(toy)
    optimized(toy, "w -> p", lm=lm)
    tuned = [request for request in lm.requests if "@" in request.model]
    assert len(tuned) > len(toy.val)
    assert any(len(request.messages) > 2 for request in tuned)


def test_rows_given_by_the_user_are_used_as_they_are(toy):
    row = {"messages": [{"role": "user", "content": "size 1"}, {"role": "assistant", "content": "small"}]}
    optimized(toy, "w", lm=tunable(toy), finetune_data=[row])
    assert toy.provider.trained == [[row]]


def test_a_model_that_cannot_be_tuned_is_one_clear_error(toy):
    with pytest.raises(ConfigurationError, match="cannot be fine-tuned"):
        optimized(toy, "p -> w")


def test_joint_searches_weights_and_prompts_at_once(toy):
    lm = tunable(toy)
    program = optimized(toy, "joint", lm=lm)
    result = program.copa_result
    assert len(toy.provider.trained) == 2
    assert result.score_after > result.score_before
    assert {"@" in request.model for request in lm.requests} == {True, False}


class TwoSteps(dspy.Module):
    def __init__(self):
        super().__init__()
        self.read = dspy.Predict(dspy.Signature("size, weight -> note", "Note the size."))
        self.judge = dspy.Predict(dspy.Signature("note -> kind", "Judge the note."))

    def forward(self, size, weight):
        return self.judge(note=self.read(size=size, weight=weight).note)


@pytest.fixture
def two_steps(toy):
    """A two-stage program, and a model whose second stage needs a demonstration of each kind."""

    def answers(messages, model):
        text = messages[-1]["content"]
        if "[[ ## note ## ]]\n" not in text.split("Respond")[0]:
            return {"note": "size " + text.split("[[ ## size ## ]]\n")[1].split()[0]}
        shown = " ".join(message["content"] for message in messages[1:-1])
        size = float(text.split("size ")[1].split()[0])
        return {"kind": "big" if (size >= 5 and "\nbig" in shown) or ("@" in model and size >= 5) else "small"}

    toy.program = TwoSteps
    toy.lm = lambda **kwargs: ScriptedLM(answers, **{"fingerprint": lambda model: f"two:{model}", **kwargs})
    return toy


def test_programs_of_several_steps_get_demonstrations_from_their_own_passing_traces(two_steps):
    lm = two_steps.lm()
    program = optimized(two_steps, budget=250, lm=lm)
    result = program.copa_result
    assert result.charged_calls <= 250
    assert set(result.state["predictors"]) == {"read", "judge"}
    prompts = [message["content"] for request in lm.requests for message in request.messages[1:-1]]
    assert any(prompt.startswith("[[ ## note ## ]]\nsize ") for prompt in prompts)


def test_programs_of_several_steps_are_tuned_on_passing_traces(two_steps):
    program = optimized(two_steps, "w", lm=two_steps.lm(provider=two_steps.provider), budget=600)
    (rows,) = two_steps.provider.trained
    n_small = sum(example.kind == "small" for example in two_steps.train)
    assert len(rows) == 2 * n_small
    assert "@" in program.read.lm.model
    assert program.read.lm is program.judge.lm


def test_traces_that_never_pass_are_one_clear_error(two_steps):
    two_steps.metric = lambda example, prediction, trace=None: 0.0
    with pytest.raises(TrainingError, match="no rows"):
        optimized(two_steps, "w", lm=two_steps.lm(provider=two_steps.provider), budget=600)


@pytest.mark.parametrize("strategy", ["joint", "w -> p"])
def test_without_rows_to_train_on_the_rest_is_searched_and_a_note_says_so(two_steps, strategy):
    writer = ScriptedLM(lambda messages: {"proposed_instruction": "Tell big from small by size."})
    two_steps.metric = lambda example, prediction, trace=None: 0.5 * (example.kind == prediction.kind)
    lines = []
    program = optimized(
        two_steps,
        strategy,
        lm=two_steps.lm(provider=two_steps.provider),
        budget=900,
        on_progress=lines.append,
        prompt_lm=writer,
    )
    result = program.copa_result
    assert not two_steps.provider.trained
    assert sum("no weights were trained" in note for note in result.notes) == 1
    assert any("no weights were trained" in phase.note for phase in result.phases)
    assert any("no training example was answered well enough" in line for line in lines)
    assert result.n_trials > 0
    assert "@" not in result.model


# -- demos -> instructions


def test_the_alternating_loop_says_why_it_stopped(toy):
    result = optimized(toy, "demos -> instructions", budget=2000).copa_result
    assert result.stopped == "converged"
    assert any("less than epsilon" in note for note in result.notes)
    assert result.score_after > result.score_before


def test_an_improvement_no_larger_than_the_noise_has_converged(toy, monkeypatch):
    monkeypatch.setattr("copa_harness.optimize.search.scoring.Validation.standard_error", lambda *_: 1.0)
    result = optimized(toy, "demos -> instructions", budget=2000).copa_result
    assert result.stopped == "converged"
    assert any("converged: cycle 1" in note and "no more than the noise" in note for note in result.notes)


def test_the_alternating_loop_ends_after_its_cycles(toy):
    result = optimized(toy, "demos -> instructions", budget=400, epsilon=0.0, max_cycles=2).copa_result
    assert result.stopped == "max_cycles"


def test_the_alternating_loop_ends_with_the_budget(toy):
    result = optimized(toy, "demos -> instructions", budget=70, epsilon=0.0, max_cycles=9).copa_result
    assert result.stopped == "budget"
    assert result.charged_calls <= 70


# -- the prompt LM


def test_the_prompt_lms_instructions_are_tried(toy):
    text = "If size is at least 5 answer big, otherwise answer small."
    toy.train = [example for example in toy.train if example.kind == "small"] + toy.train[:1]
    writer = ScriptedLM(lambda messages: {"proposed_instruction": text})
    program = optimized(toy, prompt_lm=writer, max_demos=0)
    assert writer.calls == 2 * 4  # two rounds
    assert text in {program.signature.instructions} or program.copa_result.score_after >= 0.8


# -- storing and restoring


def test_a_finished_optimization_is_restored_without_a_call(toy):
    lm = tunable(toy)
    program = optimized(toy, "w -> p", lm=lm)
    stored = json.loads(json.dumps(to_json(program.copa_result)))
    result = from_json(OptimizationResult, stored)
    assert result == program.copa_result
    fresh = tunable(toy)
    restored = apply_state(toy.program(), result.state, lm=fresh)
    assert settings_of(restored) == settings_of(program)
    assert restored.lm.model == program.lm.model
    assert fresh.calls == 0
    score = evaluate(restored, toy.val, metric=toy.metric, split="validation").score
    assert score == pytest.approx(result.score_after)


def test_state_of_another_program_is_refused(toy, two_steps):
    state = to_state(TwoSteps())
    with pytest.raises(ConfigurationError, match="it changed since"):
        apply_state(dspy.Predict("size, weight -> kind"), state, lm=toy.lm())


# -- wrong arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "px"}, "strategy"),
        ({"budget": "huge"}, "light"),
        ({"threads": 0}, "threads"),
        ({"max_cycles": 0}, "max_cycles"),
        ({"sampler": "magic"}, "sampler"),
        ({"epsilon": 2}, "epsilon"),
        ({"metric": "accuracy"}, "metric"),
        ({"seed": -1}, "seed"),
        ({"optimizer_kwargs": {"mipro": {}}}, "mipro"),
        ({"lora": {"rnak": 8}}, r"settings rnak; expected some of rank, alpha, .*Did you mean 'rank'\?"),
        ({"lora": 8}, "a dictionary of LoRA settings"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(toy, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        COPA(**{"metric": toy.metric, **settings})


def test_empty_and_tiny_trainsets_are_refused(toy):
    optimizer = COPA(metric=toy.metric, lm=toy.lm(), strategy="p")
    with pytest.raises(TaskError, match="no examples"):
        optimizer.compile(toy.program(), trainset=[])
    with pytest.raises(TaskError, match="at least 4"):
        optimizer.compile(toy.program(), trainset=toy.train[:3])


def test_a_model_that_is_not_metered_is_refused(toy):
    with pytest.raises(ConfigurationError, match="build_lm"):
        COPA(metric=toy.metric, lm=dspy.LM("openai/gpt-x"), strategy="p").compile(toy.program(), trainset=toy.train)


def test_no_model_at_all_is_refused(toy):
    with dspy.context(lm=None), pytest.raises(ConfigurationError, match="no language model"):
        COPA(metric=toy.metric, strategy="p").compile(toy.program(), trainset=toy.train)


def test_the_configured_model_is_the_default(toy):
    lm = toy.lm()
    with dspy.context(lm=lm):
        COPA(metric=toy.metric, strategy="p", budget=40).compile(toy.program(), trainset=toy.train)
    assert lm.calls > 0


def test_a_broken_metric_is_one_clear_error(toy):
    toy.metric = lambda example, prediction, trace=None: example.nothing_like_it
    with pytest.raises(MetricError, match="AttributeError"):
        optimized(toy)


def test_a_provider_that_is_down_is_one_clear_error(toy):
    with pytest.raises(ProviderError, match="no connection"):
        optimized(toy, lm=ScriptedLM(lambda messages: ProviderError("no connection")))
