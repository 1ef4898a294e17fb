import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copa_harness.documents import from_json, to_json
from copa_harness.judge.intervals import mean_interval
from copa_harness.report.records import RunRecord, as_reported
from copa_harness.results import (
    Budget,
    EvaluationResult,
    ExampleResult,
    GateResult,
    Interval,
    PhaseRecord,
    Usage,
    Verdict,
)

MINIMUM = {
    "test",
    "task",
    "strategy",
    "lm",
    "split",
    "score",
    "n",
    "n_failed",
    "interval",
    "usage",
    "phases",
    "verdict",
    "artifact",
}
USAGE = {"paid_calls", "cached_calls", "input_tokens", "output_tokens", "usd", "train_steps", "wall_s"}

counts = st.integers(0, 10**6)
scores = st.none() | st.floats(0, 1)
usages = st.builds(Usage, counts, counts, counts, counts, counts, st.floats(0, 1e3), counts, st.floats(0, 1e4))
records = st.builds(
    RunRecord,
    test=st.text(max_size=10),
    task=st.text(max_size=10),
    strategy=st.sampled_from(["none", "w", "p -> w -> p"]),
    lm=st.just("embedded"),
    split=st.just("test"),
    score=scores,
    n=counts,
    n_failed=counts,
    interval=st.none() | st.builds(Interval, st.floats(0, 0.5), st.floats(0.5, 1)),
    usage=usages,
    phases=st.lists(st.builds(PhaseRecord, st.just("weights"), usages, scores, scores), max_size=2).map(tuple),
    verdict=st.sampled_from(Verdict),
    label=st.just("embedded"),
    gates=st.lists(
        st.builds(GateResult, st.just("g"), st.sampled_from(Verdict), st.text(max_size=5), st.just({"n": 1})),
        max_size=2,
    ).map(tuple),
    budget=st.sampled_from([Budget(), Budget(400, "light")]),
    scores=st.dictionaries(st.from_regex(r"[0-9a-f]{4}", fullmatch=True), scores, max_size=3),
    seed=st.none() | counts,
    cut_short=st.booleans(),
)


@given(records)
def test_a_record_survives_the_trip_through_json(record):
    assert from_json(RunRecord, json.loads(json.dumps(to_json(record), allow_nan=False))) == record


def evaluation(scores_, outcome="ok"):
    rows = tuple(ExampleResult(f"e{i}", s, outcome if s is None else "ok") for i, s in enumerate(scores_))
    return EvaluationResult("test", "embedded@12", rows, mean_interval([s for s in scores_ if s is not None]))


def record_of(run, **more):
    return RunRecord.from_evaluation(
        run, test="t::x", task="iris", strategy="p -> w -> p", lm="embedded", split="test", **more
    )


def test_the_minimum_schema_is_there():
    document = as_reported(record_of(evaluation([1.0, 0.0])))
    assert set(document) >= MINIMUM
    assert set(document["usage"]) >= USAGE
    assert document["score"] == 0.5
    assert len(document["interval"]) == 2
    assert document["verdict"] == "pass"


def test_the_minimum_schema_is_enough_to_read():
    document = to_json(record_of(evaluation([1.0, 0.0])))
    minimal = {key: document[key] for key in MINIMUM}
    assert from_json(RunRecord, minimal).score == 0.5


@pytest.mark.parametrize("run", [None, evaluation([None, None], "provider_error")])
def test_a_run_without_a_score_has_null_and_never_nan(run):
    record = record_of(run)
    assert record.score is None
    text = json.dumps(as_reported(record), allow_nan=False)
    assert "NaN" not in text
    assert json.loads(text)["score"] is None
    assert json.loads(text)["interval"] is None


def test_nan_in_details_and_phases_is_null():
    record = record_of(
        evaluation([1.0]),
        gates=(GateResult("g", Verdict.PASS, "", {"p": math.nan}),),
        phases=(PhaseRecord("weights", Usage(), math.nan, 0.5),),
    )
    document = json.loads(json.dumps(as_reported(record), allow_nan=False))
    assert document["gates"][0]["details"]["p"] is None
    assert document["phases"][0]["score_before"] is None


def test_failures_are_counted_by_kind():
    rows = (
        ExampleResult("a", 0.0, "unparsed"),
        ExampleResult("b", None, "provider_error"),
        ExampleResult("c", None, "metric_error"),
    )
    record = record_of(EvaluationResult("test", "lm", rows, mean_interval([0.0])))
    assert (record.n_unparsed, record.n_provider_errors, record.n_metric_errors, record.n_failed) == (1, 1, 1, 2)


def test_the_verdict_is_the_gravest_gates():
    gates = (GateResult("a", Verdict.PASS, ""), GateResult("b", Verdict.FAIL, ""))
    assert record_of(evaluation([1.0]), gates=gates).verdict is Verdict.FAIL


def test_credentials_in_messages_are_masked():
    gates = (GateResult("a", Verdict.ERROR, "401 for sk-abcdefghijklmnop1234", {"api_key": "abc"}),)
    text = json.dumps(as_reported(record_of(evaluation([1.0]), gates=gates)))
    assert "abcdefghijklmnop" not in text
    assert '"abc"' not in text


@pytest.mark.parametrize("wrong", [{}, {"test": "x"}])
def test_a_document_without_the_minimum_is_refused(wrong):
    with pytest.raises(ValueError, match=r"RunRecord\.\w+ is missing"):
        from_json(RunRecord, wrong)
