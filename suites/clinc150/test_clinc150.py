"""CLINC150: ten intents of a voice assistant from 40 labelled sentences, for a pretrained language model.

    pytest suites/ -k clinc150 --copa-lm=smollm2

The data are the authors' file (COPA_CLINC150=data_small.json) or come by `datasets`.
"""

import pytest

from copa_harness.errors import TaskError
from copa_harness.tasks import clinc150

pytestmark = pytest.mark.copa(models="!embedded")

WEIGHTS, JOINT = 0.75, 0.75


@pytest.fixture(scope="module")
def copa_task():
    try:
        return clinc150()
    except TaskError as error:
        pytest.skip(str(error))


def test_base_model(copa_evaluate, copa_base_lm):
    copa_evaluate(lm=copa_base_lm)


@pytest.mark.copa(strategy="w", min_score=WEIGHTS)
def test_weights(copa_run):
    copa_run.check()


@pytest.mark.copa(strategy="p")
def test_prompts(copa_run):
    copa_run.check()


@pytest.mark.copa(strategy="joint", min_score=JOINT)
def test_joint(copa_run):
    copa_run.check()
