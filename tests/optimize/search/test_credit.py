"""Who earned the gain."""

import dspy
import numpy as np
import pytest

from copa_harness.lm.call_context import open_scope
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.credit import CreditedPart, assign_credit, changed_parts, mixed
from copa_harness.optimize.search.scoring import Validation
from copa_harness.optimize.step_budget import CallBudget
from copa_harness.results import Phase

DEMOS = (dspy.Example(q="7", a="right").with_inputs("q"),)


def rows(n=20):
    return [dspy.Example(q=str(i), a="right").with_inputs("q") for i in range(n)]


def metric(example, prediction, trace=None):
    return float(prediction.a == example.a)


def additive(n_instruction=4, n_demos=8, n_tuned=6):
    """A model that gets so many examples right for each part, others for each, so that gains add up."""

    def answers(messages, model):
        i = int(messages[-1]["content"].split("[[ ## q ## ]]")[1].split()[0])
        right = i < n_instruction and "Good." in messages[0]["content"]
        right |= n_instruction <= i < n_instruction + n_demos and len(messages) > 2
        right |= n_instruction + n_demos <= i < n_instruction + n_demos + n_tuned and "@" in model
        return {"a": "right" if right else "wrong"}

    return ScriptedLM(answers, fingerprint=lambda model: f"additive:{model}")


@pytest.fixture
def pair():
    """A student and a winner that differ in weights, instruction and demonstrations."""
    lm = additive()
    student = Candidate.of(dspy.Predict(dspy.Signature("q -> a", "Answer.")), lm=lm)
    tuned = lm.copy(model="scripted/model@1")
    winner = student.with_lms((tuned,)).with_instructions({"self": "Good."}).with_demos({"self": DEMOS})
    return student, winner


def credit(student, winner, *, calls):
    validation = Validation(rows(), metric=metric, threads=4, seed=0)
    with open_scope("test") as scope:
        for candidate in (student, winner):
            validation.complete(candidate, allowance=CallBudget(scope, 40), phase=Phase.SEARCH)
        found = assign_credit(
            student,
            winner,
            validation=validation,
            allowance=CallBudget(scope, 40 + calls),
        )
        return found, scope.charged_calls - 40


def gains(found):
    return {row["part"]: row["gain"] for row in found["parts"]}


def test_what_adds_up_is_credited_exactly_and_sums_to_the_whole_gain(pair):
    found, spent = credit(*pair, calls=1000)
    assert found["method"] == "Shapley value"
    assert gains(found) == pytest.approx({"instruction": 0.2, "demonstrations": 0.4, "weights": 0.3})
    assert found["total"]["gain"] == pytest.approx(sum(gains(found).values()))
    assert found["n_cells"] == 8
    assert spent == 6 * 20
    assert all(row.keys() == {"predictor", "part", "gain", "method"} for row in found["parts"])


def test_with_less_to_spend_parts_are_left_out_one_at_a_time(pair):
    found, spent = credit(*pair, calls=65)
    assert found["method"] == "leave one out"
    assert gains(found) == pytest.approx({"instruction": 0.2, "demonstrations": 0.4, "weights": 0.3})
    assert spent == 60


def test_what_cannot_be_scored_is_not_measured_rather_than_guessed(pair):
    found, spent = credit(*pair, calls=25)
    assert [(row["method"], row["gain"] is None) for row in found["parts"]] == [
        ("leave one out", False),
        ("not measured", True),
        ("not measured", True),
    ]
    assert spent == 20


def test_parts_that_only_work_together_share_the_gain():
    def answers(messages):
        return {"a": "right" if "Good." in messages[0]["content"] and len(messages) > 2 else "wrong"}

    student = Candidate.of(dspy.Predict(dspy.Signature("q -> a", "Answer.")), lm=ScriptedLM(answers))
    winner = student.with_instructions({"self": "Good."}).with_demos({"self": DEMOS})
    found, _ = credit(student, winner, calls=1000)
    assert gains(found) == pytest.approx({"instruction": 0.5, "demonstrations": 0.5})


def test_nothing_changed_earns_nothing_and_costs_nothing(pair):
    assert credit(pair[0], pair[0], calls=1000) == ({}, -20)


class TwoSteps(dspy.Module):
    """Two predictors on one model."""

    def __init__(self):
        super().__init__()
        self.first, self.second = dspy.Predict("q -> b"), dspy.Predict("b -> a")

    def forward(self, q):
        return self.second(b=self.first(q=q).b)


def test_every_stage_has_parts_of_its_own_and_shared_weights_are_one(pair):
    lm = additive()
    student = Candidate.of(TwoSteps(), lm=lm)
    tuned = lm.copy(model="scripted/model@1")
    winner = student.with_lms((tuned, tuned)).with_demos({"first": DEMOS}).with_instructions({"second": "Good."})
    parts = changed_parts(student, winner)
    assert parts == (
        CreditedPart("", "weights"),
        CreditedPart("first", "demonstrations"),
        CreditedPart("second", "instruction"),
    )
    assert mixed(student, winner, parts).key == winner.key
    assert mixed(student, winner, ()).key == student.key
    assert mixed(student, winner, parts[1:]).lms == student.lms
    one_tuned = student.with_lms((lm, tuned))
    assert changed_parts(student, one_tuned) == (CreditedPart("second", "weights"),)
    assert np.all([part.lm is lm for part in mixed(student, one_tuned, ()).parts])
