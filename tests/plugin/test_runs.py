"""Suites that run: what passes, what fails and with which words, what is written, and what the second run costs.

The model is a script that answers right only when it is shown how, so that a prompt search has something to find.
"""

import json

# pytester forgets what an inner run imported; these are imported once, here, for all of them.
import dspy  # noqa: F401
import pytest

import copa_harness.evaluate.runner
import copa_harness.lm.factory
import copa_harness.optimize.copa
import copa_harness.report.files
import copa_harness.session.session
import copa_harness.store.artifacts
import copa_harness.store.baselines  # noqa: F401

STRICT = ("-W", "error", "--strict-markers", "--strict-config", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")

CONFTEST = '''
import dspy
import pytest
from copa_harness import ScriptedLM, Task

WORDS = [a + b for a in "abcdef" for b in "uvwxyz"]


def shouted(example, prediction, trace=None):
    return prediction.answer == example.answer


def answer(messages):
    """Shouts when shown how, else repeats."""
    word = messages[-1]["content"].split("[[ ## question ## ]]")[1].strip().split()[0]
    return {"answer": word.upper() if len(messages) > 2 else word}


def rows(words):
    return [dspy.Example(question=word, answer=word.upper()).with_inputs("question") for word in words]


@pytest.fixture(scope="session")
def copa_task():
    program = dspy.Predict("question -> answer")
    return Task("shout", program, shouted, rows(WORDS[:12]), rows(WORDS[12:18]), rows(WORDS[18:]))


@pytest.fixture(scope="session")
def copa_base_lm(copa_session):
    return ScriptedLM(answer, model="scripted/shout", fingerprint="shout", gateway=copa_session.models.gateway)
'''

SUITE = """
import pytest

def test_base(copa_evaluate, copa_base_lm):
    assert copa_evaluate(lm=copa_base_lm).score < 0.2

@pytest.mark.copa(strategy="p", min_score=0.9, max_calls=400)
def test_prompts(copa_run):
    assert copa_run.score >= 0.9
    assert copa_run.usage.calls <= copa_run.budget.calls
    assert copa_run.completed and copa_run.n == 18 and copa_run.interval[0] > 0.8
    assert copa_run.verdict.value == "pass" and copa_run.improvement == 1.0
    assert (copa_run.artifact / "manifest.json").exists()
    assert copa_run.program(question="zz").answer == "ZZ"
    copa_run.check()
"""


@pytest.fixture
def suite(pytester):
    pytester.makeconftest(CONFTEST)

    def run(source, *arguments):
        pytester.makepyfile(test_suite=source)
        return pytester.runpytest_inprocess(*STRICT, *arguments)

    return run


def latest(pytester):
    return json.loads((pytester.path / "reports" / "latest.json").read_text())


def spent(report, what):
    return sum(run["usage"][what] for run in report["runs"])


def test_a_suite_passes_and_reports_and_the_second_run_pays_nothing(pytester, suite):
    result = suite(SUITE)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        [
            "copa: budget light = 400 calls per run*, cache .copa_cache",
            "*= copa =*",
            "*task*strategy*n*score*to base*calls*verdict",
            "*shout*none*18*0.000 [[]*[]]*-*18*pass",
            "*p*18*1.000 [[]*[]]*+1.000*pass",
            "runs: 2 pass; * calls paid, * from the cache, * tokens*",
            "report: reports/latest.html",
        ]
    )
    first = latest(pytester)
    assert [run["strategy"] for run in first["runs"]] == ["none", "p"]
    assert first["schema"] == 1
    run = first["runs"][1]
    assert run["test"].endswith("test_suite.py::test_prompts")
    assert (run["split"], run["n"], run["n_failed"], run["verdict"]) == ("test", 18, 0, "pass")
    assert (pytester.path / "reports" / run["artifact"] / "program.json").exists()
    assert spent(first, "paid_calls") > 0

    suite(SUITE).assert_outcomes(passed=2)
    second = latest(pytester)
    assert spent(second, "paid_calls") == 0
    assert spent(second, "train_steps") == 0
    assert [run["score"] for run in second["runs"]] == [run["score"] for run in first["runs"]]
    assert (pytester.path / "reports" / "0002.json").exists()


def test_the_second_run_loads_no_torch_and_makes_no_search(pytester, suite):
    suite(SUITE).assert_outcomes(passed=2)
    pytester.makepyfile(
        test_suite=SUITE
        + "\ndef test_nothing_heavy():\n    import sys\n"
        + "    assert not {'torch', 'optuna', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    pytester.runpytest_subprocess(*STRICT, "-q").assert_outcomes(passed=3)


def test_a_wrong_threshold_fails_with_interval_n_and_worst_examples(suite):
    result = suite(
        """
        import pytest

        def test_assert(copa_evaluate):
            assert copa_evaluate().score >= 0.9

        @pytest.mark.copa(strategy="none", min_score=0.5)
        def test_gate(copa_run):
            copa_run.check()

        @pytest.mark.copa(strategy="none", min_score=0.5)
        def test_forgotten(copa_run):
            pass
        """
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=2, passed=1)
    result.stdout.fnmatch_lines(
        [
            "E*assert 0.000 >= 0.900",
            "E*shout, none: score 0.000 on 18 test examples (95 % interval 0.000 to 0.*)",
            "*worst 3 of 18 examples below a full score*",
            "*inputs*question=d*",
            "*expected*answer=D*",
            "E*FAIL*min_score=0.5: got 0.000, expected at least 0.5*",
            "*test_forgotten: a gate failed, but the test passed it by; call copa_run.check() in it",
            "runs: 1 pass, 2 fail; *",
        ]
    )


def test_strategies_can_be_parametrized_and_share_what_they_have_in_common(pytester, suite):
    result = suite(
        """
        import pytest

        @pytest.mark.copa(budget="calls=60")
        @pytest.mark.parametrize("strategy", ["none", "p", "demos -> instructions", "bootstrap_fewshot"])
        def test_compare(copa_run, strategy):
            assert copa_run.completed
            assert copa_run.strategy == strategy
            assert copa_run.budget.calls == 60
        """,
        "-v",
    )
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["strategies compared:", "*difference to none*", "*equal budget: calls=60 (60 calls)*"])
    assert len(latest(pytester)["runs"]) == 4


def test_the_command_line_overrules_the_marker(pytester, suite):
    source = """
        import pytest

        @pytest.mark.copa(strategy="p", budget="calls=60", seed=3)
        def test_it(copa_run):
            assert copa_run.budget.calls == 8
        """
    suite(source, "--copa-budget=calls=8").assert_outcomes(passed=1)
    run = latest(pytester)["runs"][-1]
    assert (run["budget"]["calls"], run["seed"]) == (8, 3)
    assert run["usage"]["paid_calls"] <= 8 + 18
    assert run["exhausted"] is True


def test_a_run_is_the_same_program_without_its_cache_of_stages(pytester, suite):
    suite(SUITE).assert_outcomes(passed=2)
    first = latest(pytester)
    for path in (pytester.path / ".copa_cache" / "stages").rglob("*.json"):
        path.unlink()
    suite(SUITE).assert_outcomes(passed=2)
    second = latest(pytester)
    assert spent(second, "paid_calls") == 0
    assert [run["scores"] for run in second["runs"]] == [run["scores"] for run in first["runs"]]


def test_a_blessed_run_becomes_the_baseline_of_the_next(pytester, suite):
    source = """
        import pytest

        @pytest.mark.copa(strategy="p", max_regression=0.05)
        def test_it(copa_run):
            copa_run.check()
        """
    result = suite(source)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["not comparable*max_regression=0.05: there is no baseline*", "*--copa-bless*"])
    assert not (pytester.path / "baselines").exists()
    suite(source, "--copa-bless").assert_outcomes(passed=1)
    assert [path.parent.name for path in (pytester.path / "baselines").glob("*/*.json")] == ["shout"]
    suite(source).stdout.fnmatch_lines(["runs: 2 pass*"])
