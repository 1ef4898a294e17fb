"""Rounds of proposing and searching, and what a whole optimization says about itself."""

import dspy

from copa_harness.documents import from_json, to_json
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize.copa import COPA
from copa_harness.results import OptimizationResult


def optimized(toy, **more):
    copa = COPA(**{"metric": toy.metric, "budget": 150, "lm": toy.lm(), "strategy": "p", **more})
    return copa.compile(toy.program(), trainset=toy.train, valset=toy.val)


def test_later_rounds_propose_what_the_first_could_not(toy):
    result = optimized(toy, budget=400).copa_result
    studies = {trial["study"] for trial in result.trials}
    assert studies == {"p", "p, round 2"}
    arms = {arm for trial in result.trials if trial["study"] == "p, round 2" for arm in trial["arms"]}
    assert arms - {arm for trial in result.trials if trial["study"] == "p" for arm in trial["arms"]}


def test_the_result_says_what_was_learned_and_who_earned_it_and_keeps_it_as_json(toy):
    result = optimized(toy).copa_result
    assert result.charged_calls <= 150
    assert {row["family"] for row in result.learned} >= {"demos", "instruction"}
    assert all(-1 <= row["gain"] <= 1 for row in result.learned)
    assert {row["part"] for row in result.credit["parts"]} <= {"weights", "instruction", "demonstrations"}
    assert result.credit["total"]["gain"] > 0
    again = from_json(OptimizationResult, to_json(result))
    assert again.credit == result.credit
    assert again.learned == result.learned
    assert again.trials == result.trials
    assert len(result.trials) == result.n_trials


def test_a_record_of_before_is_still_read(toy):
    record = to_json(optimized(toy).copa_result)
    for name in ("credit", "learned", "trials"):
        del record[name]
    assert from_json(OptimizationResult, record).trials == ()


class TwoSteps(dspy.Module):
    """Reads, then decides."""

    def __init__(self):
        super().__init__()
        self.read = dspy.Predict(dspy.Signature("size, weight -> note", "Note."))
        self.decide = dspy.Predict(dspy.Signature("note -> kind", "Decide."))

    def forward(self, size, weight):
        return self.decide(note=self.read(size=size, weight=weight).note)


def test_every_stage_of_a_program_gets_proposals_and_credit(toy):
    """The first stage reads well only when told how; the second decides well as it is."""

    def answers(messages, model):
        asked = messages[-1]["content"]
        if "[[ ## size ## ]]" not in asked:
            return {"kind": "big" if "large" in asked else "small"}
        size = float(asked.split("[[ ## size ## ]]")[1].split()[0])
        return {"note": "large" if size >= 5 and "compare" in messages[0]["content"] else "little"}

    writer = ScriptedLM(
        lambda messages: {
            "proposed_instruction": "Read and compare." if "read:" in messages[-1]["content"] else "Decide now.",
            "program_description": "Reads, then decides.",
        }
    )
    lm = ScriptedLM(answers, fingerprint=lambda model: f"steps:{model}")
    copa = COPA(metric=toy.metric, budget=600, lm=lm, strategy="p", prompt_lm=writer, max_demos=3, n_demo_sets=2)
    program = copa.compile(TwoSteps(), trainset=toy.train, valset=toy.val)
    assert program.read.signature.instructions == "Read and compare."
    result = program.copa_result
    by_part = {(row["predictor"], row["part"]): row for row in result.credit["parts"]}
    assert by_part["read", "instruction"]["gain"] > 0.2
    assert {row["arm"] for row in result.learned if row["family"] == "instruction"} & {"written", "reflected"}
