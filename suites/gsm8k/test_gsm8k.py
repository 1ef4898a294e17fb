"""GSM8K: grade-school word problems by chain of thought.

    pytest suites/ -k gsm8k --copa-lm=smollm2

The data are the authors' files (COPA_GSM8K=folder with train.jsonl and test.jsonl) or come by `datasets`.
"""

import pytest

from copa_harness.errors import TaskError
from copa_harness.tasks import gsm8k

pytestmark = pytest.mark.copa(models="smollm2, hf:*, gguf:*", constrain=True, answer_tokens=256)


@pytest.fixture(scope="module")
def copa_task():
    try:
        return gsm8k()
    except TaskError as error:
        pytest.skip(str(error))


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
