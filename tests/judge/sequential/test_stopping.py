import json
from dataclasses import dataclass, field

import numpy as np
import pytest

from copa_harness.documents import to_jsonable
from copa_harness.judge.intervals import mean_interval
from copa_harness.judge.options import Gates
from copa_harness.judge.paired_gates import JudgedRun
from copa_harness.judge.sequential.stopping import SequentialJudge
from copa_harness.results import EvaluationResult, ExampleResult, Usage, Verdict


@dataclass(frozen=True)
class Accepted:
    scores: dict
    fingerprints: dict = field(default_factory=dict)
    name: str = "iris (none)"
    origin: str = "2026-01-02"


IDS = tuple(f"e{i:03}" for i in range(200))


def split(n_right):
    return {key: float(i < n_right) for i, key in enumerate(IDS)}


def run(watch, after, *, size=8, usd=0.001):
    used = []
    for block in watch.blocks(size=size):
        watch.add({key: after[key] for key in block})
        used += block
    rows = tuple(
        ExampleResult(key, after[key], "ok" if after[key] is not None else "provider_error", error="down")
        for key in sorted(used)
    )
    scored = [after[key] for key in used if after[key] is not None]
    usage = Usage(paid_calls=len(used), usd=usd * len(used))
    return watch.finish(EvaluationResult("test", "lm", rows, mean_interval(scored), usage))


def only(answer, gate):
    (found,) = [result for result in answer.gates if result.gate.startswith(gate)]
    return found


def test_a_clear_score_stops_early_and_says_what_was_saved():
    answer = run(SequentialJudge(IDS, Gates(min_score=0.5), run=JudgedRun(None), seed=0), split(190))
    assert answer.verdict is Verdict.PASS
    assert answer.n_used < 60
    assert answer.usd_saved == pytest.approx(0.001 * answer.n_saved)
    assert f"stopped after {answer.n_used} of 200 examples" in answer.text()
    assert "$" in answer.text()


def test_a_clear_drop_fails_early_and_says_how_it_was_found_and_what_to_do():
    watch = SequentialJudge(IDS, Gates(max_regression=0.02), run=JudgedRun(None, baseline=Accepted(split(200))), seed=0)
    answer = run(watch, split(140))
    gate = only(answer, "max_regression")
    assert gate.verdict is Verdict.FAIL
    assert answer.n_saved > 50
    for words in (
        "exact sign test with error spending",
        "valid however often it looks",
        "Next:",
        "without --copa-sequential",
    ):
        assert words in gate.message
    assert gate.details["p_sequential"] <= 0.05


def test_a_pass_under_a_margin_takes_all_rows_and_costs_nothing():
    watch = SequentialJudge(IDS, Gates(max_regression=0.05), run=JudgedRun(None, baseline=Accepted(split(200))), seed=0)
    answer = run(watch, split(200))
    gate = only(answer, "max_regression")
    assert (answer.n_used, gate.verdict) == (200, Verdict.PASS)
    assert gate.details["p_not_worse"] == pytest.approx(0.95**200, abs=2e-5)
    assert "nothing saved" in answer.text()


def test_without_a_margin_the_exact_test_is_looked_at_and_needs_no_other():
    watch = SequentialJudge(IDS, Gates(max_regression=0.0), run=JudgedRun(None, baseline=Accepted(split(200))), seed=0)
    answer = run(watch, split(193), size=1)
    gate = only(answer, "max_regression")
    assert gate.verdict is Verdict.FAIL
    assert answer.n_saved > 0
    assert "exact sign test with error spending" in gate.message
    assert gate.details["p_sequential"] <= 0.05


def test_the_last_look_of_the_exact_test_and_the_numbers_told_agree():
    rng = np.random.default_rng(3)
    for seed in range(15):
        before = {key: float(rng.random() < 0.7) for key in IDS}
        after = {key: score if rng.random() < 0.8 else float(rng.random() < 0.55) for key, score in before.items()}
        watch = SequentialJudge(
            IDS, Gates(max_regression=0.0), run=JudgedRun(None, baseline=Accepted(before)), seed=seed
        )
        gate = only(run(watch, after, size=200), "max_regression")
        (looked,) = watch.verdicts
        assert gate.verdict is (looked or Verdict.UNDECIDED)


def test_a_graded_score_where_right_and_wrong_were_expected_decides_nothing_early():
    after = split(150) | dict.fromkeys(IDS[:8], 0.5)
    watch = SequentialJudge(IDS, Gates(max_regression=0.0), run=JudgedRun(None, baseline=Accepted(split(200))), seed=0)
    answer = run(watch, after, size=1)
    assert answer.n_used == 200
    assert only(answer, "max_regression").verdict is Verdict.FAIL


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_p_values_of_a_run_that_was_cut_off_are_not_told(margin):
    gates = Gates(min_score=0.99, max_regression=margin)
    answer = run(SequentialJudge(IDS, gates, run=JudgedRun(None, baseline=Accepted(split(190))), seed=0), split(180))
    gate = only(answer, "max_regression")
    assert gate.verdict is Verdict.UNDECIDED
    assert not [name for name in gate.details if name.startswith("p_")]


def test_a_failure_is_held_to_its_share_of_the_error_rate():
    def found(families):
        run_of = JudgedRun(None, baseline=Accepted(split(200)), families=families)
        watch = SequentialJudge(IDS, Gates(max_regression=0.02), run=run_of, seed=0)
        return only(run(watch, split(193), size=1), "max_regression").verdict

    assert found({}) is Verdict.FAIL
    assert found({"better_than": 100}) is Verdict.FAIL
    assert found({"max_regression": 100}) is Verdict.UNDECIDED


def test_a_failure_ends_the_run_and_leaves_other_gates_open_with_words():
    gates = Gates(min_score=0.69, max_regression=0.02)
    answer = run(SequentialJudge(IDS, gates, run=JudgedRun(None, baseline=Accepted(split(200))), seed=0), split(140))
    assert answer.verdict is Verdict.FAIL
    assert only(answer, "min_score").verdict is Verdict.UNDECIDED
    assert "another gate ended the run" in only(answer, "min_score").message


def test_the_size_of_a_block_does_not_change_a_verdict():
    verdicts = {
        size: run(
            SequentialJudge(IDS, Gates(min_score=0.9), run=JudgedRun(None), seed=3), split(150), size=size
        ).verdict
        for size in (1, 7, 64)
    }
    assert set(verdicts.values()) == {Verdict.FAIL}


def test_too_many_failures_end_the_run_as_an_error():
    answer = run(SequentialJudge(IDS, Gates(min_score=0.5), run=JudgedRun(None), seed=0), dict.fromkeys(IDS))
    assert answer.verdict is Verdict.ERROR
    assert answer.n_used <= 8


def test_a_rival_that_is_beaten_early_is_passed():
    watch = SequentialJudge(IDS, Gates(better_than="none"), run=JudgedRun(None, opponent=Accepted(split(80))), seed=0)
    answer = run(watch, split(190))
    assert only(answer, "better_than").verdict is Verdict.PASS
    assert answer.n_saved > 0


def test_without_a_baseline_everything_is_evaluated_and_left_open():
    answer = run(SequentialJudge(IDS, Gates(max_regression=0.05), run=JudgedRun(None), seed=0), split(150))
    assert (answer.n_used, only(answer, "max_regression").verdict) == (200, Verdict.NOT_COMPARABLE)


def test_a_baseline_that_is_not_comparable_is_not_watched():
    accepted = Accepted(split(200), {"metric": "a"})
    watch = SequentialJudge(
        IDS, Gates(max_regression=0.0), run=JudgedRun(None, baseline=accepted, fingerprints={"metric": "b"}), seed=0
    )
    answer = run(watch, split(20))
    assert answer.n_used == 200
    assert only(answer, "max_regression").verdict is Verdict.NOT_COMPARABLE


def test_groups_come_whole_and_in_one_block():
    groups = {key: str(i // 5) for i, key in enumerate(IDS)}
    watch = SequentialJudge(IDS, Gates(min_score=0.8), run=JudgedRun(None, groups=groups), seed=0)
    for block in watch.blocks(size=12):
        assert len(block) == 10
        assert all(len([key for key in block if groups[key] == label]) == 5 for label in {groups[k] for k in block})
        break


def test_scores_out_of_order_are_refused():
    watch = SequentialJudge(IDS, Gates(min_score=0.5), run=JudgedRun(None), seed=0)
    late = watch.units[-1][0]
    with pytest.raises(ValueError, match="those of the next block"):
        watch.add({late: 1.0})


def test_an_evaluation_of_other_rows_is_refused():
    watch = SequentialJudge(IDS, Gates(min_score=0.5), run=JudgedRun(None), seed=0)
    with pytest.raises(ValueError, match="expected the 0 added"):
        watch.finish(EvaluationResult("test", "lm", (ExampleResult("a", 1.0),), mean_interval([1])))


def test_an_unchanged_program_is_failed_in_at_most_five_percent_of_runs_however_small_the_blocks():
    rng, failed, runs = np.random.default_rng(8), 0, 60
    for seed in range(runs):
        before = {key: float(rng.random() < 0.7) for key in IDS}
        after = {key: score if rng.random() < 0.8 else float(rng.random() < 0.7) for key, score in before.items()}
        watch = SequentialJudge(
            IDS, Gates(max_regression=0.0), run=JudgedRun(None, baseline=Accepted(before)), seed=seed
        )
        for block in watch.blocks(size=1):
            watch.add({key: after[key] for key in block})
        failed += Verdict.FAIL in watch.verdicts
    assert failed <= 6


def test_every_number_is_plain_json():
    watch = SequentialJudge(
        IDS, Gates(max_regression=0.02, min_score=0.1), run=JudgedRun(None, baseline=Accepted(split(200))), seed=0
    )
    answer = run(watch, split(140))
    for document in (answer.numbers(), *(gate.details for gate in answer.gates)):
        assert json.loads(json.dumps(to_jsonable(document, fallback=None), allow_nan=False)) is not None


def test_a_verdict_on_the_last_block_is_not_said_to_be_of_a_streak():
    watch = SequentialJudge(IDS, Gates(max_regression=0.05), run=JudgedRun(None, baseline=Accepted(split(200))), seed=0)
    whole = only(run(watch, split(140), size=200), "max_regression")
    watch = SequentialJudge(IDS, Gates(max_regression=0.05), run=JudgedRun(None, baseline=Accepted(split(200))), seed=0)
    early = only(run(watch, split(140)), "max_regression")
    assert whole.verdict is early.verdict is Verdict.FAIL
    assert "The difference is -0.300." in whole.message
    assert "it tends to shrink" in early.message
