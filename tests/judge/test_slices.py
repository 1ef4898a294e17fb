"""Slices: a part of the test split must not get worse on its own."""

import numpy as np

from copa_harness.judge.intervals import mean_interval
from copa_harness.judge.paired_gates import JudgedRun, max_regression
from copa_harness.results import EvaluationResult, ExampleResult, Verdict

IDS = [f"e{i:03}" for i in range(200)]
SLICES = {key: ("de" if i < 40 else "en") for i, key in enumerate(IDS)}


class Accepted:
    name, origin, fingerprints = "baseline", "", {}

    def __init__(self, scores):
        self.scores = dict(zip(IDS, map(float, scores), strict=True))


def judged(before, after, slices=SLICES):
    rows = tuple(ExampleResult(key, float(score)) for key, score in zip(IDS, after, strict=True))
    evaluation = EvaluationResult("test", "lm", rows, mean_interval([row.score for row in rows]))
    run = JudgedRun(evaluation, baseline=Accepted(before), slices=slices)
    return max_regression(run, margin=0.05, alpha=0.05)


def test_a_slice_that_falls_fails_though_all_together_do_not():
    before, after = [1.0] * 200, [0.0] * 8 + [1.0] * 192
    assert judged(before, after, slices={}).verdict is not Verdict.FAIL
    answer = judged(before, after)
    assert answer.verdict is Verdict.FAIL
    assert answer.message.startswith("Worse in 'de': -0.200, 0 better, 8 worse of 40")
    assert answer.details["slices"]["en"]["p_any_drop"] == 1.0
    assert answer.details["worse"] == IDS[:8]


def test_the_same_loss_spread_over_slices_is_none_of_theirs():
    after = np.ones(200)
    after[::25] = 0
    assert judged([1.0] * 200, after).verdict is not Verdict.FAIL


def test_unchanged_slices_fail_no_oftener_than_they_may_however_many_there_are():
    many = {key: str(i // 20) for i, key in enumerate(IDS)}
    rng, failed, n_runs = np.random.default_rng(0), 0, 60
    for _ in range(n_runs):
        before = rng.random(200) < 0.7
        after = np.where(rng.random(200) < 0.3, rng.random(200) < 0.7, before)
        alone, sliced = (judged(before, after, slices=slices).verdict is Verdict.FAIL for slices in ({}, many))
        failed += sliced and not alone
    assert failed <= 0.05 * n_runs + 3
