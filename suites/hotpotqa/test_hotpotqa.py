"""HotPotQA: two searches and an answer, three predictors that no row has labels for in between.

    pytest suites/ -k hotpotqa --copa-lm=smollm2

The data are rows of the distractor setting (COPA_HOTPOTQA=rows.jsonl) or come by `datasets`; `bm25s` searches them.
"""

import pytest

from copa_harness.errors import TaskError
from copa_harness.tasks import hotpotqa

pytestmark = pytest.mark.copa(models="smollm2, hf:*, gguf:*", constrain=True, answer_tokens=96)


@pytest.fixture(scope="module")
def copa_task():
    try:
        return hotpotqa(n_train=20, n_val=10, n_test=20, n_passages=2, metric="f1")
    except TaskError as error:
        pytest.skip(str(error))


def test_base_model(copa_evaluate, copa_base_lm):
    copa_evaluate(lm=copa_base_lm)


@pytest.mark.copa(strategy="p")
def test_prompts(copa_run):
    copa_run.check()


@pytest.mark.copa(strategy="p -> w -> p")
def test_joint(copa_run):
    copa_run.check()
