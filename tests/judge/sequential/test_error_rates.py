"""Error rates of a whole sequential run, last look and answer included: summed over all outcomes, nothing simulated."""

import itertools
import math

import pytest

from copa_harness.judge.intervals import mean_interval
from copa_harness.judge.options import Gates
from copa_harness.judge.paired_gates import JudgedRun
from copa_harness.judge.sequential.stopping import SequentialJudge
from copa_harness.results import EvaluationResult, ExampleResult, Verdict
from tests.judge.sequential.test_stopping import Accepted

IDS = tuple(f"e{i}" for i in range(5))
ALPHA = 0.25


def verdict_of(order, changes, gates):
    """The verdict of one run in which the rows drawn, in their order, change as given."""
    change = dict(zip(order, changes, strict=True))
    before = {key: float(change[key] < 0) for key in IDS}
    after = {key: before[key] + change[key] for key in IDS}
    watch = SequentialJudge(IDS, gates, run=JudgedRun(None, baseline=Accepted(before)), seed=0)
    used = []
    for block in watch.blocks(size=1):
        watch.add({key: after[key] for key in block})
        used += block
    rows = tuple(ExampleResult(key, after[key]) for key in sorted(used))
    answer = watch.finish(EvaluationResult("test", "lm", rows, mean_interval([row.score for row in rows])))
    return answer.gates[-1].verdict


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_neither_a_false_failure_nor_a_false_pass_is_commoner_than_alpha(margin):
    gates = Gates(max_regression=margin, alpha=ALPHA)
    (order,) = [tuple(key for unit in SequentialJudge(IDS, gates, run=JudgedRun(None), seed=0).units for key in unit)]
    verdicts = {
        changes: verdict_of(order, changes, gates) for changes in itertools.product((-1.0, 0.0, 1.0), repeat=len(IDS))
    }

    def chance(verdict, *, drop, moved):
        """Of a verdict where a share `moved` changes and the mean falls by `drop`."""
        each = {-1.0: (moved + drop) / 2, 1.0: (moved - drop) / 2, 0.0: 1 - moved}
        return sum(math.prod(each[c] for c in changes) for changes, found in verdicts.items() if found is verdict)

    false_failures = [chance(Verdict.FAIL, drop=0.0, moved=share / 20) for share in range(21)]
    false_passes = [chance(Verdict.PASS, drop=margin, moved=share / 20) for share in range(math.ceil(20 * margin), 21)]
    assert max(false_failures) <= ALPHA + 1e-9
    assert max(false_passes) <= ALPHA + 1e-9
    assert max(false_failures) > 0.05  # it does decide something
    assert chance(Verdict.FAIL, drop=0.9, moved=0.9) > 0.8
