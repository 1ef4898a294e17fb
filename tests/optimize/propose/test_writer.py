"""Instructions written by a prompt LM, grounded or after reflection, and what it is shown."""

import dspy
import numpy as np
import pytest

from copa_harness.evaluate import run_examples
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize.options import GROUNDINGS
from copa_harness.optimize.propose.proposer import propose_instructions
from copa_harness.optimize.propose.reflection import find_failures, suspects
from copa_harness.optimize.propose.render import program_code
from copa_harness.optimize.propose.writer import TIPS
from copa_harness.optimize.search.bandit import Observation
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.trial_memory import SearchMemory
from copa_harness.optimize.step_budget import CallBudget
from copa_harness.results import Phase
from tests.optimize.conftest import context_of


class TwoSteps(dspy.Module):
    """Notes what matters, then decides."""

    def __init__(self):
        super().__init__()
        self.note = dspy.Predict(dspy.Signature("size, weight -> note", "Note what matters."))
        self.decide = dspy.Predict(dspy.Signature("note -> kind", "Decide."))

    def forward(self, size, weight):
        return self.decide(note=self.note(size=size, weight=weight).note)


def two_steps(kind="small"):
    return ScriptedLM(
        lambda messages: {"kind": kind} if "[[ ## kind ## ]]" in messages[0]["content"] else {"note": "n/a"}
    )


def write(student, toy, lm, *, memory=None, past=None, calls=200, **settings):
    """Options by predictor, and the scope they were proposed in."""
    with open_scope("test") as scope:
        context = context_of(toy, student, prompt_lm=lm, **settings)
        allowance, memory = CallBudget(scope, calls), memory or SearchMemory()
        options = propose_instructions(context, student, allowance=allowance, memory=memory, past=past)
        return options, scope


def numbered():
    """A writer whose every proposal is new; its requests show what it was shown."""
    counted = iter(range(1000))
    return ScriptedLM(lambda messages: {"proposed_instruction": f"Version {next(counted)}."})


def test_unusable_repeated_and_empty_proposals_are_left_out(toy):
    answers = [{"proposed_instruction": text} for text in ("Look at size.", "Tell.", "")] + ["nonsense"]
    student = Candidate.of(toy.program(), lm=toy.lm())
    lm = ScriptedLM(answers)
    options, _ = write(student, toy, lm, past={"self": [("Tell.", 0.25)]}, n_reflected=0)
    written = [option for option in options["self"] if "written" in option.name]
    assert [option.text for option in written] == ["Look at size."]
    assert len({request.seed for request in lm.requests}) == 4


@pytest.mark.parametrize("grounding", GROUNDINGS)
def test_every_grounding_shows_its_own_part(toy, grounding):
    marks = {
        "data": "kind (to be answered): one of big",
        "program": "class TwoSteps",
        "examples": "[[ ## step_examples ## ]]",
        "history": "0.25: Guess.",
    }
    student = Candidate.of(TwoSteps(), lm=two_steps())
    lm = ScriptedLM(lambda messages: {"proposed_instruction": "New.", "program_description": "It sorts things."})
    past = {"note": [("Guess.", 0.25)], "decide": [("Guess.", 0.25)]}
    toy.train = [dspy.Example(**example, note="n").with_inputs("size", "weight") for example in toy.train]
    write(student, toy, lm, past=past, groundings=(grounding,), n_proposed=1, n_reflected=0)
    prompts = "\n".join(request.prompt for request in lm.requests if "current_instruction" in request.prompt)
    shown = {name for name, mark in marks.items() if mark in prompts}
    assert shown == (set(marks) if grounding == "all" else {grounding} & set(marks))
    assert TIPS["short"] in prompts
    assert "note: size, weight -> note" in prompts
    n_described = sum("program_steps" in request.prompt for request in lm.requests)
    assert n_described == (1 if grounding in ("all", "program") else 0)


def test_the_demonstrations_that_carried_weight_are_shown_to_the_writer(toy):
    student = Candidate.of(toy.program(), lm=toy.lm())

    class Weighty(SearchMemory):
        def helpful_demos(self, predictor, pool, *, n=3):
            return [pool[4]]

    lm = ScriptedLM(lambda messages: {"proposed_instruction": "New."})
    write(student, toy, lm, memory=Weighty(), groundings=("weighty",), n_proposed=1, n_reflected=0)
    (request,) = lm.requests
    assert f"size={toy.train[4].size}; weight={toy.train[4].weight}; kind=" in request.prompt
    assert "[[ ## weighty_demonstrations ## ]]" in request.prompt


def test_reflection_shows_wrong_answers_with_the_metrics_feedback(toy):
    def metric(gold, pred, trace=None, pred_name=None, pred_trace=None):
        return dspy.Prediction(score=float(gold.kind == pred.kind), feedback=f"{pred_name}: five is the border")

    toy.metric = metric
    student = Candidate.of(toy.program(), lm=toy.lm())  # says small to everything
    lm = ScriptedLM(lambda messages: {"proposed_instruction": f"Mind {'five' if 'border' in str(messages) else 'it'}."})
    options, scope = write(student, toy, lm)
    assert any(option.name.startswith("reflected") for option in options["self"])
    prompts = [request.prompt for request in lm.requests if "mistakes" in request.prompt]
    assert prompts
    assert "feedback: self: five is the border" in prompts[0]
    assert "kind: small" in prompts[0]
    assert scope.phase_usages()[Phase.INSTRUCTIONS.value].paid_calls == 8 + lm.calls


def test_without_feedback_the_right_answer_is_told(toy):
    student = Candidate.of(toy.program(), lm=toy.lm())
    with open_scope("test") as scope:
        context, generator = context_of(toy, student), np.random.default_rng(0)
        failures = find_failures(context, student, allowance=CallBudget(scope, 50), generator=generator)
    assert failures["self"]
    assert all("The right answer: kind = big" in failure.text for failure in failures["self"])


def test_nothing_is_looked_at_that_the_allowance_does_not_pay_for(toy):
    lm = toy.lm()
    options, scope = write(Candidate.of(toy.program(), lm=lm), toy, numbered(), calls=3)
    assert lm.calls == 0
    assert scope.charged_calls == 3
    assert len([option for option in options["self"] if "written" in option.name]) == 3


def blamed(program, lm, example, metric):
    (run,) = run_examples(program, [example], metric=metric, split="train", lm=lm)
    return suspects(program, example, run)


def test_blame_goes_along_the_trace(toy):
    program, wrong = TwoSteps(), dspy.Example(size="9", weight="1", kind="big").with_inputs("size", "weight")
    assert blamed(program, two_steps(), wrong, toy.metric) == ["note", "decide"]
    cleared = dspy.Example(**wrong, note="n/a").with_inputs("size", "weight")
    assert blamed(program, two_steps(), cleared, toy.metric) == ["decide"]
    guilty = dspy.Example(**wrong, note="other").with_inputs("size", "weight")
    assert blamed(program, two_steps(), guilty, toy.metric) == ["note"]


def test_an_answer_that_does_not_parse_is_its_own_predictors_fault(toy):
    lm = ScriptedLM(lambda messages: {"note": "n"} if "[[ ## size ## ]]" in messages[-1]["content"] else "nonsense")
    assert blamed(TwoSteps(), lm, toy.train[0], toy.metric) == ["note", "decide"]


def test_the_bandit_decides_how_instructions_are_written(toy):
    memory = SearchMemory()
    for arm, gain in (("instruction: reflected", 0.4), ("instruction: written", -0.3)):
        for _ in range(40):
            memory.bandit.observe(Observation(1, {arm: 1}, gain, 0.001, 20))
    student = Candidate.of(toy.program(), lm=toy.lm())
    options, _ = write(student, toy, numbered(), memory=memory)
    made = [option.name.split()[0] for option in options["self"] if option.name[-1].isdigit()]
    assert made == ["reflected"] * 4
    before = write(student, toy, numbered())[0]
    assert [option.name.split()[0] for option in before["self"] if option.name[-1].isdigit()] == [
        "written",
        "reflected",
        "written",
        "reflected",
    ]


def test_the_code_of_a_bare_predictor_is_its_signature():
    assert program_code(dspy.Predict("question -> answer")) == "self = Predict(question -> answer)"
    assert "class TwoSteps" in program_code(TwoSteps())


# -- what the writer of one stage is shown of the others


def shown_to(stages, signature_field):
    stages.compiled("p", budget=200)
    return [request.prompt for request in stages.writer.requests if f"## {signature_field} ## ]]" in request.prompt]


def test_the_writer_of_a_stage_sees_what_the_other_stages_are_told(stages):
    prompts = shown_to(stages, "mistakes")
    assert any("look: size, weight -> hint" in p and "its instruction: Tell the kind." in p for p in prompts)


def test_a_mistake_of_an_early_stage_is_shown_with_what_came_of_it(stages):
    early = [p for p in shown_to(stages, "mistakes") if p.startswith("[[ ## program_step ## ]]\nlook")]
    assert early
    assert "hint: large\nthe whole program then answered:\n  kind: small\nfeedback: Score 0 of 1." in early[0]


def test_a_stage_the_data_have_no_rows_for_is_shown_what_was_bootstrapped(stages):
    prompts = shown_to(stages, "step_examples")
    ours = [p for p in prompts if p.startswith("[[ ## program_step ## ]]\ntell")]
    assert ours
    assert all("hint=little; size=" in p and "augmented" not in p for p in ours)


def test_the_writer_of_a_stage_sees_what_the_whole_program_has_to_answer(stages):
    early = [p for p in shown_to(stages, "data_summary") if p.startswith("[[ ## program_step ## ]]\nlook")]
    assert early
    assert "kind (to be answered): one of big" in early[0]


def test_what_stands_around_an_instruction_is_taken_off(toy):
    answers = ['"Look at size."', "```\nMind the size.\n```", "**Proposed instruction:** Size decides.", "Instruct."]
    lm = ScriptedLM([{"proposed_instruction": text} for text in answers])
    options, _ = write(Candidate.of(toy.program(), lm=toy.lm()), toy, lm, n_reflected=0)
    written = [option.text for option in options["self"] if "written" in option.name]
    assert written == ["Look at size.", "Mind the size.", "Size decides.", "Instruct."]
