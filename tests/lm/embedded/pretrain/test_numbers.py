from __future__ import annotations

import numpy as np
import pytest

from copa_harness.lm.embedded.pretrain.tokenizer import (
    FORMAT_RANGE,
    FORMATS,
    number_features,
    number_strings,
    print_number,
    token_share,
)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.1234, 0.5, 0.9999, 1.0])
def test_a_printed_number_is_one_of_the_number_tokens(fmt, share):
    assert print_number(share, fmt) in set(number_strings())


@pytest.mark.parametrize(
    ("text", "share"), [("5.1", 0.51), ("47", 0.47), ("13.2", 0.132), ("0.12", 0.12), ("1.47", 0.147), ("7", 0.7)]
)
def test_the_share_of_a_token_follows_its_format(text, share):
    assert token_share(text) == pytest.approx(share)


def test_near_numbers_have_near_features():
    features = number_features(["5.1", "5.2", "5.9", "9.1"])
    distance = np.linalg.norm(features[0] - features[1:], axis=1)
    assert distance[0] < distance[1] < distance[2]


def test_every_format_has_a_range():
    assert set(FORMATS) == set(FORMAT_RANGE)
