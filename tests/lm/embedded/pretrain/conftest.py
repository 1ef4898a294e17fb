from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from copa_harness.lm.embedded.pretrain.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(seed=0)
