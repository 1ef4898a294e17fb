"""Training rows for the weights that were answered before, at no further call."""

import re
from types import SimpleNamespace

import dspy
import pytest

from copa_harness.evaluate.runner import ExampleRun
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize import COPA
from copa_harness.optimize.rollouts import Rollouts
from copa_harness.results import ExampleResult
from tests.optimize.conftest import TwoStages, field


def run_of(program, score, **outputs):
    """A run in which every predictor answered the same."""
    trace = [(predictor, {}, dspy.Prediction(**outputs)) for predictor in program.predictors()]
    return ExampleRun(ExampleResult("row", score), dspy.Prediction(**outputs), tuple(trace))


@pytest.fixture
def program():
    return TwoStages()


def passing(rollouts, pass_score=1.0, **worth):
    return rollouts.passing(pass_score, worth=lambda candidate: worth.get(candidate.name, float("nan")))


def test_one_whole_run_for_each_row_that_has_one_which_passed(program):
    rollouts = Rollouts()
    runs = [run_of(program, score, hint="large", kind="big") for score in (1.0, 0.0, 1.0)]
    rollouts.note(program, SimpleNamespace(name="first"), [5, 2, 7], runs)
    rollouts.note(program, SimpleNamespace(name="first"), [5], runs[:1])
    found = passing(rollouts)
    assert [one.row for one in found] == [5, 7]
    assert [len(one.calls(name)) for one in found for name in ("look", "tell")] == [1, 1, 1, 1]
    assert found[0].calls("tell")[0].outputs == {"kind": "big"}
    assert rollouts.rows == {2, 5, 7}


def test_of_several_runs_on_a_row_the_score_decides_then_the_program_then_the_teacher(program):
    rollouts = Rollouts()
    for name, score, hint in (("good", 0.6, "a"), ("poor", 0.9, "b"), ("good", 0.9, "c"), ("unknown", 0.9, "d")):
        rollouts.note(program, SimpleNamespace(name=name), [0], [run_of(program, score, hint=hint, kind="big")])
    assert passing(rollouts, 0.5, good=0.8, poor=0.2)[0].calls("look")[0].outputs == {"hint": "c"}
    assert passing(rollouts, 0.95, good=0.8, poor=0.2) == ()
    rollouts.note(program, None, [0], [run_of(program, 0.9, hint="taught", kind="big")])
    assert passing(rollouts, 0.5, good=0.8, poor=0.2)[0].calls("look")[0].outputs == {"hint": "taught"}


class Reads(dspy.Module):
    """A stage nobody has labels for, and one that decides by it."""

    def __init__(self):
        super().__init__()
        self.read = dspy.Predict(dspy.Signature("size, weight -> note", "Note the size."))
        self.judge = dspy.Predict(dspy.Signature("note -> kind", "Judge the note."))

    def forward(self, size, weight):
        return self.judge(note=self.read(size=size, weight=weight).note)


def compiled(toy, strategy, *, good_from=4, **settings):
    """Sizes from `good_from` on are judged rightly."""

    def answers(messages, model):
        text = messages[-1]["content"]
        if size := field(text, "size"):
            return {"note": f"size {size}"}
        note = field(text, "note")
        size = float(note.split()[1]) if note else 0.0
        wrong = size < good_from and "@" not in model
        return {"kind": "big" if (size >= 5) != wrong else "small"}

    lm = ScriptedLM(answers, fingerprint=lambda model: f"reads:{model}", provider=toy.provider)
    copa = COPA(metric=toy.metric, strategy=strategy, lm=lm, budget=900, threads=4, **settings)
    return copa.compile(Reads(), trainset=toy.train, valset=toy.val).copa_result


def weights_note(result):
    return next(note for note in result.notes if "rows from" in note)


def test_weights_after_prompts_learn_from_runs_made_before_at_no_further_call(toy):
    result = compiled(toy, "p -> w", good_from=2, bootstrap=True)
    assert "training rows (no further calls)" in weights_note(result)
    by_kind = [row["messages"][-1]["content"] for row in toy.provider.trained[0]]
    assert sum("note ##" in text for text in by_kind) == sum("kind ##" in text for text in by_kind) >= 12
    validation = {f"[[ ## size ## ]]\n{row.size}\n\n[[ ## weight ## ]]\n{row.weight}" for row in toy.val}
    asked = [row["messages"][-2]["content"] for rows in toy.provider.trained for row in rows]
    assert not any(text in one for text in validation for one in asked)


def test_a_refit_learns_from_passing_runs_on_validation_rows_at_no_further_call(toy):
    alone = compiled(toy, "w", good_from=2, adoption_p=1.0)
    whole = compiled(toy, "w", good_from=2, adoption_p=1.0, refit=True)
    assert whole.charged_calls == alone.charged_calls
    assert whole.model != alone.model
    asked = [row["messages"][-2]["content"] for row in toy.provider.trained[-1]]
    validation = {f"[[ ## size ## ]]\n{row.size}\n\n[[ ## weight ## ]]\n{row.weight}" for row in toy.val}
    assert sum(any(text in one for one in asked) for text in validation) >= 12


def test_where_no_run_was_made_before_the_best_program_is_run_and_the_note_says_what_that_cost(toy):
    result = compiled(toy, "w", good_from=2)
    (paid,) = re.findall(r"passing runs of 1 program on \d+ training rows \((\d+) calls\)", weights_note(result))
    assert len(toy.train) < int(paid) <= 2 * len(toy.train)


def test_a_program_that_gets_nothing_right_is_not_run_for_training_rows(toy):
    toy.metric = lambda example, prediction, trace=None: 0.0
    result = compiled(toy, "w -> p", bootstrap=False)
    first = next(phase for phase in result.phases if phase.phase == "1: w")
    assert first.usage.paid_calls == 0
    assert any("no weights were trained" in note for note in result.notes)
