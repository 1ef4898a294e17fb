"""Breast cancer: malignant or benign, by cell nuclei. Weights, prompts, and both together, each held to a score."""

import pytest

from copa_harness.tasks import breast_cancer

pytestmark = pytest.mark.copa(models="embedded")

BASE, WEIGHTS, PROMPTS, JOINT = 0.40, 0.80, 0.80, 0.80


@pytest.fixture(scope="module")
def copa_task():
    return breast_cancer()


def test_base_model(copa_evaluate, copa_base_lm):
    assert copa_evaluate(lm=copa_base_lm).score > BASE


def test_finetuned_model(copa_evaluate, copa_finetuned_lm):
    assert copa_evaluate(lm=copa_finetuned_lm).score > WEIGHTS


@pytest.mark.copa(strategy="p", min_score=PROMPTS)
def test_prompts(copa_run):
    copa_run.check()


@pytest.mark.copa(strategy="p -> w -> p", min_score=JOINT, max_regression=0.05)
def test_joint(copa_run):
    assert copa_run.score >= JOINT
    assert copa_run.usage.calls <= copa_run.budget.calls
    copa_run.check()
