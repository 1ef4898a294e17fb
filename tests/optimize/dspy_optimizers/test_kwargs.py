"""Names of arguments of DSPy's optimizers, read from its source: those of the real signatures, without an import."""

import inspect
import subprocess
import sys

import pytest
from dspy import teleprompt

from copa_harness.optimize.dspy_optimizers.kwargs import check_optimizer_kwargs, keywords_of
from copa_harness.strategy import OPTIMIZER_NAMES

KINDS = {
    "labeled_fewshot": teleprompt.LabeledFewShot,
    "bootstrap_fewshot": teleprompt.BootstrapFewShot,
    "bootstrap_fewshot_random_search": teleprompt.BootstrapFewShotWithRandomSearch,
    "bootstrap_fewshot_optuna": teleprompt.BootstrapFewShotWithOptuna,
    "miprov2": teleprompt.MIPROv2,
    "copro": teleprompt.COPRO,
    "gepa": teleprompt.GEPA,
    "simba": teleprompt.SIMBA,
    "infer_rules": teleprompt.InferRules,
    "bootstrap_finetune": teleprompt.BootstrapFinetune,
    "better_together": teleprompt.BetterTogether,
}


def real(kind):
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    functions = (kind.__init__, inspect.unwrap(kind.compile))
    found = {p.name for f in functions for p in inspect.signature(f).parameters.values() if p.kind in named}
    return found - {"self", "metric", "student", "trainset", "valset"}


def test_every_optimizer_but_our_own_is_known():
    assert set(KINDS) == set(OPTIMIZER_NAMES) - {"knn_fewshot"}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_read_is_what_the_signatures_say(name):
    expected = real(KINDS[name]) | (real(teleprompt.BootstrapFewShot) if name == "infer_rules" else set())
    assert keywords_of(name) == expected


def test_nothing_is_imported_for_it():
    code = (
        "import sys; from copa_harness.session.options import marker_arguments; "
        "marker_arguments((), {'optimizer_kwargs': {'miprov2': {'num_trials': 5}}, "
        "'constraints': {'max_prompt_tokens': 9}}); print(sorted({'dspy', 'torch', 'optuna'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_what_cannot_be_read_is_left_to_the_optimizer_itself(monkeypatch):
    monkeypatch.setattr("copa_harness.optimize.dspy_optimizers.kwargs.keywords_of", lambda name: None)
    check_optimizer_kwargs({"miprov2": {"nonsense": 1}})
