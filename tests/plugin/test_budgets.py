"""Ceilings, exhaustion and failures through the plugin: what ends when, with which outcome, and what is said."""

import json

# pytester forgets what an inner run imported; these are imported once, here, for all of them.
import dspy  # noqa: F401
import pytest

import copa_harness.evaluate.runner
import copa_harness.lm.budget.ledger
import copa_harness.lm.factory
import copa_harness.optimize.copa
import copa_harness.report.files
import copa_harness.session.session
import copa_harness.store.artifacts  # noqa: F401
from tests.plugin.shouting import SHOUTING

STRICT = ("-W", "error", "--strict-markers", "--strict-config", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")

CONFTEST = f"""{SHOUTING}
def answer(messages):
    word = asked(messages)
    pay(messages)
    return {{"answer": word.upper() if len(messages) > 2 else word}}


@pytest.fixture
def copa_base_lm(copa_session):
    return ScriptedLM(
        answer, model="scripted/shout", fingerprint="shout", gateway=copa_session.models.gateway, max_tokens=50
    )
"""

SUITE = """
import pytest

def test_base(copa_evaluate):
    assert copa_evaluate().n == 18

@pytest.mark.copa(strategy="p", min_score=0.5)
def test_prompts(copa_run):
    copa_run.check()

def test_plain():
    pass
"""


@pytest.fixture
def folder(pytester):
    pytester.makeconftest(CONFTEST)
    return pytester


def latest(folder):
    return json.loads((folder.path / "reports" / "latest.json").read_text())


def n_paid(folder):
    path = folder.path / "paid.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def counted(result):
    return result.parseoutcomes()


def test_ceilings_of_the_session_cut_short_with_an_outcome_and_status_of_their_own(folder):
    folder.makepyfile(test_suite=SUITE)
    result = folder.runpytest_inprocess(*STRICT, "--copa-total-budget=calls=10", "--copa-threads=2")
    assert result.ret == 6
    result.stdout.fnmatch_lines(
        [
            "copa: budget light = 400 calls per run*, 10 calls for the whole session, lm embedded*",
            "undecided*completed: budget exhausted: *",
            "*--copa-total-budget*",
            "the whole session paid 10 of 10 calls",
            "runs: 2 undecided; *",
            "exit status 6: budget exhausted: 2 evaluations or tests were cut short*",
            "*1 passed, 2 budget exhausted, 2 undecided*",
        ]
    )
    assert n_paid(folder) == 10
    assert [(run["score"], run["verdict"], run["exhausted"]) for run in latest(folder)["runs"]] == [
        (None, "undecided", True)
    ] * 2
    assert [run["usage"]["paid_calls"] for run in latest(folder)["runs"]] == [10, 0]

    again = folder.runpytest_inprocess(*STRICT)
    again.assert_outcomes(passed=3)
    clean = latest(folder)
    assert [run["score"] for run in clean["runs"]] == [0.0, 1.0]
    assert n_paid(folder) == sum(run["usage"]["paid_calls"] for run in clean["runs"]) + 10


def test_a_search_that_the_session_cut_short_is_not_taken_for_a_finished_one(folder):
    folder.makepyfile(test_suite=SUITE)
    result = folder.runpytest_inprocess(*STRICT, "--copa-total-budget=calls=27", "--copa-threads=2", "-k", "prompts")
    assert result.ret == 6
    folder.runpytest_inprocess(*STRICT, "-k", "prompts").assert_outcomes(passed=1, deselected=2)
    run = latest(folder)["runs"][-1]
    assert (run["score"], run["exhausted"]) == (1.0, False)


@pytest.mark.parametrize("most", [5, 24, 40])  # of the program as written; the search; the evaluation after it
def test_the_report_sums_up_to_what_was_paid_wherever_the_session_was_cut_short(folder, most):
    folder.makepyfile(test_suite=SUITE)
    options = (f"--copa-total-budget=calls={most}", "--copa-budget=calls=60", "--copa-threads=2")
    result = folder.runpytest_inprocess(*STRICT, *options)
    assert result.ret == 6
    assert sum(run["usage"]["paid_calls"] for run in latest(folder)["runs"]) == n_paid(folder) == most
    result.stdout.fnmatch_lines([f"*{most} calls*"])


def test_workers_share_the_ceiling_of_the_session(folder):
    folder.makepyfile(test_suite=SUITE + "\n\ndef test_again(copa_evaluate):\n    copa_evaluate(split='train')\n")
    result = folder.runpytest_subprocess(*STRICT, "-n", "2", "--copa-total-budget=calls=9")
    assert result.ret == 6
    assert n_paid(folder) == 9
    result.stdout.fnmatch_lines(["the whole session paid 9 of 9 calls", "*1 passed, 3 budget exhausted*"])


def test_a_failing_test_keeps_the_status_of_failure(folder):
    folder.makepyfile(test_suite=SUITE + "\n\ndef test_wrong():\n    assert False\n")
    result = folder.runpytest_inprocess(*STRICT, "--copa-total-budget=calls=10")
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_a_call_in_the_test_body_is_held_to_the_session_too(folder):
    source = """
        def test_it(copa_evaluate, copa_task, copa_base_lm):
            copa_task.program.deepcopy()(question="zz", lm=copa_base_lm)
        """
    folder.makepyfile(test_suite=source + "\n        def test_more(copa_evaluate):\n            copa_evaluate()\n")
    result = folder.runpytest_inprocess(*STRICT, "--copa-total-budget=calls=1", "-p", "no:terminalreporter")
    assert result.ret == 6


def test_a_run_has_ceilings_of_several_kinds(folder):
    folder.makepyfile(
        test_suite="""
        import pytest

        @pytest.mark.copa(strategy="p", budget="calls=300,tokens=3000")
        def test_it(copa_run):
            assert copa_run.exhausted
            assert copa_run.usage.tokens <= 3000
            assert copa_run.budget.ceilings == {"calls": 300, "tokens": 3000}
        """
    )
    folder.runpytest_inprocess(*STRICT).assert_outcomes(passed=1)


def test_a_wrong_ceiling_of_the_session_is_a_usage_error(folder):
    folder.makepyfile(test_suite=SUITE)
    result = folder.runpytest_inprocess(*STRICT, "--copa-total-budget=euros=3")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --copa-total-budget: got a ceiling on 'euros'*"])


def test_failures_are_counted_by_kind_apart_from_wrong_answers_with_the_first_traceback(folder):
    folder.makepyfile(
        test_suite="""
        import pytest
        from conftest import WORDS, answer, rows, shouted
        from copa_harness import ScriptedLM, Task
        from dspy.utils.exceptions import LMTimeoutError
        import dspy

        def fails_sometimes(messages):
            return LMTimeoutError("too slow") if "\\nfx\\n" in messages[-1]["content"] else answer(messages)

        def breaks_sometimes(example, prediction, trace=None):
            if example.question == "fy":
                raise KeyError("colour")
            return shouted(example, prediction)

        @pytest.fixture
        def copa_task():
            program = dspy.Predict("question -> answer")
            return Task("shaky", program, breaks_sometimes, rows(WORDS[:12]), rows(WORDS[12:18]), rows(WORDS[18:]))

        @pytest.fixture
        def copa_base_lm(copa_session):
            return ScriptedLM(fails_sometimes, model="s", fingerprint="f", gateway=copa_session.models.gateway)

        @pytest.mark.copa(strategy="none")
        def test_too_many(copa_run):
            copa_run.check()

        @pytest.mark.copa(strategy="none", max_error_rate=0.2)
        def test_allowed(copa_run):
            copa_run.check()
        """
    )
    result = folder.runpytest_inprocess(*STRICT)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR*max_error_rate=0: 2 of 18 examples have no score*",
            "attempts at calls that failed, those a retry mended included: *metric exception 2*timeout 2*",
        ]
    )
    report = latest(folder)
    assert (report["runs"][0]["n_provider_errors"], report["runs"][0]["n_metric_errors"]) == (1, 1)
    failed = report["environment"]["failed_calls"]
    assert "KeyError: 'colour'" in failed["metric exception"]["first"]
    assert failed["timeout"]["count"] >= 2


def test_calls_hidden_in_a_metric_are_told_apart_and_counted(folder):
    folder.makepyfile(
        test_suite="""
        import dspy
        import pytest
        from conftest import WORDS, rows, shouted
        from copa_harness import ScriptedLM, Task

        @pytest.fixture
        def copa_task(copa_session):
            judge = ScriptedLM("yes", model="judge", fingerprint="judge", gateway=copa_session.models.gateway)

            def judged(example, prediction, trace=None):
                return judge(prediction.answer)[0] == "yes"

            program = dspy.Predict("question -> answer")
            return Task("judged", program, judged, rows(WORDS[:12]), rows(WORDS[12:18]), rows(WORDS[18:]))

        def test_it(copa_evaluate):
            assert copa_evaluate().usage.paid_calls == 18
        """
    )
    result = folder.runpytest_inprocess(*STRICT)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["judged, none: the metric made 18 calls of a model of its own on the test split*"])
    run = latest(folder)["runs"][0]
    assert [(phase["phase"], phase["usage"]["paid_calls"]) for phase in run["phases"]] == [
        ("test evaluation", 18),
        ("test metric", 18),
    ]
    assert run["usage"]["paid_calls"] == 36


def test_a_plan_makes_no_call_and_prices_what_is_missing(folder):
    folder.makepyfile(test_suite=SUITE)
    plan = ("--copa-plan", "--copa-budget=calls=100")
    result = folder.runpytest_inprocess(*STRICT, *plan)
    result.assert_outcomes(passed=1, skipped=2)
    assert n_paid(folder) == 0
    assert not (folder.path / "reports").exists()
    result.stdout.fnmatch_lines(
        [
            "copa: *plan only: no call is made*",
            "what a run would pay:",
            "task*step*calls to pay*cached*tokens*dollars*",
            "shout*program as written, test split*|*18 |*0 |*|*0.0000",
            "*search p (at most, by its budget)*|*100 |*0 |*",
            "*p, test split*|*18 |*0 |*",
            "all *|*136 |*0 |*",
            "runs: plan only, nothing was run",
        ]
    )
    folder.runpytest_inprocess(*STRICT, "--copa-budget=calls=100").assert_outcomes(passed=3)
    n_before = n_paid(folder)
    again = folder.runpytest_inprocess(*STRICT, *plan)
    again.stdout.fnmatch_lines(["*search p (finished earlier)*", "all *|*0 |*|*0 |*0.0000"])
    assert n_paid(folder) == n_before
