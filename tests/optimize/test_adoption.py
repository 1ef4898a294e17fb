"""Adoption: the program as written is only given up on paired evidence, if possible on rows held back."""

import hashlib
import math

import dspy
import pytest

from copa_harness.errors import ConfigurationError
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize.adoption import MIN_HELD_BACK, n_held_back, plan_holdout
from copa_harness.optimize.copa import COPA
from copa_harness.optimize.finalists import N_FINALISTS
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.scoring import Validation
from copa_harness.strategy import parse_strategy
from tests.optimize.conftest import field


def optimized(toy, lm, *, val=None, **settings):
    given = {"strategy": "p", "budget": 3_000, "n_demo_sets": 6, "n_rounds": 1, **settings}
    copa = COPA(metric=toy.metric, lm=lm, **given)
    return copa.compile(toy.program(), trainset=toy.train, valset=val or toy.val)


def split(toy, rows, *, calls=3_000):
    """The validation rows as COPA splits them."""
    whole = Validation(rows, metric=toy.metric, threads=1, seed=0)
    student = Candidate.of(toy.program(), lm=toy.lm())
    settings = COPA(metric=toy.metric, strategy="p").settings
    search, plan = plan_holdout(whole, student, parse_strategy("p"), settings, n_training=24, calls=calls)
    return search, plan.rows


@pytest.mark.parametrize(
    ("n", "calls", "expected"),
    [(79, math.inf, 0), (80, math.inf, 20), (400, math.inf, 100), (400, 1600, 80), (400, 300, 0)],
)
def test_rows_are_held_back_where_there_are_enough_of_them_and_of_calls(n, calls, expected):
    assert n_held_back(n, calls=calls, calls_per_example=1) == expected


def test_rows_held_back_are_no_rows_of_the_search(toy):
    rows = toy.make_rows(120, seed=5)
    search, held = split(toy, rows)
    assert (search.n, held.n) == (90, 30)
    both = {id(row) for row in search.examples} | {id(row) for row in held.examples}
    assert both == {id(row) for row in rows}
    share = [sum(row.kind == "big" for row in part.examples) / part.n for part in (search, held)]
    assert share[0] == pytest.approx(share[1], abs=0.03)


def right_or_wrong(row, is_right):
    return row.kind if is_right else ("small" if row.kind == "big" else "big")


def scripted(rows, is_right):
    """Answers rows rightly as `is_right(row, messages)` says."""
    by_input = {(row.size, row.weight): row for row in rows}

    def answers(messages, model):
        last = messages[-1]["content"]
        row = by_input[field(last, "size"), field(last, "weight")]
        return {"kind": right_or_wrong(row, is_right(row, messages))}

    return ScriptedLM(answers)


def test_a_winner_that_loses_on_rows_it_has_not_used_is_refused(toy):
    rows = toy.make_rows(120, seed=5)
    held = {(row.size, row.weight) for row in split(toy, rows)[1].examples}

    def is_right(row, messages):
        unseen = (row.size, row.weight) in held
        return unseen if len(messages) <= 2 else not unseen  # demonstrations: right where the search looks, only there

    result = optimized(toy, scripted([*rows, *toy.train], is_right), val=rows).copa_result
    assert result.evidence.unseen == 30
    assert result.evidence.difference == -1.0
    assert not result.evidence.adopted
    assert result.score_after == result.score_before
    assert any("program as written is returned" in note and "loses 1.000 on 30" in note for note in result.notes)


def test_of_the_finalists_the_one_best_on_all_rows_is_returned(toy):
    rows = toy.make_rows(120, seed=5)
    held = {(row.size, row.weight) for row in split(toy, rows)[1].examples}

    def is_right(row, messages):
        n_demos = len(messages) // 2 - 1
        luck = int(hashlib.sha256(f"{row.size} {row.weight}".encode()).hexdigest(), 16) % 100
        if n_demos == 6:
            return (row.size, row.weight) not in held and 6 <= luck < 90  # best for the search, worthless beyond it
        return luck < (80 if n_demos else 30)

    program = optimized(toy, scripted([*rows, *toy.train], is_right), val=rows, n_demo_sets=3, patience=None)
    assert program.copa_result.evidence.adopted
    assert len(program.demos) in (3, 9)
    assert program.copa_result.evidence.difference > 0.2


def test_the_last_look_is_paid_from_the_budget(toy):
    rows = toy.make_rows(120, seed=5)
    lm = toy.lm()
    for budget in (600, 900):
        result = optimized(toy, lm, val=rows, budget=budget, max_demos=3).copa_result
        assert result.charged_calls <= budget
        assert result.evidence.unseen >= MIN_HELD_BACK
        look = next(phase for phase in result.phases if phase.phase == "last look")
        spent = look.usage.paid_calls + look.usage.cached_calls
        assert 0 < spent <= (N_FINALISTS + 1) * result.evidence.unseen


def test_a_gain_that_chance_explains_is_not_adopted_unless_asked_for(toy):
    rows = toy.val
    lucky = {(row.size, row.weight) for row in rows[:8]}

    def is_right(row, messages):
        return (row.size, row.weight) in lucky or (len(messages) > 2 and row is rows[9])

    lm = scripted([*rows, *toy.train], is_right)
    kept = optimized(toy, lm).copa_result
    assert kept.score_after == kept.score_before
    assert (kept.evidence.gained, kept.evidence.lost, kept.evidence.p_value) == (1, 0, 0.5)
    assert any("p = 0.5 is above adoption_p = 0.2" in note for note in kept.notes)
    taken = optimized(toy, lm, adoption_p=1.0).copa_result
    assert taken.score_after > taken.score_before
    assert taken.evidence.adopted


def test_where_rows_are_few_the_evidence_says_so(toy):
    result = optimized(toy, toy.lm()).copa_result
    assert result.evidence.unseen == 0
    assert result.evidence.n_tried > 1
    assert result.evidence.p_value < 0.2
    assert result.evidence.adopted


@pytest.mark.parametrize("level", [-0.1, 1.5])
def test_a_level_outside_of_0_to_1_is_refused(toy, level):
    with pytest.raises(ConfigurationError, match="adoption_p"):
        optimized(toy, toy.lm(), adoption_p=level)


def test_with_too_few_mistakes_nothing_is_searched_and_a_headline_says_why(toy):
    rows = toy.val

    def is_right(row, messages):
        return row is not rows[0] or len(messages) > 2

    lm = scripted([*rows, *toy.train], is_right)
    result = optimized(toy, lm).copa_result
    assert result.charged_calls == len(rows)
    assert any("falls short on 1 of 16 rows" in line and "p = 0.5" in line for line in result.headlines)
    assert optimized(toy, lm, adoption_p=1.0).copa_result.score_after == 1.0


def test_a_preference_and_the_test_agree_on_what_is_returned(toy):
    rows = toy.make_rows(120, seed=5)
    held = {(row.size, row.weight) for row in split(toy, rows)[1].examples}

    def is_right(row, messages):
        unseen = (row.size, row.weight) in held
        return unseen if len(messages) <= 2 else not unseen

    result = optimized(
        toy, scripted([*rows, *toy.train], is_right), val=rows, prefer="cheapest within 1 point of best"
    ).copa_result
    assert not result.evidence.adopted
    assert result.score_after == result.score_before
    assert [entry.n_demos for entry in result.front if entry.returned] == [0]


def test_a_program_no_worse_and_cheaper_than_the_one_as_written_may_be_preferred_without_a_test(toy):
    rows = toy.val
    shown = toy.program()
    shown.demos = toy.train[:9]

    def is_right(row, messages):
        return row.weight > "3"

    copa = COPA(
        metric=toy.metric,
        lm=scripted([*rows, *toy.train], is_right),
        strategy="p",
        budget=600,
        prefer="shortest within 1 point of best",
    )
    program = copa.compile(shown, trainset=toy.train, valset=rows)
    assert program.demos == []
    assert program.copa_result.evidence.adopted
    assert not program.copa_result.evidence.tested


def test_where_required_texts_are_missing_the_program_with_them_is_what_counts(toy):
    rows = toy.make_rows(120, seed=5)
    result = optimized(toy, toy.lm(), val=rows, constraints={"required_text": ["Be terse."]}).copa_result
    assert result.evidence.adopted
    assert any(phase.phase == "last look" for phase in result.phases)


def test_limits_hold_on_rows_held_back_too(toy):
    rows = toy.make_rows(120, seed=5)
    long = split(toy, rows)[1].examples[0]
    long.weight = "7 " + "and a bit " * 60 + "more"  # among the rows the search does not see
    lm = scripted([*rows, *toy.train], lambda row, messages: len(messages) > 2)
    assert optimized(toy, lm, val=rows).demos

    def words(program):
        with dspy.context(lm=lm):
            program(size=long.size, weight=long.weight)
        return sum(len(message["content"].split()) for message in lm.requests[-1].messages)

    bare = words(toy.program())
    program = optimized(toy, lm, val=rows, constraints={"max_prompt_tokens": bare + 20})
    assert words(program) <= bare + 20


# -- a whole and its parts


def joint(toy, *, gains, strategy="joint", **settings):
    """Right on 4 of 16 rows as written, on 10 with tuned weights, on more with demonstrations too."""
    rows = toy.val
    by_input = {(row.size, row.weight): i for i, row in enumerate(rows)}

    def answers(messages, model):
        last = messages[-1]["content"]
        key = field(last, "size"), field(last, "weight")
        i = by_input.get(key)
        tuned, shown = "@" in model, len(messages) > 2
        right = i is None or i < 4 or (tuned and i < (10 + gains if shown else 10))
        row = rows[i] if i is not None else next(one for one in toy.train if (one.size, one.weight) == key)
        return {"kind": right_or_wrong(row, right)}

    lm = ScriptedLM(answers, fingerprint=lambda model: model, provider=toy.provider)
    return optimized(toy, lm, strategy=strategy, budget=400, **settings)


@pytest.mark.parametrize("strategy", ["joint", "w -> p"])
def test_weights_alone_are_returned_where_prompts_add_no_more_than_chance_explains(toy, strategy):
    program = joint(toy, gains=1, strategy=strategy)
    assert "@" in program.lm.model
    assert program.demos == []
    (line,) = [line for line in program.copa_result.headlines if line.startswith("weights alone are returned")]
    assert "+0.062 over them on validation (1 better, 0 worse, p = 0.5)" in line
    assert program.copa_result.score_after == 10 / 16


@pytest.mark.parametrize("strategy", ["joint", "w -> p"])
def test_prompts_on_tuned_weights_are_returned_where_they_beat_weights_alone_beyond_chance(toy, strategy):
    program = joint(toy, gains=4, strategy=strategy)
    assert "@" in program.lm.model
    assert program.demos
    assert program.copa_result.score_after == 14 / 16


def test_without_a_test_the_best_on_validation_is_returned(toy):
    assert joint(toy, gains=1, adoption_p=1.0).copa_result.score_after == 11 / 16


def test_training_rows_that_weights_were_trained_on_tell_no_finalists_apart(toy):
    result = joint(toy, gains=4).copa_result
    (note,) = [note for note in result.notes if "told apart by validation alone" in note]
    assert "of 24 training rows 0 are shown by none of them and were not trained on" in note
    assert not any("last look" in phase.phase for phase in result.phases)


def test_after_a_perfect_score_the_calls_left_tell_finalists_apart_on_training_rows(toy):
    def is_right(row, messages):
        n_demos = len(messages) // 2 - 1
        if n_demos == 2:
            return row in toy.val  # perfect for the search, worthless beyond it
        return row is not toy.val[3] if n_demos else row in toy.val[:8]

    program = optimized(toy, scripted([*toy.val, *toy.train], is_right), budget=200, n_demo_sets=3, max_demos=3)
    result = program.copa_result
    assert len(program.demos) in (1, 3)
    assert any("training rows none of them was made from: 1.000 -> 0.000" in note for note in result.notes)
    assert result.charged_calls <= 200
