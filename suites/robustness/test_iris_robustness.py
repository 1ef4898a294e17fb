"""Iris, asked in other forms: the order of its four lengths and the blanks around them should not change a flower."""

from dataclasses import replace

import pytest

from copa_harness.tasks import iris

pytestmark = pytest.mark.copa(models="embedded", perturbations=["field_order", "white_space"])


VIOLATIONS = 0.9
"""Measured: 22 of 29 flowers right as given are not when changed (order 19, blanks 10): weights learn one layout.
Takes 141 calls."""


@pytest.fixture(scope="module")
def copa_task():
    return replace(iris(n_train=24, n_val=12, n_test=30), name="iris_forms")  # a baseline of its own


@pytest.mark.copa(strategy="w", max_violation_rate=VIOLATIONS)
def test_weights(copa_run):
    copa_run.check()
