"""Whether the best of many is better: the joint sign-flip test."""

import numpy as np
import pytest

from copa_harness.optimize.finalists import chosen_p_value, least_p_value
from copa_harness.optimize.search.racing import worse_p_value


def test_one_candidate_is_the_exact_sign_test():
    before, after = [0.0] * 5 + [1.0] * 5, [1.0] * 4 + [0.0] + [1.0] * 4 + [0.0]
    assert chosen_p_value(before, after) == pytest.approx(6 / 32)
    assert chosen_p_value(before, after) == worse_p_value(after, before)


def test_copies_of_the_chosen_cost_nothing_and_other_findings_do():
    before, after = [0.0] * 10, [1.0] * 5 + [0.0] * 5
    alone = chosen_p_value(before, after)
    assert chosen_p_value(before, after, [after, after]) == alone
    assert chosen_p_value(before, after, [[0.0] * 5 + [1.0] * 5]) > alone


def test_no_gain_is_no_evidence_and_rows_without_a_score_count_for_nothing():
    assert chosen_p_value([1.0, 0.0], [0.0, 1.0]) == 1.0
    assert chosen_p_value([0.0, None, 0.0], [1.0, 1.0, None]) == 0.5


def test_the_best_of_many_equals_passes_no_more_often_than_the_level():
    generator = np.random.default_rng(0)
    passed = 0
    for _ in range(300):
        scores = (generator.random((9, 25)) < 0.7).astype(float).tolist()
        best = max(scores[1:], key=sum)
        passed += chosen_p_value(scores[0], best, scores[1:]) <= 0.2
    assert passed / 300 <= 0.2 + 2 * (0.2 * 0.8 / 300) ** 0.5


def test_the_least_p_value_is_that_of_full_marks():
    assert least_p_value([1.0] * 10 + [0.0] * 3) == 0.125
    assert least_p_value([1.0] * 10) == 1.0
    assert least_p_value([0.5, None, 0.0]) == 0.25
