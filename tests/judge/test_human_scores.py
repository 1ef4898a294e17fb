"""Prediction-powered means: the published formulae, coverage where the metric is wrong, and what is said."""

import numpy as np
import pytest

from copa_harness.judge.human_scores import MIN_RATED, corrected_mean, human_scores


def drawn(rng, n, *, share=0.8, agree=0.85, bias=0.0):
    human = (rng.random(n) < share).astype(float)
    metric = np.where(rng.random(n) < agree, human, 1 - human)
    metric = np.where(rng.random(n) < bias, 1.0, metric)
    return {str(i): value for i, value in enumerate(metric)}, {str(i): value for i, value in enumerate(human)}


def some(human, rng, m):
    return {key: human[key] for key in rng.permutation(list(human))[:m].tolist()}


def test_the_weight_is_the_published_one_and_the_mean_follows_from_it():
    rng = np.random.default_rng(3)
    f, y = drawn(rng, 200)
    rated = some(y, rng, 60)
    fs = np.array([f[key] for key in rated]), np.array([value for key, value in f.items() if key not in rated])
    ys = np.array(list(rated.values()))
    weight = np.cov(ys, fs[0])[0, 1] / ((1 + 60 / 140) * np.var([*f.values()]))
    expected = ys.mean() + weight * (fs[1].mean() - fs[0].mean())
    found = corrected_mean(f, rated, level=0.95)
    assert found.mean == pytest.approx(expected)
    assert found.n_rated == 60
    width = found.interval.high - found.interval.low
    assert width < 2 * 1.96 * ys.std() / 60**0.5  # narrower than the rated rows alone


def test_a_metric_that_is_far_too_kind_misleads_nobody():
    rng, hits, n_runs = np.random.default_rng(5), 0, 300
    for _ in range(n_runs):
        f, y = drawn(rng, 150, share=0.6, bias=0.5)
        found = corrected_mean(f, some(y, rng, 40), level=0.95)
        hits += found.interval.low <= 0.6 <= found.interval.high
    assert hits / n_runs >= 0.93


def test_rated_rows_that_all_agree_claim_no_perfect_metric():
    f = {str(i): float(i % 10 > 0) for i in range(100)}
    found = corrected_mean(f, {str(i): f[str(i)] for i in range(20)}, level=0.95)
    assert found.mean == pytest.approx(0.9)
    assert found.interval.low < 0.8
    assert found.interval.high == 1.0


def test_rows_of_one_group_are_one_rating():
    rng = np.random.default_rng(7)
    f, y = drawn(rng, 200)
    rated = {key: y[key] for key in list(y)[:100]}
    groups = {key: str(int(key) // 4) for key in f}
    alone, together = (corrected_mean(f, rated, level=0.95, groups=one) for one in (None, groups))
    assert together.mean == alone.mean
    few = {key: str(int(key) // 10) for key in f}
    assert corrected_mean(f, rated, level=0.95, groups=few) is None  # ten groups
    # copies of each row in its group say nothing new
    copied = {key: f[str(int(key) // 4)] for key in f}
    copies = {key: y[str(int(key) // 4)] for key in rated}
    width = [
        (found := corrected_mean(copied, copies, level=0.95, groups=one)).interval.high - found.interval.low
        for one in (None, groups)
    ]
    assert width[1] > 1.5 * width[0]


def test_agreement_bias_and_the_paired_difference_are_told():
    rng = np.random.default_rng(11)
    before, y_before = drawn(rng, 120)
    after, y_after = drawn(rng, 120, share=0.5, bias=0.3)
    picked = rng.permutation(120)[:50].astype(str).tolist()
    found = human_scores(
        after,
        {key: y_after[key] for key in picked},
        before=(before, {key: y_before[key] for key in picked}),
    )
    assert found.n_rated == found.difference.n_rated == 50
    truth = np.mean([*y_after.values()]) - np.mean([*y_before.values()])
    assert found.difference.interval.low <= truth <= found.difference.interval.high < 0
    assert found.agreement.low < 1 - found.distance < found.agreement.high
    assert found.kinder > 0
    said = found.sentence()
    assert said.startswith("people rated 50 of 120 answers: metric and people agree on 0.")
    assert "the metric is kinder by 0." in said
    assert "against the accepted result (50 rated on both sides); prediction-powered, approximate" in said


def test_few_ratings_give_no_interval_and_none_are_said_to_be_none():
    f = {str(i): 0.5 for i in range(100)}
    few = human_scores(f, {str(i): 0.75 for i in range(MIN_RATED - 1)})
    assert few.score is None
    assert few.agreement is None
    assert few.sentence() == (
        "people rated 14 of 100 answers: metric and people differ by 0.250 on average; the metric is stricter by "
        "0.250; 15 rated answers, drawn at random, would tell the score by people"
    )
    assert human_scores(f, {}).sentence().startswith("nobody rated any of the answers")
    everyone = human_scores(f, dict.fromkeys(f, 0.25))
    assert everyone.score.mean == 0.25
