"""The strategies side by side on Iris: the same rows, the same seed, the same budget."""

import pytest

from copa_harness.tasks import iris

pytestmark = pytest.mark.copa(models="embedded")

STRATEGIES = [
    "none",
    "p",
    "w",
    "w -> p",
    "p -> w -> p",
    "demos -> instructions",
    "miprov2",
    "bootstrap_fewshot_random_search",
    "better_together",
]


@pytest.fixture(scope="module")
def copa_task():
    return iris()


@pytest.mark.copa
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compare(copa_run, strategy):
    assert copa_run.completed
    assert copa_run.usage.calls <= copa_run.budget.calls
