"""Canaries: an exact test that a noisy model does not fool, a fault where nothing can vary, and what is said."""

import itertools

import numpy as np
import pytest

from copa_harness.errors import ProviderError
from copa_harness.judge.flaky import Canary, drift_of, exchange_p_value
from copa_harness.results import ExampleResult, Phase


def result(answer, score=1.0):
    return ExampleResult("x", score, predicted={"answer": answer}, calls=({"outputs": {"answer": answer}},))


def canary(stored, new, newer=None, *, scores=(1.0, 1.0, 1.0), varying=(None,)):
    said = (stored, new, new if newer is None else newer)
    return Canary(*map(result, said, scores), varying=frozenset(varying))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_p_value_counts_every_exchange(sign):
    rows = [(3, 2, 1), (0, 2, 2), (2, 1, 1), (2, -4, 2), (0, 0, 0)]
    rows = [tuple(sign * way for way in three) for three in rows]
    totals = [sum(choice) for choice in itertools.product(*rows)]
    observed = sum(three[0] for three in rows)
    assert exchange_p_value(rows) == pytest.approx(np.mean(np.abs(totals) >= abs(observed)))


def test_of_a_steady_model_four_changed_rows_are_a_drift_and_three_are_not():
    same = [canary("a", "a")] * 16
    shown = drift_of([canary("a", "b")] * 4 + same, model="m", since="2026-01-02")
    assert shown.name == "drift"
    assert shown.p_value == pytest.approx(2 * 3**-4)
    assert shown.text().startswith("DRIFT: 4 of 20 stored answers (the oldest of 2026-01-02) come out otherwise")
    hidden = drift_of([canary("a", "b")] * 3 + same, model="m")
    assert hidden.name == ""
    assert "no drift is shown: 3 of 19 stored answers" in hidden.text()
    assert drift_of(same, model="m").text() == (
        "no drift: all of 16 stored answers come out the same when m is asked again."
    )


def test_a_model_that_has_become_erratic_is_found_out_by_its_scores():
    rng = np.random.default_rng(1)
    rows = [
        canary("a", *("ab"[one] for one in wrong), scores=(1.0, *(1.0 - wrong)))
        for wrong in rng.integers(0, 2, (20, 2))
    ]
    found = drift_of(rows, model="m")
    assert abs(found.n_unsteady - found.n_changed) <= 3  # the answers alone say nothing
    assert found.name == "drift"


@pytest.mark.parametrize("n_answers", [2, 5, 1000])
def test_a_model_that_never_answers_twice_alike_raises_no_alarm_by_that(n_answers):
    rng, alarms, n_runs = np.random.default_rng(n_answers), 0, 1000
    for _ in range(n_runs):
        drawn = rng.integers(0, n_answers, (20, 3)).tolist()
        rows = [canary(*three, scores=[float(one == 0) for one in three]) for three in drawn]
        alarms += drift_of(rows, model="m").name == "drift"
    assert alarms / n_runs <= 0.05 + 3 * (0.05 * 0.95 / n_runs) ** 0.5


def test_what_changes_though_nothing_can_vary_is_a_fault_in_the_first_row():
    found = drift_of([canary("a", "b", varying=()), *[canary("a", "a", varying=())] * 9], model="base")
    assert (found.name, found.n_faulty, found.p_value) == ("fault", 1, None)
    assert "FAULT: 1 of 10 stored answers" in found.text()
    assert "--copa-cache-dir" in found.text()


def test_a_judge_that_drifts_is_told_from_a_program_that_does():
    rows = [canary("a", "a", scores=(1.0, 0.0, 0.0), varying=(Phase.METRIC,))] * 4
    found = drift_of(rows, model="m")
    assert found.name == "drift"
    assert found.n_rescored == 4
    assert "it is a model that the metric asks" in found.text()
    assert "1.000 stored, 0.000 now" in found.text()
    steady = [canary("a", "a", scores=(1.0, 0.0, 0.0), varying=())]
    assert drift_of(steady, model="m").name == "fault"


def test_rows_without_a_score_are_counted_and_judge_nothing():
    rows = [canary("a", "a"), canary("a", "b", scores=(1.0, None, 1.0))]
    found = drift_of(rows, model="m")
    assert (found.n, found.n_unanswered, found.n_changed) == (1, 1, 0)
    assert "1 more got no score" in found.text()
    with pytest.raises(ProviderError, match="none of 2 rows got a score"):
        drift_of([rows[1]] * 2, model="m")
