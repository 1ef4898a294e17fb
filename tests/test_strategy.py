"""The strategy grammar."""

import pytest

from copa_harness.errors import ConfigurationError
from copa_harness.strategy import OPTIMIZER_NAMES, StepKind, parse_strategy


@pytest.mark.parametrize("text", ["p->w->p", " P ->  W -> p", "p → w → p", "prompts -> weights -> prompts"])
def test_case_and_spaces_do_not_matter(text):
    assert [step.kind for step in parse_strategy(text)] == [StepKind.PROMPTS, StepKind.WEIGHTS, StepKind.PROMPTS]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("none", StepKind.NONE),
        ("w", StepKind.WEIGHTS),
        ("p", StepKind.PROMPTS),
        ("joint", StepKind.JOINT),
        ("Demos -> Instructions", StepKind.ALTERNATE),
    ],
)
def test_single_strategies_are_known(text, kind):
    assert [step.kind for step in parse_strategy(text)] == [kind]


def test_optimizers_may_stand_inside_a_sequence():
    assert [str(step) for step in parse_strategy("gepa -> w -> MIPROv2")] == ["gepa", "w", "miprov2"]


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_every_optimizer_name_is_one_step(name):
    (step,) = parse_strategy(name.upper())
    assert step.kind is StepKind.OPTIMIZER
    assert step.name == name


def test_dspys_own_class_names_are_understood():
    assert parse_strategy("BootstrapFewShotWithRandomSearch")[0].name == "bootstrap_fewshot_random_search"


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    with pytest.raises(ConfigurationError, match=r"gepa.*Did you mean 'miprov2'") as caught:
        parse_strategy("p -> miprov3")
    assert "'p -> miprov3'" in str(caught.value)


@pytest.mark.parametrize("text", ["", "  ", "p -> -> w", "->", "p -> none", "joint -> p", "demos", "p -> demos"])
def test_strategies_that_mean_nothing_are_refused(text):
    with pytest.raises(ConfigurationError):
        parse_strategy(text)
