"""Runs whose program as written gives no answer that parses: cured by prompts, by weights, or by nothing."""

import pytest

from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize import COPA
from tests.optimize.conftest import answer_of

PROSE = "Sure!\nLet me think about the kind of this thing."


def chatty(toy, *, cured=lambda messages, model: False):
    """Answers in prose, unless `cured`."""

    def answers(messages, model):
        return {"kind": answer_of(messages, model)} if cured(messages, model) else PROSE

    return ScriptedLM(answers, fingerprint=lambda model: f"chatty:{model}", provider=toy.provider)


def compiled(toy, strategy, lm, **settings):
    lines = []
    optimizer = COPA(
        metric=toy.metric, strategy=strategy, budget=200, lm=lm, on_progress=lines.append, threads=4, **settings
    )
    program = optimizer.compile(toy.program(), trainset=toy.train, valset=toy.val)
    return program.copa_result, lines


def by_demos(messages, model):
    return len(messages) > 2


def by_weights(messages, model):
    return "@" in model


@pytest.mark.parametrize("strategy", ["p", "demos -> instructions", "joint", "w", "w -> p", "p -> w -> p"])
def test_a_model_that_nothing_teaches_the_format_ends_the_run_with_the_remedy(toy, strategy):
    lm = chatty(toy)
    result, lines = compiled(toy, strategy, lm)
    assert result.stopped == "no answer parses"
    assert result.reason == "no answer parses, whatever was tried"
    assert result.score_before == result.score_after == 0
    (headline,) = [line for line in result.headlines if line.startswith("no answer parses, of ")]
    (said,) = [line for line in lines if line.startswith(headline)]
    assert "'Sure!\\nLet me think about" in said
    assert "--copa-constrain" in said


def test_the_search_stops_after_a_few_candidates_that_could_have_cured_it(toy):
    result, _ = compiled(toy, "p", chatty(toy))
    assert result.charged_calls == 16 + 3 * 10  # the program as written, and three sets of demonstrations
    assert any(note.startswith("p: no answer of ") for note in result.notes)


def test_what_was_tried_in_vain_is_not_tried_again(toy):
    result, _ = compiled(toy, "p -> w -> p", chatty(toy))
    assert [phase.phase for phase in result.phases] == ["baseline", "1: p", "2: w"]
    assert any("step 3 (p) and what follows is left out" in line for line in result.headlines)


def test_weights_are_trained_when_prompts_cure_nothing(toy):
    result, _ = compiled(toy, "p -> w", chatty(toy, cured=by_weights))
    assert result.stopped == "completed"
    assert result.score_after > 0.6


@pytest.mark.parametrize("strategy", ["p", "joint", "demos -> instructions", "w -> p"])
def test_demonstrations_cure_it(toy, strategy):
    result, lines = compiled(toy, strategy, chatty(toy, cured=by_demos))
    assert result.stopped != "no answer parses"
    assert result.score_after > 0.5
    assert sum("no answer of the program as written parses on 16 validation rows" in line for line in lines) == 1


def test_training_cures_it(toy):
    result, _ = compiled(toy, "w", chatty(toy, cured=by_weights))
    assert result.stopped == "completed"
    assert result.score_after > 0.6


def test_nothing_is_said_where_answers_parse(toy):
    result, lines = compiled(toy, "p", toy.lm())
    assert not any("parse" in line for line in (*lines, *result.notes))
