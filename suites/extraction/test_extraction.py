"""Extraction: the order in an e-mail, with nested items, optional fields and an enum, scored field by field.

    pytest suites/ -k extraction --copa-lm=smollm2

The e-mails are made, nothing is downloaded.
"""

import pytest

from copa_harness.tasks import order_emails

pytestmark = pytest.mark.copa(models="smollm2, hf:*, gguf:*", constrain=True, answer_tokens=160)


@pytest.fixture(scope="module")
def copa_task():
    return order_emails(n_train=30, n_val=16, n_test=40)


def test_base_model(copa_evaluate, copa_base_lm):
    copa_evaluate(lm=copa_base_lm)


@pytest.mark.copa(strategy="w")
def test_weights(copa_run):
    copa_run.check()


@pytest.mark.copa(strategy="p")
def test_prompts(copa_run):
    copa_run.check()


@pytest.mark.copa(strategy="joint")
def test_joint(copa_run):
    copa_run.check()
