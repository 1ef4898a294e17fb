"""The strategy `auto`: what it stands for, and that it says why."""

import math

import pytest

from copa_harness import COPA
from copa_harness.errors import ConfigurationError
from copa_harness.optimize.step_budget import choose_strategy
from copa_harness.strategy import parse_strategy


def choice(n, *, calls=400, tunable=False, writer=True, n_validation=1):
    return choose_strategy(
        n_train=n - n_validation,
        n_validation=n_validation,
        calls=calls,
        calls_per_example=1,
        tunable=tunable,
        has_prompt_lm=writer,
    )


@pytest.mark.parametrize(
    ("n", "strategy"),
    [
        (1, "miprov2"),
        (2, "miprov2"),
        (3, "bootstrap_fewshot"),
        (19, "bootstrap_fewshot"),
        (20, "bootstrap_fewshot_random_search"),
        (500, "bootstrap_fewshot_random_search"),
    ],
)
def test_the_number_of_examples_decides(n, strategy):
    found = choice(n)
    assert found.strategy == strategy
    assert f"{n} labelled example" in str(found)
    assert parse_strategy(found.strategy)


def test_mipro_runs_zero_shot_and_only_with_a_prompt_lm():
    assert choice(2).optimizer_kwargs == {"miprov2": {"max_bootstrapped_demos": 0, "max_labeled_demos": 0}}
    assert choice(2, writer=False).strategy == "p"


def test_weights_are_trained_when_they_can_be_and_the_budget_is_there():
    assert choice(75, tunable=True, n_validation=25).strategy == "p -> w -> p"
    assert choice(75, tunable=True, n_validation=25, calls=math.inf).strategy == "p -> w -> p"
    poor = choice(75, tunable=True, n_validation=25, calls=100)
    assert poor.strategy == "bootstrap_fewshot_random_search"
    assert "below 200 calls" in poor.reason
    assert choice(19, tunable=True).strategy == "bootstrap_fewshot"


def test_a_run_prints_the_choice_and_its_reason(toy):
    lines = []
    optimizer = COPA(metric=toy.metric, strategy="auto", budget=100, lm=toy.lm(), on_progress=lines.append)
    result = optimizer.compile(toy.program(), trainset=toy.train[:8], valset=toy.val[:5]).copa_result
    said = "auto: bootstrap_fewshot, because 13 labelled examples are enough to show"
    assert any(line.startswith(said) for line in lines)
    assert result.notes[0].startswith(said)
    assert result.strategy == "auto"
    assert result.score_after >= result.score_before


def test_advise_says_what_prompts_weights_and_more_rows_gain(toy):
    lm = toy.lm(provider=toy.provider)
    optimizer = COPA(metric=toy.metric, strategy="advise", budget=900, lm=lm)
    result = optimizer.compile(toy.program(), trainset=toy.train, valset=toy.make_rows(60, seed=3)).copa_result
    scores, curve, sentence = [text for text in result.headlines if text.startswith("advice")]
    assert "; prompts " in scores
    assert "; weights " in scores
    assert "weights from 12 rows" in curve
    assert "from 24 rows" in curve
    assert "optimize" in sentence or "do it" in sentence
    assert result.charged_calls <= 900


def test_advise_stands_alone():
    with pytest.raises(ConfigurationError, match="'advise' stand alone"):
        parse_strategy("advise -> p")
