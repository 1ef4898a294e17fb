"""What a run learns about its proposers."""

import numpy as np
import pytest

from copa_harness.optimize.search.bandit import Observation, ProposalBandit, normal_posterior, paired_gain


def taught(arms, *, n=12, phase=1, seed=0, noise=0.05):
    """A learner that saw every arm `n` times with its true gain and noise."""
    generator, learner = np.random.default_rng(seed), ProposalBandit()
    for name, gain in arms.items():
        for _ in range(n):
            seen = gain + float(generator.normal(0, noise))
            learner.observe(Observation(phase, {name: 1}, seen, noise**2, 20))
    return learner


def test_a_gain_is_paired_and_a_few_equal_differences_are_no_certainty():
    gain, variance, n = paired_gain([1.0, 1.0, None, 1.0], [0.0, 0.0, 1.0, None, 1.0])
    assert (gain, n) == (1.0, 2)
    assert variance > 0.05
    assert paired_gain([None], [1.0]) is None


def test_without_evidence_arms_are_taken_in_turn():
    learner = ProposalBandit()
    chosen = learner.choose("demos", ["x", "y", "z"], n=7, generator=np.random.default_rng(0))
    assert chosen == ["x", "y", "z", "x", "y", "z", "x"]


def test_the_better_arm_is_proposed_more_often_and_the_same_seed_proposes_the_same():
    learner = taught({"demos: good": 0.3, "demos: bad": 0.1})
    draws = [learner.choose("demos", ["bad", "good"], n=40, generator=np.random.default_rng(3)) for _ in range(2)]
    assert draws[0] == draws[1]
    assert draws[0].count("good") > 35


def test_an_arm_never_tried_still_gets_its_chance_beside_good_ones():
    learner = taught({"demos: good": 0.4, "demos: fair": 0.35})
    chosen = learner.choose("demos", ["good", "fair", "new"], n=100, generator=np.random.default_rng(1))
    assert 10 < chosen.count("new") < 80


def test_what_two_parts_gained_together_is_not_credited_to_each():
    generator, learner = np.random.default_rng(2), ProposalBandit()
    for i in range(60):
        features = {"demos: d": 1} if i % 3 else {}
        if i % 2:
            features["instruction: i"] = 1
        gain = 0.3 * ("demos: d" in features) + float(generator.normal(0, 0.03))
        learner.observe(Observation(1, features, gain, 0.001, 20))
    found = {row["arm"]: row for row in learner.report()}
    assert found["d"]["gain"] == pytest.approx(0.3, abs=0.05)
    assert found["i"]["gain"] == pytest.approx(0.0, abs=0.05)
    assert found["i"]["mean_gain"] > 0.1


def test_evidence_of_earlier_phases_fades():
    learner = taught({"demos: x": 0.3}, phase=1)
    for _ in range(12):
        learner.observe(Observation(8, {"demos: x": 1}, 0.0, 0.0025, 20))
    (row,) = learner.report()
    assert row["gain"] < 0.05
    assert row["tries"] == 24


def test_the_posterior_is_ridge_regression():
    rows = [{"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 1.0}]
    posterior = normal_posterior(rows, [0.2, 0.1, 0.3], variances=[0.01] * 3, prior_sd={"a": 0.1, "b": 0.1})
    design, gains = np.array([[1, 0], [0, 1], [1, 1]]), np.array([0.2, 0.1, 0.3])
    expected = np.linalg.solve(design.T @ design + np.eye(2), design.T @ gains)
    assert posterior.mean == pytest.approx(expected)
    assert normal_posterior([], [], variances=[], prior_sd={}).draw(np.random.default_rng(0)) == {}
