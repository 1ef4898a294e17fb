"""A robust search: a row counts as the worst of itself and its changed forms."""

import dspy
import pytest

from copa_harness import COPA
from copa_harness.errors import ConfigurationError, ProviderError
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.scoring import Validation
from copa_harness.optimize.step_budget import CallBudget
from copa_harness.results import Phase
from copa_harness.robustness import Forms
from copa_harness.session.optimizations import _search_key

CAREFUL = "Never mind the case."


def rows(n):
    made = [f"some words and one more w{i}" for i in range(n)]
    return [dspy.Example(text=text, answer=str(i % 2)).with_inputs("text") for i, text in enumerate(made)]


def right(example, prediction, trace=None):
    return example.answer == prediction.answer


def answer(messages):
    """Knows the parity of a row's number; capitals confuse it unless it is told not to mind."""
    text = messages[-1]["content"].split("[[ ## text ## ]]\n")[1].split("\n\nRespond with")[0]
    if "w3 " in text + " " or "w9" in text:
        return {"answer": "dunno"}
    if "W5" in text:
        return ProviderError("no w5 in capitals")
    number = int(text.split()[-1].lower().strip("w"))
    shouted = text != text.lower() and CAREFUL not in messages[0]["content"]
    return {"answer": "dunno" if shouted else str(number % 2)}


def scored(*, forms, n=6, program=None):
    lm = ScriptedLM(answer)
    validation = Validation(rows(n), metric=right, threads=2, seed=0, forms=forms)
    candidate = Candidate.of(program or dspy.Predict("text -> answer"), lm=lm)
    with open_scope("test") as scope, dspy.context(lm=lm):
        validation.complete(candidate, allowance=CallBudget(scope, 1000), phase=Phase.SEARCH)
        by_text = dict(zip([row.text[-1] for row in validation.examples], validation.scores(candidate), strict=True))
        return [by_text[str(i)] for i in range(n)], scope.usage().calls, validation, candidate


def test_the_worst_form_counts_and_rows_that_cannot_get_worse_are_not_asked_again():
    plain, n_plain, *_ = scored(forms=None)
    assert plain == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert n_plain == 6
    worst, n_calls, *_ = scored(forms=Forms(("case", "white_space"), 0))
    assert worst == [0.0, 0.0, 0.0, 0.0, 0.0, None]  # a form the provider gives no answer to is no weakness
    assert n_calls == 6 + 4  # row 3 is not asked again, no row in its second form, and a failed call is not paid


def test_forms_that_hold_cost_their_calls_and_change_no_score():
    worst, n_calls, validation, candidate = scored(forms=Forms(("white_space",), 0))
    assert worst == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert n_calls == 6 + 5
    assert validation.calls_per_example(candidate) == 2


def test_the_estimate_of_a_fresh_search_counts_every_form():
    validation = Validation(rows(4), metric=right, threads=2, seed=0, forms=Forms(("case", "typos", "typos"), 0))
    candidate = Candidate.of(dspy.Predict("text -> answer"), lm=ScriptedLM(answer))
    assert validation.calls_per_example(candidate) == 4
    assert validation.over(rows(2)).calls_per_example(candidate) == 4


def optimized(**search):
    even = [row for row in rows(60) if not any(digit in row.text for digit in "359")]
    writer = ScriptedLM({"": {"program_description": "parity", "proposed_instruction": f"Tell the parity. {CAREFUL}"}})
    optimizer = COPA(
        metric=right,
        strategy="p",
        budget="calls=600",
        lm=ScriptedLM(answer, fingerprint="parity"),
        prompt_lm=writer,
        n_reflected=0,
        max_demos=0,
        **search,
    )
    program = dspy.Predict(dspy.Signature("text -> answer", "Tell the parity."))
    return optimizer.compile(program, trainset=even[:10], valset=even[10:22])


def test_a_robust_search_finds_what_a_plain_one_cannot_see():
    plain = optimized()
    assert plain.copa_result.score_before == 1.0
    assert CAREFUL not in plain.signature.instructions
    robust = optimized(robust=True, perturbations=["case"])
    assert robust.copa_result.score_before == 0.0
    assert robust.copa_result.score_after == 1.0
    assert CAREFUL in robust.signature.instructions
    notes = "; ".join(phase.note for phase in robust.copa_result.phases) + "; ".join(robust.copa_result.notes)
    assert "a row counts as the worst of itself and its forms case" in notes


def test_the_same_search_twice_ends_the_same():
    one, two = (optimized(robust=True, perturbations=["case", "typos"]) for _ in range(2))
    assert one.signature.instructions == two.signature.instructions
    assert one.copa_result.charged_calls == two.copa_result.charged_calls


def test_a_paraphrase_needs_a_prompt_model():
    optimizer = COPA(
        metric=right, strategy="p", lm=ScriptedLM(answer), robust=True, perturbations=["paraphrase", "case"]
    )
    with pytest.raises(ConfigurationError, match="--copa-prompt-lm"):
        optimizer.compile(dspy.Predict("text -> answer"), trainset=rows(6), valset=rows(4))


def test_perturbations_are_in_the_key_of_a_search_only_if_they_shape_it():
    plain = _search_key({})
    assert _search_key({"perturbations": ("case",)}) == plain
    robust = _search_key({"perturbations": ("case",), "robust": True})
    assert robust != _search_key({"perturbations": ("typos",), "robust": True})
